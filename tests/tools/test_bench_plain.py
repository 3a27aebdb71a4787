"""Networks built in code: valid, finite, scored on other samples than they are calibrated on, and judged fairly."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import onnx
import pytest
from places import ROOT

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench_plain")


def test_every_network_is_valid_and_its_outputs_vary(bench: ModuleType) -> None:
    for name, make in bench.NETWORKS.items():
        built = make(0)
        onnx.checker.check_model(built.model, full_check=True)
        for values in bench.outputs(built.model, built).values():
            assert np.isfinite(values).all() and values.std() > 1e-6, name


def test_samples_to_score_on_are_others(bench: ModuleType) -> None:
    built = bench.NETWORKS["tiny_head"](0)
    seen = {sample["x"].tobytes() for sample in built.calibration}
    assert len(seen) == len(built.calibration)
    assert not seen & {sample["x"].tobytes() for sample in built.evaluation}


def test_the_worst_output_counts(bench: ModuleType) -> None:
    wanted = {"a": np.array([1.0, 1.0]), "b": np.array([1.0, 1.0])}
    found = {"a": np.array([1.1, 1.1]), "b": np.array([1.01, 0.99])}
    assert bench.decibels(wanted, found) == pytest.approx({"a": 20.0, "b": 40.0})


def test_defaults_are_no_worse_than_plain_ranges(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> None:
    built = bench.NETWORKS["tiny_head"](2)
    path = tmp_path_factory.mktemp("plain") / "net.onnx"
    onnx.save(built.model, path)
    wanted = bench.outputs(built.model, built)
    plain, ours = (
        bench.decibels(wanted, bench.outputs(bench.shipped(built, settings, path), built))
        for settings in (bench.PLAIN, bench.Settings())
    )
    assert ours["two"] > plain["two"] - 0.3
