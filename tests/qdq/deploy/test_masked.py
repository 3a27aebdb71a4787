"""Masked language models: which tokens are masked, and metrics against what their definitions give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from models import constant, save_samples
from onnx import TensorProto, helper

from engines.core import onnx_runtime as ort
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import metric
from qdq.deploy.compare.runs import Run, runs
from qdq.deploy.compare.task import Masking, Task
from qdq.measure.inference.inputs import as_samples
from qdq.model.model import Model

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")

MASK, BEGIN, END, PAD = 3, 1, 2, 0
VOCABULARY, LENGTH, WIDTH = 12, 16, 16
SPECIAL = (PAD, BEGIN, END)


def masked_model() -> onnx.ModelProto:
    """input_ids, attention_mask (b, t) int64 -> rows of a table, mixed over positions -> logits (b, t, 12)."""
    rng = np.random.default_rng(0)
    tensors = {
        "table": rng.normal(size=(VOCABULARY, WIDTH)),
        "mixed": rng.normal(size=(LENGTH, LENGTH)) / 4,
        "head": rng.normal(size=(WIDTH, VOCABULARY)),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], name="/embed"),
        helper.make_node("Cast", ["attention_mask"], ["kept"], name="/Cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["column"], name="/Unsqueeze"),
        helper.make_node("Mul", ["rows", "column"], ["x"], name="/Mul"),
        helper.make_node("MatMul", ["mixed", "x"], ["y"], name="/mix/MatMul"),
        helper.make_node("MatMul", ["y", "head"], ["logits"], name="/head/MatMul"),
    ]
    ends = [
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", LENGTH]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", LENGTH, VOCABULARY])],
    ]
    stored = [constant(name, array.astype(np.float32)) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "masked", *ends, [*stored, constant("last", np.asarray([-1]))])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def sequences(count: int, *, seed: int, rows: int = 1) -> list[dict[str, np.ndarray]]:
    """BEGIN, tokens, END, PAD to 16; of different lengths."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        ids, lengths = rng.integers(4, VOCABULARY, (rows, LENGTH)), rng.integers(9, LENGTH + 1, rows)
        for row, length in zip(ids, lengths, strict=True):
            row[0], row[length - 1], row[length:] = BEGIN, END, PAD
        mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def model() -> Model:
    return Model(proto=masked_model(), directory=Path(), sha256="")


def made(samples: list[dict[str, np.ndarray]], task: Task) -> list[Run]:
    return list(runs(as_samples(samples, model()), model(), task))


def task(name: str, share: float | None = None, special: tuple[int, ...] = SPECIAL) -> Task:
    return Task(metric=name, masking=Masking(token=MASK, special=special, share=share))


@pytest.mark.parametrize(("name", "share"), [("masked-accuracy", 0.3), ("pseudo-perplexity", None)])
def test_every_token_is_masked_once_but_special_ones_and_padding(name: str, share: float | None) -> None:
    samples = sequences(2, seed=1, rows=3)
    found = made(samples, task(name, share, special=(BEGIN, END)))
    assert [run.sample for run in found] == sorted(run.sample for run in found)
    for number, sample in enumerate(samples, 1):
        ids, mask = sample["input_ids"], sample["attention_mask"]
        ours = [run for run in found if run.sample == number]
        times = np.zeros_like(ids)
        for run in ours:
            assert run.labels is not None
            masked = run.labels >= 0
            times += masked
            assert np.array_equal(run.labels[masked], ids[masked])
            assert np.array_equal(run.inputs["input_ids"], np.where(masked, MASK, ids))
            assert np.array_equal(run.inputs["attention_mask"], mask)
            most = 1 if share is None else math.ceil(share * LENGTH)
            assert masked.sum(axis=1).max() <= most
        assert np.array_equal(times, ((mask == 1) & ~np.isin(ids, [BEGIN, END])).astype(int))
        assert len(ours) == (4 if share else mask.sum(axis=1).max() - 2)
    again = made(samples, task(name, share, special=(BEGIN, END)))
    assert all(np.array_equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(found, again, strict=True))


def test_a_share_below_one_token_is_one_token() -> None:
    """However small it is: no copy masks nothing, and no number of copies takes forever."""
    samples = sequences(1, seed=3)
    one, least = (
        made(samples, task(name, share)) for name, share in (("pseudo-perplexity", None), ("masked-accuracy", 1e-12))
    )
    assert len(least) == len(one)
    assert all(np.count_nonzero(run.labels >= 0) == 1 for run in least if run.labels is not None)


def contact_map(logits: np.ndarray, masked: dict[int, np.ndarray]) -> np.ndarray:
    """By the definition, position by position."""
    places = sorted(masked)
    raw = np.zeros((len(places), len(places)))
    for i, at in enumerate(places):
        for j, other in enumerate(places):
            moved = masked[at][other] - logits[other]
            raw[i, j] = np.sqrt(((moved - moved.mean()) ** 2).sum())
    raw = (raw + raw.T) / 2
    np.fill_diagonal(raw, 0)
    return np.asarray(raw - raw.mean(0)[None] * raw.mean(0)[:, None] / raw.mean())


