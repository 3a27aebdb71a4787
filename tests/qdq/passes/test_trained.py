"""Quantizers that a model came with are read and taken out, whatever toolkit wrote them."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import run
from onnx import TensorProto, helper, numpy_helper
from qat_models import FORMS, Form, four_bits, images, in_tensorrts, qat

from qdq.core.errors import ModelError
from qdq.model.model import Model
from qdq.model.storage import is_quantized, load
from qdq.passes.prepare import load_float

ALL = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


def trained(form: Form) -> Model:
    model = load_float(qat(form))
    assert model.trained is not None
    return model


@ALL
def test_no_quantizer_is_left_and_all_are_known(form: Form) -> None:
    model = trained(form)
    assert not is_quantized(model) and model.trained is not None
    products = {"/c1/Conv", "/c2/Conv", "/y/Gemm" if form.linear == "gemm" else "/y/MatMul"}
    expected = products - ({"/y/Gemm"} if form.skip else set())
    assert model.trained.weights.keys() == expected
    assert {name.partition(":")[0] for name in model.trained.operands} == expected
    fmt = "fp8" if form.eight else "int8"
    assert {g.format for g in (*model.trained.tensors.values(), *model.trained.weights.values())} == {fmt}


@ALL
def test_weights_have_the_values_of_their_codes(form: Form) -> None:
    """Without quantizers on the data the outputs are near those with them: 8 bits of rounding, no more."""
    model, data = trained(form), images(half=form.half)
    before = [out["y"].astype(np.float64) for out in run(qat(form), data)]
    after = [out["y"].astype(np.float64) for out in run(model, data)]
    noise = sum(((a - b) ** 2).sum() for a, b in zip(before, after, strict=True))
    assert 10 * np.log10(sum((a**2).sum() for a in before) / noise) > (18 if form.eight else 25)


def test_grids_are_those_of_int8() -> None:
    model = trained(FORMS["torch.ao"])
    assert model.trained is not None
    grid = model.trained.operands["/c1/Conv:0"]
    assert grid.scale == pytest.approx(0.03) and grid.zero_point == 121 - 128
    weights = model.trained.weights["/c1/Conv"]
    assert weights.scale.shape == (8,) and np.allclose(weights.largest, weights.scale * 127, rtol=1e-3)
    channels = trained(FORMS["scales of channels"]).trained
    assert channels is not None and channels.operands["/c2/Conv:0"].scale == pytest.approx(0.04)


def test_a_relu_that_lives_on_in_a_quantizer_stays() -> None:
    """ONNX Runtime drops a Relu in front of a Q that begins at 0."""
    node = helper.make_node
    values = {"s": np.float32(0.02), "z": np.uint8(0), "w": np.eye(4, dtype=np.float32)}
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in values.items()]
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "first"),
        node("QuantizeLinear", ["h", "s", "z"], ["q"], "Q"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], "DQ"),
        node("MatMul", ["d", "w"], ["y"], "second"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "xy"]
    proto = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors), ir_version=9)
    proto.opset_import[0].version = 17
    model = load_float(proto)
    x = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(run(model, [{"x": x}])[0]["y"], np.maximum(x, 0))


def test_what_cannot_be_read_back_is_refused() -> None:
    scale = helper.make_tensor_value_info("given", TensorProto.FLOAT, [])
    proto = qat("pytorch-quantization")
    proto.graph.input.append(scale)
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] == "x_in.scale":
            node.input[1] = "given"
    with pytest.raises(ModelError, match="quantized already, in a way that cannot be read back"):
        load_float(proto)
    integer = helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"], "dynamic")
    other = qat("part of it")
    other.graph.node.insert(0, integer)
    other.graph.output.append(helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 3, 12, 12]))
    with pytest.raises(ModelError, match="integer operators"):
        load_float(other)


@pytest.mark.parametrize("traced", [True, False])
def test_quantizers_by_tensorrts_own_names_are_the_standards(traced: bool) -> None:
    given, data = FORMS["fp8"], images()
    plain, own = load(qat(given)), load(in_tensorrts(qat(given), traced=traced))
    assert not any(n.domain for n in own.graph.node) and [o.domain for o in own.proto.opset_import] == [""]
    for a, b in zip(run(plain, data), run(own, data), strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])
    found, wanted = load_float(in_tensorrts(qat(given), traced=traced)).trained, trained(given).trained
    assert found is not None and wanted is not None
    assert dict(found.tensors) == dict(wanted.tensors) and found.weights.keys() == wanted.weights.keys()


def test_stored_bytes_are_fp8_codes_in_an_older_opset() -> None:
    codes = np.array([0x38, 0x40, 0xC0, 0x7E], np.uint8).view(np.int8)  # 1, 2, -2, 448
    tensors = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(np.float32(0.5), "s")]
    nodes = [
        helper.make_node("TRT_FP8DequantizeLinear", ["w", "s"], ["d"], domain="trt"),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("trt", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    outputs = run(load(proto), [{"x": np.zeros(4, np.float32)}])
    assert outputs[0]["y"].tolist() == [0.5, 1, -1, 224]


@pytest.mark.parametrize("traced", [True, False])
def test_blocks_of_four_bits_have_the_values_of_their_codes(traced: bool) -> None:
    proto, weight = four_bits(traced=traced)
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    for model in (load(proto), load_float(proto)):
        np.testing.assert_allclose(run(model, [{"x": x}])[0]["y"], x @ weight.T, rtol=1e-4, atol=1e-5)
