"""The table of exports: whose turn which variant is, what samples hold, how a deployment is judged; without torch."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from models import images, save_samples, segmenter
from onnx import TensorProto, helper, numpy_helper
from places import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench_exports")


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("export_networks")


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("networks")


def test_sixty_networks_share_the_variants_evenly(networks: ModuleType) -> None:
    turns = [networks.variant_of(name) for name in networks.NETWORKS]
    assert len(turns) == 60 and set(turns) == set(networks.VARIANTS) and len(networks.VARIANTS) == 8
    assert all(turns.count(variant) >= 5 for variant in networks.VARIANTS)
    for family in ("monai_", "hf_"):
        words = {
            word
            for name in networks.NETWORKS
            if name.startswith(family)
            for word in networks.variant_of(name).split(".")
        }
        assert words == {"static", "dynamic", "float", "half", "script", "dynamo"}


def test_samples_have_the_shapes_and_types_of_the_variant(networks: ModuleType, export: ModuleType) -> None:
    for network in networks.NETWORKS.values():
        fixed, open_sizes = (
            export.samples(network, "static.half.script"),
            export.samples(network, "dynamic.float.dynamo"),
        )
        for name, given in network.inputs.items():
            assert len({sample[name].shape for sample in fixed}) == 1
            assert (len({sample[name].shape for sample in open_sizes}) > 1) == any(
                isinstance(n, str) for n in given.shape
            )
            assert {sample[name].dtype for sample in fixed} <= {np.dtype(np.float16), np.dtype(np.int64)}
            assert all(
                np.isfinite(sample[name]).all() and sample[name].ndim == len(given.shape) for sample in open_sizes
            )
            if given.values == "tokens":
                assert all(sample[name].min() >= 0 and sample[name].max() < given.most for sample in open_sizes)


def test_linear_layers_are_those_with_a_constant_operand(bench: ModuleType, tmp_path: Path) -> None:
    weight = np.ones((4, 4), np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["w_"]),
        helper.make_node("Transpose", ["w_"], ["wt"]),
        helper.make_node("MatMul", ["x", "wt"], ["a"], name="linear"),
        helper.make_node("MatMul", ["a", "x"], ["y"], name="attention"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4, 4)) for name in "xy"]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(0.5), "scale")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], constants)), tmp_path / "m.onnx")
    assert bench.linear(tmp_path / "m.onnx") == {"linear"}


def test_the_ratio_is_that_of_outputs_whose_shapes_agree(bench: ModuleType) -> None:
    wanted = [{"y": np.full(10, 2.0), "n": np.arange(3)}, {"y": np.ones(4), "n": np.arange(3)}]
    got = [{"y": np.full(10, 2.2), "n": np.arange(3)}, {"y": np.ones(5), "n": np.arange(3)}]
    assert bench.sqnr(wanted, got) == {"y": 20.0}
    assert bench.sqnr(wanted, wanted) == {"y": np.inf}


def test_what_must_not_be_is_said(bench: ModuleType) -> None:
    good = {"code": 0, "printed": "", "said": {"y": 30.0, "z": np.inf}, "own": {"y": 30.4, "z": np.inf}}
    assert bench.faults(good) == [] and bench.apart(good) == pytest.approx(0.4)
    assert bench.faults({**good, "own": {"y": 29.0}}) == ["SQNR is 1.0 dB off"]
    assert bench.faults({**good, "own": {"y": np.nan}}) == ["SQNR is nan dB off"]
    assert bench.faults({"code": 2, "printed": "Error: node x"}) == []
    assert bench.faults({"code": 1, "printed": "Traceback (most recent call last):"}) == ["exit code 1", "traceback"]


def test_a_file_is_deployed_judged_and_shown(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    for name, model in {"net.static.float.script": segmenter(), "half.static.half.script": None}.items():
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString() if model else b"none")
        save_samples(tmp_path / name, images(2))
    onnx.save(segmenter(), tmp_path / "unfinished.static.float.script.onnx")  # without samples
    monkeypatch.setattr(sys, "argv", ["bench_exports.py", "deploy", str(tmp_path)])
    assert bench.main() == 0
    result = json.loads((tmp_path / "net.static.float.script.json").read_text())
    assert result["code"] == 0 and bench.apart(result) < 0.5 and result["said"].keys() == result["own"].keys()
    assert not (tmp_path / "unfinished.static.float.script.json").exists()
    monkeypatch.setattr(bench, "deployed", lambda *args: pytest.fail("deployed again"))
    monkeypatch.setattr(sys, "argv", ["bench_exports.py", "table", str(tmp_path)])
    capsys.readouterr()
    assert bench.main() == 0
    said = capsys.readouterr().out
    assert (
        "| half | static, half, script | 2 |" in said and "1 of 2 files of 2 networks end with 0 (1 networks)." in said
    )
