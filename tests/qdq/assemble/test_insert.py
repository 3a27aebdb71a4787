"""Every case of `insert`'s table computes what real zero points would, and compiles to integer kernels."""

from __future__ import annotations

from collections.abc import Callable

import graphs
import numpy as np
import onnx
import pytest
from graphs import Made, build, node, normal, quantized
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from engines.backends import rtx
from engines.verify.audit import Audit, audit
from qdq.model.model import Model
from qdq.model.nodes import all_nodes

Builder = Callable[[], Model]


def case(make: Builder, shifted: bool) -> Made:
    """The model and its Q/DQ form, on samples that call for a shift or on others without one; nothing is clipped."""
    model = make()
    data = graphs.samples(model, low=0 if shifted else None)
    return quantized(model, data, shift=shifted, calibrator="max", equalize="none")


def gemm(**attributes: object) -> Model:
    return graphs.product("Gemm", bias=attributes.pop("bias", (8,)), **attributes)  # type: ignore[arg-type]


def computed_bias() -> Model:
    nodes = [node("Conv", "x w z", "y", pads=[1] * 4)]
    return build(nodes, {"x": (1, 4, 5, 5), "z": (8,)}, {"w": normal(8, 4, 3, 3)})


def two_readers() -> Model:
    """One tensor read by two Convs of equal padding, one of other padding, and a MatMul; one weight read twice."""
    nodes = [
        node("Conv", "x w", "a", name="one", pads=[1] * 4),
        node("Conv", "x w", "b", name="two", pads=[1] * 4),
        node("Conv", "x v", "c", name="three"),
        node("MatMul", "x m", "d"),
    ]
    tensors = {"w": normal(8, 4, 3, 3), "v": normal(8, 4, 1, 1), "m": normal(5, 3)}
    return build(nodes, {"x": (1, 4, 5, 5)}, tensors, outputs=("a", "b", "c", "d"))