def test_contacts_correlate_maps_of_what_masking_moves() -> None:
    rng = np.random.default_rng(0)
    counting, expected = metric("contacts"), []
    for run in ("first", "second"):
        length, places = (14, range(1, 13)) if run == "first" else (10, range(10))
        base, masked = rng.normal(size=(2, length, 5)), rng.normal(size=(2, length, length, 5))
        masked[1] = masked[0] + 0.3 * masked[1]
        none = np.full((1, length), -1)
        counting.add(base[0][None], base[1][None], none)
        for at in places:
            counting.add(masked[0, at][None], masked[1, at][None], np.where(np.arange(length) == at, 7, none))
        ours, theirs = (contact_map(base[k], {at: masked[k, at] for at in places}) for k in (0, 1))
        far = [(i, j) for i in range(len(places)) for j in range(len(places)) if abs(i - j) >= 6]
        expected.append(np.corrcoef([ours[p] for p in far], [theirs[p] for p in far])[0, 1])
    assert counting.value == pytest.approx(np.mean(expected))
    assert counting.value == pytest.approx(np.mean(expected))  # asked twice
    same = metric("contacts")
    for run in made(sequences(2, seed=4, rows=2), task("contacts")):
        logits = rng.normal(size=(2, LENGTH, 5))
        same.add(logits, 2 * logits, run.labels)
    assert same.value == pytest.approx(1)
    assert math.isnan(metric("contacts").value)
    with pytest.raises(InputError, match="logits for every token"):
        metric("contacts").add(np.ones((1, 4)), np.ones((1, 4)), np.ones((1, 9)))


@pytest.mark.parametrize(("found", "expected"), [(True, math.nan), (False, 0.0)])
def test_a_map_without_contacts_is_not_correlated(found: bool, expected: float) -> None:
    counting, rng, nothing = metric("contacts"), np.random.default_rng(0), np.zeros((1, 9, 5))
    counting.add(nothing, nothing, np.full((1, 9), -1))
    for at in range(9):
        moved = rng.normal(size=nothing.shape)
        labels = np.where(np.arange(9) == at, 1, -1)[None]
        counting.add(*((moved, nothing) if found else (nothing, moved)), labels)
    assert counting.value == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"metric": "masked-accuracy"}, "needs --mask-token"),
        ({"metric": "top1", "masking": Masking(token=1)}, "masked for the metrics masked-accuracy, pseudo-perplexity"),
        ({"metric": "top1", "labels": "masked"}, "but the metric is top1"),
        ({"metric": "contacts", "labels": "truth", "masking": Masking(token=1)}, "use top1 or perplexity"),
        ({"metric": "contacts", "masking": Masking(token=1, share=0.2)}, "one token at a time"),
    ],
)
def test_tokens_are_masked_for_their_metrics_only(kept: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Task(**kept)
    for wrong in ({"token": -1}, {"token": 1, "special": (-100,)}, {"token": 1, "share": 1.0}):
        with pytest.raises(InputError, match=r"ids of the tokenizer|between 0 and 1"):
            Masking(**wrong)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(masked_model(), "mlm.onnx")
    save_samples(tmp_path / "data", sequences(4, seed=1))
    save_samples(tmp_path / "unseen", sequences(3, seed=2))
    return tmp_path


def run(*args: object) -> Result:
    words = ("compare", "mlm.onnx", "--data", "data", "--eval", "unseen", "--schemes", "int8", *args)
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


MASKED = ("--mask-token", MASK, "--special-tokens", ",".join(map(str, SPECIAL)))


def test_the_command_line_masks_the_tokens_that_it_scores(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    right = count = 0
    for one in made(sequences(3, seed=2), task("masked-accuracy", 0.15)):
        (outputs,) = ort.run("mlm.onnx", [one.inputs])
        assert one.labels is not None
        right += int((outputs["logits"].argmax(-1) == one.labels).sum())
        count += int((one.labels >= 0).sum())
    result = run("--metric", "masked-accuracy", *MASKED, "-o", "r.json")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"{count} tokens were masked, each once, 15% at a time" in said and "3 evaluation samples" in said
    assert f"{right / count:.4f}" in said
    found = {row["scheme"]: row["value"] for row in json.loads(Path("r.json").read_text())["rows"]}
    assert found["FP32"] == pytest.approx(right / count)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--metric", "pseudo-perplexity"), "needs --mask-token"),
        (("--metric", "contacts", "--special-tokens", "1"), "need --mask-token"),
        (("--metric", "contacts", "--mask-token", MASK, "--special-tokens", "begin"), "ids with commas"),
        (
            ("--metric", "masked-accuracy", "--mask-token", MASK, "--special-tokens", ",".join(map(str, range(12)))),
            "No token of input_ids can be masked",
        ),
        (("--metric", "contacts", *MASKED, "--labels", "masked:words"), "Unknown integer input 'words'"),
        (("--metric", "contacts", "--mask-token", 9999), "does not take 9999, given as --mask-token"),
    ],
)
def test_what_cannot_be_masked_is_said(folder: Path, args: tuple[object, ...], message: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    result = run(*args)
    assert result.exit_code == 2 and message in result.stderr, result.output
