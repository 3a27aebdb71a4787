"""Odd models through the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import node, normal
from models import save_samples
from odd_models import (
    FLOAT,
    input_is_output,
    nameless,
    net,
    odd_bodies,
    repeated_names,
    unread_outputs,
    unsorted,
    untrue_infos,
    value,
)
from onnx import helper, numpy_helper

from qdq.cli.main import main


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an odd model, whose weights lie in a side file, and samples; the current directory."""
    monkeypatch.chdir(tmp_path)
    proto = net()
    for make in (unread_outputs, odd_bodies, untrue_infos, input_is_output, repeated_names, unsorted, nameless):
        make(proto)
    onnx.save(proto, "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64)
    rng = np.random.default_rng(3)
    save_samples(tmp_path / "data", [{"x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(3)])
    return tmp_path


def test_every_verb_takes_an_odd_model_with_weights_beside_it(odd: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in odd.glob("m.*")}
    for command in (
        "plan m.onnx",
        "calibrate m.onnx --data data -o t.json",
        "quantize m.onnx --data data --rest fp32 -o q.onnx",
        "check m.onnx q.onnx --data data",
        "explain m.onnx same",
        "build m.onnx -o m.engine",
        "audit m.onnx",
        "audit m.engine",
        "check m.onnx m.onnx --data data --as-compiled",
        "compare m.onnx --data data --schemes int8",
        "deploy m.onnx --data data --tune off --out out",
        "lint m.onnx",
    ):
        result = CliRunner().invoke(main, command.split())
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in odd.glob("m.[od]*")} == files


def test_lint_looks_into_functions(tmp_path: Path) -> None:
    proto = net()
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    proto.graph.initializer.append(numpy_helper.from_array(np.uint8(0), "zero"))
    pair = [node("QuantizeLinear", "x s z", "q", "quantize"), node("DequantizeLinear", "q s z", "d", "dequantize")]
    proto.functions.append(
        helper.make_function("mine", "Pair", ["x", "s", "z"], ["d"], pair, [helper.make_opsetid("", 17)])
    )
    proto.graph.node[0].input[0] = "d"
    proto.graph.node.insert(0, helper.make_node("Pair", ["x", "scale", "zero"], ["d"], "call", domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    onnx.save(proto, tmp_path / "q.onnx")
    result = CliRunner().invoke(main, ["lint", str(tmp_path / "q.onnx")])
    assert result.exit_code == 1 and "quantize | call (Pair)" in result.output
    fixed = CliRunner().invoke(main, ["lint", str(tmp_path / "q.onnx"), "--fix", "-o", str(tmp_path / "f.onnx")])
    assert fixed.exit_code == 0, fixed.output


def test_a_model_of_empty_arrays_is_quantized(tmp_path: Path) -> None:
    """A cache that is empty before the first step, beside an input that is not."""
    nodes = [node("MatMul", "x w", "h"), node("Concat", "past h", "y", axis=1)]
    ends = [value("x", FLOAT, ["b", "t", 8]), value("past", FLOAT, ["b", "p", 8])], [value("y", FLOAT, None)]
    graph = helper.make_graph(nodes, "cache", *ends, [numpy_helper.from_array(normal(8, 8), "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    samples = [{"x": normal(1, 3, 8, seed=i), "past": normal(1, i, 8, seed=i)} for i in range(3)]
    save_samples(tmp_path / "data", samples)
    paths = [str(tmp_path / name) for name in ("m.onnx", "data", "q.onnx")]
    result = CliRunner().invoke(main, ["quantize", paths[0], "--data", paths[1], "-o", paths[2]])
    assert result.exit_code == 0 and "1 nodes in INT8" in result.output, result.output
