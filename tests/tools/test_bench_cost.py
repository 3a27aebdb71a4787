"""The bench of predicted times: its fit on rows made by hand, and that the committed constants are those it makes."""

from __future__ import annotations

import gzip
import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from places import ROOT

from engines.cost.constants import CONSTANTS

SHARED = Path(os.environ.get("QDQ_SHARED", "/nowhere")) / "data"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench_cost")


class Line:
    """A model of two constants: a start, and a time per piece of work."""

    priors: ClassVar = {"start": (2.0, 0.5), "each": (1.0, 0.5)}

    def __init__(self, work: np.ndarray) -> None:
        self.work = work

    def __call__(self, values: dict[str, float]) -> np.ndarray:
        return values["start"] + values["each"] * self.work


class Seen:
    """As much of a row as the fit asks for."""

    def __init__(self, us: float, gpu: str, precision: str = "fp16", pair: tuple[str, ...] = ()) -> None:
        self.measured_us, self.gpu_name, self.precision, self.pair = us, gpu, precision, pair
        self.family = self.group = gpu


def test_the_fit_finds_constants_and_a_wild_row_pulls_little(bench: ModuleType) -> None:
    work = np.array([1.0, 2, 5, 10, 20, 50, 100, 200])
    times = 3.0 + 0.7 * work
    rows = [Seen(us, "a") for us in times]
    found = bench.fitted(Line(work), rows, np.ones(8, bool))
    assert found["start"] == pytest.approx(3.0, rel=0.05) and found["each"] == pytest.approx(0.7, rel=0.02)
    rows[3] = Seen(100 * times[3], "a")
    assert bench.fitted(Line(work), rows, np.ones(8, bool))["each"] == pytest.approx(0.7, rel=0.06)


def test_rows_that_are_left_out_have_no_part_in_their_constants(bench: ModuleType) -> None:
    work = np.array([1.0, 10, 100, 1, 10, 100])
    rows = [Seen(3 + 0.7 * w, "a") for w in work[:3]] + [Seen(1 + 1.4 * w, "b") for w in work[3:]]
    model = Line(work)
    found = bench.left_out(model, rows, [row.gpu_name for row in rows])
    mask = np.array([row.gpu_name == "b" for row in rows])
    assert found[:3] == pytest.approx(model(bench.fitted(model, rows, mask))[:3])
    assert found[3:] == pytest.approx(model(bench.fitted(model, rows, ~mask))[3:])


def test_launches_count_only_where_the_host_launched_every_kernel(bench: ModuleType) -> None:
    model = Line(np.array([1.0, 1.0]))
    model.kernels = np.array([10.0, 20.0])
    rows = [Seen(1.0, "a"), Seen(1.0, "a")]
    rows[0].launched, rows[1].launched = False, True
    launched = bench.Launched(model, rows)
    assert launched({"start": 2.0, "each": 1.0, "launch_us": 0.5}).tolist() == [3.0, 13.0]
    assert launched.priors.keys() == {"start", "each", "launch_us"}


def test_the_score(bench: ModuleType) -> None:
    pairs = [("x",), ("x",), ("y",), ("y",)]
    rows = [Seen(us, "a", p, pair) for us, p, pair in zip((5, 10, 30, 20), ("int8", "fp16") * 2, pairs, strict=True)]
    score = bench.score(rows, np.array([6.0, 10, 30, 30]))
    assert (score.rows, score.pairs) == (4, 2) and score.error == pytest.approx(0.1)
    # ratios .6 and 1 beside .5 and 1.5
    assert score.ratio_error == pytest.approx((0.2 + 1 / 3) / 2) and score.ratio_sign == 1.0
    assert score.rank == pytest.approx(np.corrcoef([1, 2, 3.5, 3.5], [1, 2, 4, 3])[0, 1])


def test_one_factor_of_four_points(bench: ModuleType) -> None:
    rows = [Seen(10.0 * i, "a") for i in range(1, 9)] + [Seen(1.0, "few")]
    predicted = np.array([5.0 * i for i in range(1, 9)] + [7.0])
    assert bench.corrected(rows, predicted) == pytest.approx(0, abs=1e-12)
    predicted[0] *= 2
    assert 0 < bench.corrected(rows, predicted) < 0.2


def test_two_factors_of_four_points(bench: ModuleType) -> None:
    """A GPU whose starts take twice as long as predicted: one factor cannot say so."""
    work, starts = np.linspace(1, 100, 12), np.full(12, 20.0)
    rows = [Seen(us, "a") for us in work + 2 * starts]
    assert bench.corrected(rows, work + starts) > 0.1
    assert bench.corrected(rows, work + starts, starts) < 0.05


