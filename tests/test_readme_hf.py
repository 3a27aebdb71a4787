"""What README.md shows of Hugging Face folders works as written, in order, in one folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[hf]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'qdq[hf]'")
pytest.importorskip("hugging_face", reason="transformers cannot import its models", exc_type=ImportError)
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]  # transformers warns of itself

from hugging_face import TEXT, make_folder, make_sentence_encoder, write_text  # noqa: E402
from readme_blocks import README, commands, of_folder  # noqa: E402

from qdq.cli.main import main  # noqa: E402


def test_commands_of_the_readme_that_take_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_sentence_encoder(tmp_path).rename("sentence_encoder")
    make_folder(tmp_path, "gpt2").rename("language_model")
    make_folder(tmp_path, "esm").rename("protein_model")
    write_text(tmp_path).with_name("proteins.txt").write_text(TEXT)
    compared, masked = (line for line in README.split("`") if re.match(r"qdq compare \w+_model\.onnx", line))
    run = [command for command in commands() if of_folder(command)]
    assert {shlex.split(command)[1] for command in run} == {"deploy", "export"}
    for command in (*run, f"{compared} --schemes int8 --json"):
        result = CliRunner().invoke(main, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}{result.exception!r}"
    assert json.loads(result.stdout)["rows"][-1]["value"] < 1e4  # perplexity of random weights: as many as words
    found = CliRunner().invoke(main, [*shlex.split(masked)[1:], "--json"])
    assert found.exit_code == 0 and "tokens were masked" in found.stdout, found.output
    report = json.loads(Path("from_hf/report.json").read_text())
    (output,) = report["check"]["outputs"]
    assert output["name"] == "sentence_embedding" and output["cosine"] > 0.99
    assert Path("from_hf/sentence_encoder.onnx").is_file() and Path("decoder/language_model.engine").is_file()
