"""`qdq deploy hf:FOLDER`: one command from a folder to an engine whose linear layers are INT8."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[hf]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'qdq[hf]'")
pytest.importorskip("hugging_face", reason="transformers cannot import its models", exc_type=ImportError)
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]  # transformers warns of itself

import torch  # noqa: E402
from hugging_face import linear_share, make_folder, write_text  # noqa: E402

from engines.core.onnx_runtime import session  # noqa: E402
from qdq.cli.main import main  # noqa: E402
from qdq.frontend.huggingface.caches import present_name  # noqa: E402
from qdq.frontend.huggingface.folder import open_folder  # noqa: E402
from qdq.frontend.huggingface.forms import form_of  # noqa: E402
from qdq.frontend.huggingface.network import network_of  # noqa: E402
from qdq.frontend.huggingface.tasks import wish_of  # noqa: E402


def run(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    return done.output


def test_a_step_with_a_cache_is_int8_and_right_behind_any_number_of_tokens(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path, "gpt2"), tmp_path / "out"
    how = ("--task", "text-generation-with-past", "--max-length", 12, "--count", 8, "--target", "sm89", "--tune", "off")
    run("deploy", f"hf:{folder}", "--text", write_text(tmp_path), *how, "--out", out)
    assert linear_share(out) == 1.0 and (out / "gpt2.onnx").is_file() and (out / "gpt2.engine").is_file()
    traced = json.loads((out / "provenance.json").read_text())
    assert traced["exported"]["source"] == "hf:gpt2" and "TEXT" in traced["command"]
    assert traced["calibration"]["samples"] == traced["evaluation"]["samples"] == 8 and traced["overlap"] == 0
    found = open_folder(str(folder))
    network = network_of(found, wish_of(found, None))
    tokens = torch.randint(5, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = form_of(network).run({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})["logits"]
    ours = session(out / "gpt2.int8.onnx")
    names = [put.name for put in ours.get_inputs()]
    past = {name: np.zeros((1, 4, 0, 16), np.float32) for name in names if name.startswith("past")}
    errors = []
    for place in range(40):  # calibrated behind 1 to 11 tokens
        given = {"input_ids": tokens[:, place : place + 1].numpy(), "position_ids": np.full((1, 1), place)}
        given["attention_mask"] = np.ones((1, place + 1), np.int64)
        given |= past
        made = dict(zip((put.name for put in ours.get_outputs()), ours.run(None, given), strict=True))
        past = {name: made[present_name(name)] for name in past}
        truth = expected[0, place].numpy()
        errors.append(np.square(made["logits"][0, 0] - truth).sum() / np.square(truth).sum())
    assert max(np.mean(errors[:20]), np.mean(errors[20:])) < 10**-2.5  # 25 dB, also far behind what was calibrated


def test_export_keeps_the_samples_where_asked(tmp_path: Path) -> None:
    folder, text, kept = make_folder(tmp_path, "bert"), write_text(tmp_path), tmp_path / "kept"
    words = ("export", f"hf:{folder}", "--text", text, "--count", 4, "--samples", kept, "-o", tmp_path / "x.onnx")
    said = run(*words)
    assert "input_ids, attention_mask, token_type_ids -> logits" in said and "4 to calibrate and 4 others" in said
    assert [len(list((kept / part).iterdir())) for part in ("calibration", "evaluation")] == [4, 4]
    again = CliRunner().invoke(main, [str(word) for word in words])
    assert again.exit_code == 2 and "is there already" in " ".join(again.output.split())