# name: (model, whether the samples call for a shift, operators expected in front of the first weighted node)
CASES: dict[str, tuple[Builder, bool, str]] = {
    "A Conv": (lambda: graphs.conv(pads=[1] * 4), False, "QuantizeLinear DequantizeLinear"),
    "A MatMul": (graphs.product, False, "QuantizeLinear DequantizeLinear"),
    "B Conv": (graphs.conv, True, "Sub QuantizeLinear DequantizeLinear"),
    "B Conv without bias": (lambda: graphs.conv(bias=False), True, "Sub QuantizeLinear DequantizeLinear"),
    "B Conv with a computed bias": (
        computed_bias,
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "B MatMul": (graphs.product, True, "Sub QuantizeLinear DequantizeLinear"),
    "B MatMul 4-D": (
        lambda: graphs.product(data=(2, 3, 5, 6)),
        True,
        "Sub QuantizeLinear DequantizeLinear",
    ),
    "B MatMul batched": (
        lambda: graphs.product(weight=(3, 6, 8), data=(3, 5, 6)),
        True,
        "Sub QuantizeLinear DequantizeLinear",
    ),
    "B Gemm": (gemm, True, "Sub QuantizeLinear DequantizeLinear"),
    "B Gemm transposed": (
        lambda: gemm(weight=(8, 6), data=(6, 5), transA=1, transB=1),
        True,
        "Sub QuantizeLinear DequantizeLinear",
    ),
    "B Gemm alpha and beta": (
        lambda: gemm(alpha=0.5, beta=2.0),
        True,
        "Sub QuantizeLinear DequantizeLinear",
    ),
    "B Gemm beta without bias": (
        lambda: gemm(bias=None, alpha=0.5, beta=2.0),
        True,
        "Sub QuantizeLinear DequantizeLinear",
    ),
    "B Gemm bias of one row": (lambda: gemm(bias=(1, 8)), True, "Sub QuantizeLinear DequantizeLinear"),
    "B Gemm bias of one number": (lambda: gemm(bias=(1,)), True, "Sub QuantizeLinear DequantizeLinear"),
    "B Gemm bias of all rows": (lambda: gemm(bias=(5, 8)), True, "Sub QuantizeLinear DequantizeLinear"),
    "B Gemm bias of one column": (lambda: gemm(bias=(5, 1)), True, "Sub QuantizeLinear DequantizeLinear"),
    "C 1-D": (
        lambda: graphs.conv((8, 4, 3), (7,), pads=[1, 2]),
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "C 2-D": (
        lambda: graphs.conv(pads=[0, 1, 2, 0], strides=[2, 1]),
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "C 3-D": (
        lambda: graphs.conv((8, 4, 3, 3, 3), (5, 4, 6), pads=[1] * 6, dilations=[1, 2, 1]),
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "C grouped": (
        lambda: graphs.conv((8, 4, 3, 3), group=2, pads=[1] * 4),
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "C dynamic": (
        lambda: graphs.conv(spatial=("h", "w"), batch="n", pads=[1] * 4),
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "D symmetric": (graphs.residual, False, ""),
    "D shifted": (graphs.residual, True, ""),
    "E symmetric": (
        lambda: graphs.conv((8, 3, 3, 3), pads=[1] * 4),
        False,
        "Pad QuantizeLinear DequantizeLinear",
    ),
    "E unpadded": (lambda: graphs.conv((8, 3, 3, 3)), False, "Pad QuantizeLinear DequantizeLinear"),
    "E shifted 3-D": (
        lambda: graphs.conv((8, 5, 3, 3, 3), (5, 4, 6), pads=[1] * 6),
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "E dynamic": (
        lambda: graphs.conv((8, 1, 3, 3), ("h", "w"), batch="n", pads=[1] * 4),
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "F depthwise": (
        lambda: graphs.conv((8, 1, 3, 3), group=8, pads=[1, 0, 0, 2]),
        False,
        "Reshape Pad Reshape QuantizeLinear DequantizeLinear",
    ),
    "F shifted": (
        lambda: graphs.conv((8, 3, 3, 3), group=2, pads=[1] * 4, batch=2),
        True,
        "Reshape Pad Reshape Sub QuantizeLinear DequantizeLinear",
    ),
    "F dynamic batch": (
        lambda: graphs.conv((8, 1, 3), (7,), group=8, pads=[1, 1], batch="n"),
        True,
        "Reshape Pad Reshape Sub QuantizeLinear DequantizeLinear",
    ),
    "F dynamic size": (
        lambda: graphs.conv((8, 1, 3, 3), ("h", "w"), group=8, pads=[1] * 4),
        True,
        "Pad Sub QuantizeLinear DequantizeLinear",
    ),
    "several readers": (two_readers, True, "Pad Sub QuantizeLinear DequantizeLinear"),
    "a body": (graphs.conditional, False, "QuantizeLinear DequantizeLinear"),  # a comparison with zero decides
    "attention": (graphs.attention, True, "Sub QuantizeLinear DequantizeLinear"),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_real_zero_points(name: str) -> None:
    """Same codes, same weights: the difference is float32 rounding of sums that the shift makes larger.

    With n products per sum and a shift of at most 255 steps, |c| sum|w| <= 255 * n * max|w| * scale; its rounding at
    2^-24 each, over outputs of the size of the largest one, stays below 1e-5 of it for the tiny graphs here.
    """
    make, shifted, front = CASES[name]
    made = case(make, shifted)
    assert all((p.zero_point != 0) == shifted for p in made.solution.activations.values())
    ops = [n.op_type for n in made.model.graph.node]
    if front:
        assert ops[: len(front.split())] == front.split()
    model = made.float_model
    data = [graphs.off_ties(made, s) for s in graphs.samples(model, low=0 if shifted else None)]
    runs = (graphs.run(m, data) for m in (made.model, graphs.intended(made), model))
    for g, e, p in zip(*runs, strict=True):
        for output in e:
            largest = np.abs(e[output]).max()
            assert g[output].shape == p[output].shape
            assert np.abs(g[output] - e[output]).max() <= 1e-5 * largest
            assert np.abs(g[output] - p[output]).max() <= 0.1 * largest  # and it is the float model, quantized


@pytest.mark.parametrize("name", ["A Conv", "C 2-D", "B Gemm transposed", "F shifted"])
def test_onnx_reference_computes_the_same(name: str) -> None:
    make, shifted, _ = CASES[name]
    made = case(make, shifted)
    reference = ReferenceEvaluator(made.model.proto)
    for sample in graphs.samples(made.float_model, 2, low=0 if shifted else None):
        moved = graphs.off_ties(made, sample)
        (found,) = reference.run(None, moved)
        (expected,) = (o["y"] for o in graphs.run(made.model, [moved]))
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
@pytest.mark.parametrize("shifted", [True, False])
def test_equalized_channels_compute_the_same(kind: str, shifted: bool) -> None:
    powers = np.float32([1, 1e-2, 1e-2, 1e-2])
    if kind == "Conv":
        powers = powers.reshape(1, 4, 1, 1)
        model = graphs.conv(values=normal(8, 4, 3, 3) / powers, pads=[1] * 4)
    else:
        nodes = [node("MatMul", "x w", "y")]
        model = build(nodes, {"x": (2, 5, 4)}, {"w": normal(4, 8) / powers[:, None]})
    low = 0 if shifted else None
    made = quantized(model, [{"x": s["x"] * powers} for s in graphs.samples(model, low=low)], shift=shifted)
    assert made.solution.divisors.keys() == {"x"}
    assert (made.solution.activations["x"].zero_point != 0) == shifted
    data = [graphs.off_ties(made, {"x": s["x"] * powers}) for s in graphs.samples(model, 2, low=low, seed=11)]
    for got, expected in zip(graphs.run(made.model, data), graphs.run(graphs.intended(made), data), strict=True):
        assert np.abs(got["y"] - expected["y"]).max() <= 1e-5 * np.abs(expected["y"]).max()


@pytest.mark.parametrize("name", CASES)
def test_the_written_graph_keeps_its_contract(name: str) -> None:
    make, shifted, _ = CASES[name]
    made = case(make, shifted)
    proto, model = made.model.proto, made.float_model
    stored = {t.name: t for t in proto.graph.initializer}
    nodes = list(all_nodes(proto.graph))
    producers = {o: n for n in nodes for o in n.output}

    names = [n.name for n in nodes]
    tensors = [*stored, *(i.name for i in proto.graph.input), *(o for n in nodes for o in n.output)]
    assert len(set(names)) == len(names)
    assert len(set(tensors)) == len(tensors)
    assert [o.name for o in proto.graph.output] == [o.name for o in model.graph.output]

    read = {i for n in all_nodes(proto.graph) for i in n.input} | {o.name for o in proto.graph.output}
    assert stored.keys() <= read  # no float weight is left behind
    for node_name in made.plan.quantized_nodes:
        kernel = next(n for n in nodes if n.name == node_name)
        data, weight = (producers[i] for i in kernel.input[:2])
        assert (data.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert stored[weight.input[0]].data_type == TensorProto.INT8
        if len(kernel.input) > 2 and kernel.input[2] in stored:
            assert stored[kernel.input[2]].data_type == TensorProto.FLOAT  # biases are never quantized
    for n in nodes:
        if n.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, *zeros = (onnx.numpy_helper.to_array(stored[i]) for i in n.input[1:])
            assert (scale > 0).all()
            assert not any(zero.any() for zero in zeros)  # TensorRT reads zero point 0 only
            assert [zero.shape for zero in zeros] == [scale.shape] or stored[n.input[0]].dims[2:]  # a stack of matrices
    outputs = {o.name for o in proto.graph.output}
    assert not any(producers[o].op_type == "DequantizeLinear" for o in outputs)

    made_again = case(make, shifted)
    assert made_again.model.proto.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    assert made.model.sha256 == model.sha256


def test_names_that_the_model_already_uses_are_avoided() -> None:
    nodes = [
        node("Relu", "x", "x_scale", name="x_QuantizeLinear"),
        node("Conv", "x w", "x_DequantizeLinear", name="w_scale"),
        node("Add", "x_DequantizeLinear x_scale", "y"),
    ]
    model = build(nodes, {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 1, 1)})
    data = graphs.samples(model, low=0)
    made = quantized(model, data)
    moved = [graphs.off_ties(made, s) for s in data]
    for got, expected in zip(graphs.run(made.model, moved), graphs.run(graphs.intended(made), moved), strict=True):
        assert np.abs(got["y"] - expected["y"]).max() <= 1e-5 * np.abs(expected["y"]).max()


def test_a_tensor_is_quantized_once_per_border_and_a_weight_once() -> None:
    ops = [n.op_type for n in case(two_readers, True).model.graph.node]
    assert ops.count("QuantizeLinear") == 2  # padded for two Convs, as it is for the Conv 1x1 and the MatMul
    assert ops.count("DequantizeLinear") == 2 + 3


def test_a_symmetric_shortcut_reuses_the_dequantized_tensor_of_its_convolution() -> None:
    nodes = {n.name: n for n in case(graphs.residual, False).model.graph.node}
    assert nodes["add"].input[1] == nodes["conv"].input[0]


def test_an_unquantized_reader_keeps_the_float_weight() -> None:
    nodes = [node("Conv", "x w", "a"), node("Mul", "a w", "y")]
    model = build(nodes, {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 1, 1)})
    made = quantized(model, graphs.samples(model))
    assert {"w", "w_quantized"} <= made.model.initializers.keys()


@pytest.mark.parametrize("shifted", [True, False])
def test_float16_models_stay_float16_and_lose_little(shifted: bool) -> None:
    made = case(lambda: graphs.conv(pads=[1] * 4, dtype="float16"), shifted)
    kinds = {t.data_type for t in made.model.graph.initializer}
    assert kinds <= {TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT64}
    data = graphs.samples(made.float_model, 2, low=0 if shifted else None)
    for got, plain in zip(graphs.run(made.model, data), graphs.run(made.float_model, data), strict=True):
        assert got["y"].dtype == np.float16
        error, signal = got["y"].astype(float) - plain["y"], plain["y"].astype(float)
        assert np.sum(error**2) < 1e-3 * np.sum(signal**2)  # 30 dB


# name: (model, shifted); built for SM89 together with the float weights they replace
ENGINES: dict[str, tuple[Builder, bool]] = {
    "A": (lambda: graphs.conv(pads=[1] * 4), False),
    "B": (gemm, True),
    "C": (lambda: graphs.conv((8, 4, 3, 3, 3), (6, 6, 6), pads=[1] * 6), True),
    "D": (graphs.residual, True),
    "E three channels": (lambda: graphs.conv((8, 3, 3, 3), (64, 64), pads=[1] * 4), False),
    "E five channels": (lambda: graphs.conv((8, 5, 3, 3, 3), (16, 16, 16), pads=[1] * 6), True),
    "F depthwise": (lambda: graphs.conv((16, 1, 3, 3), (32, 32), group=16, pads=[1] * 4), True),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_compiler_runs_every_multiply_add_in_int8_and_stores_no_large_constant(name: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    make, shifted = ENGINES[name]
    made = case(make, shifted)
    found = compiled(made)
    assert found.int8_share == 1.0
    assert not found.suspect
    # a constant of zeros as large as the added channels of the input would weigh 4 KB (E, 2-D) and more (E 3-D, F)
    weights = sum(np.prod(t.dims, dtype=int) for t in made.model.graph.initializer)
    assert found.weight_bytes < 4 * weights + 2048


def compiled(made: Made) -> Audit:
    engine = rtx.build(made.model.proto, targets=["sm89"])
    return audit(made.model.proto, engine.table)
