"""compare_placement: a file's operands against the plan's, and what it says of the differences."""

from __future__ import annotations

import importlib
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from graphs import build, node, normal
from onnx import helper, numpy_helper
from places import ROOT

from qdq.model.model import Model
from qdq.model.storage import save


def quantizing(model: Model, operands: dict[str, int]) -> onnx.ModelProto:
    """The model with a pair of Q and DQ in front of some operands, node -> index, as a peer writes it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    nodes = []
    for each in proto.graph.node:
        if each.name in operands:
            index = operands[each.name]
            source = each.input[index]
            nodes.append(helper.make_node("QuantizeLinear", [source, "scale"], [f"{each.name}_q"], output_dtype=3))
            nodes.append(helper.make_node("DequantizeLinear", [f"{each.name}_q", "scale"], [f"{each.name}_dq"]))
            each.input[index] = f"{each.name}_dq"
        nodes.append(each)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def said(
    model: Model,
    peer: onnx.ModelProto,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """What the tool prints."""
    save(model, tmp_path / "model.onnx")
    onnx.save(peer, tmp_path / "peer.onnx")
    words = ["compare_placement.py", str(tmp_path / "model.onnx"), str(tmp_path / "peer.onnx")]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    importlib.import_module("compare_placement").main()
    return capsys.readouterr().out


def test_no_difference_to_what_qdq_itself_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graphs.residual((1, 32, 6, 6))
    made = graphs.quantized(model, graphs.samples(model), compiler="tensorrt")
    text = said(model, made.model.proto, tmp_path, capsys, monkeypatch)
    assert "1 weighted nodes quantized by qdq, 1 by Model Optimizer, 1 by both" in text
    assert "0 different, 0 of them unexplained" in text


def test_each_difference_has_both_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        node("ConvTranspose", "x u", "a", strides=[2, 2]),
        node("InstanceNormalization", "a g g", "b"),
        node("Neg", "b", "y"),
    ]
    tensors = {"u": normal(32, 32, 2, 2), "g": normal(32)}
    model = build(nodes, {"x": (1, 32, 4, 4)}, tensors)
    text = said(model, quantizing(model, {"convtranspose": 0}), tmp_path, capsys, monkeypatch)
    (row,) = (line for line in text.splitlines() if "ConvTranspose's data" in line)
    assert "| Model Optimizer | 1: convtranspose:0 |" in row and "InstanceNormalization stands behind it" in row
    assert "a region starts at every convolution" in row
    assert "0 weighted nodes quantized by qdq" in text and "1 different, 0 of them unexplained" in text


def test_what_no_rule_explains_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build([node("Softmax", "x", "y")], {"x": (2, 8)})
    with pytest.raises(SystemExit) as stopped:
        said(model, quantizing(model, {"softmax": 0}), tmp_path, capsys, monkeypatch)
    assert stopped.value.code == 1
    assert "1 different, 1 of them unexplained" in capsys.readouterr().out