def test_launches_are_starts(bench: ModuleType) -> None:
    model = Line(np.array([1.0, 1.0]))
    model.kernels, model.starts = np.array([10.0, 20.0]), lambda values: np.array([2.0, 2.0])
    rows = [Seen(1.0, "a"), Seen(1.0, "a")]
    rows[0].launched, rows[1].launched = False, True
    launched = bench.Launched(model, rows)
    assert launched.starts({"start": 2.0, "each": 1.0, "launch_us": 0.5}).tolist() == [2.0, 12.0]


def test_a_family_with_few_rows_gets_no_error(bench: ModuleType) -> None:
    rows = [Seen(10.0, "x") for _ in range(12)] + [Seen(10.0, "y") for _ in range(9)]
    for row in rows:
        row.family = {"x": "convolutions", "y": "transformers"}[row.gpu_name]
    found = bench.errors(rows, np.array([11.0] * 12 + [20.0] * 9))
    assert found["convolutions"][:2] == (12, pytest.approx(0.1)) and np.isnan(found["transformers"][1])
    text = bench.source({"rate": 0.5}, found)
    assert '"convolutions": Expected(rows=12, time=0.10, pairs=0, ratio=None)' in text and "rate=0.5," in text


def test_rows_are_read_with_the_kernels_that_are_most_like(bench: ModuleType, tmp_path: Path) -> None:
    def entry(precision: str, size: str, target: str = "sm89") -> dict[str, object]:
        batch = int(size)
        act = [["float16", [batch, 64, 56, 56]]]
        conv = {
            "name": "/c_myl0_1",
            "kind": "correlation",
            "dtype": "float16",
            "macs": 0,
            "inputs": act,
            "outputs": act,
        }
        conv["constants"] = [["float16", [64, 64, 3, 3]]]
        return {"model": "net", "precision": precision, "target": target, "batch_and_size": size, "kernels": [conv]}

    tables = [entry("fp16", "1"), entry("fp16", "8"), entry("fp16", "1", "sm75")]
    (tmp_path / "kernel_tables.json.gz").write_bytes(gzip.compress(json.dumps(tables).encode()))
    names = "source_url,gpu,sm,model,shape,batch,precision,tool_version,measured_ms,quality,family"
    lines = [
        "u,a100,sm80,net,224x224,4,fp16,TensorRT 8,1.5,clean,cnn",
        "u,a100,sm80,net,224x224,4,int8,TensorRT 8,0.9,clean,cnn",
        "u,t4,sm75,net,224x224,2,fp16,TensorRT 8,3,host,cnn",
        "u,a100,sm80,other,224x224,4,fp16,TensorRT 8,1,clean,cnn",
        "u,k80,sm37,net,224x224,4,fp16,TensorRT 8,1,clean,cnn",
    ]
    (tmp_path / "published_latencies.csv").write_text("\n".join([names, *lines]))
    rows, others = bench.read_rows(tmp_path)
    assert others == ["no kernels of other", "unknown GPU k80"]
    assert [(r.table.size, r.table.target, r.scale) for r in rows] == [
        (8, "sm89", 0.5),
        (8, "sm89", 0.5),
        (1, "sm75", 2),
    ]
    assert bench.ratio_pairs(rows) == [(1, 0)]
    (half, quantizer), (whole,) = rows[1].tensorrt, rows[0].tensorrt
    assert (half.dtype, half.work.read, half.work.macs) == ("int8", whole.work.read / 2, 4 * 56 * 56 * 64 * 576)
    assert (quantizer.work.read, quantizer.work.written) == (whole.work.read, whole.work.read / 2)


@pytest.mark.skipif(not (SHARED / "kernel_tables.json.gz").exists(), reason="no published latencies in $QDQ_SHARED")
def test_the_committed_constants_are_those_that_the_tool_makes(bench: ModuleType) -> None:
    rows = [row for row in bench.read_rows(SHARED)[0] if row.quality == "clean"]
    assert len(rows) > 200 and {row.family for row in rows} >= {"transformers", "convolutions"}
    made = bench.fitted(bench.Launched(bench.Ours(rows), rows), rows, np.ones(len(rows), bool))
    assert made.pop("launch_us") > 0
    for name, value in made.items():
        assert getattr(CONSTANTS, name) == pytest.approx(value, rel=0.02), name
