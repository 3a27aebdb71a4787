"""FP16 and BF16 for what stays unquantized: types, kept nodes with their rules, and values against float32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import graphs
import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import build, node, quantized
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.core import arithmetic, onnx_runtime as ort
from qdq.assemble.finish import finish
from qdq.assemble.precision.convert import Converted, convert
from qdq.assemble.precision.shift import compensate, rounded, steady
from qdq.core.errors import InputError
from qdq.measure.histogram import Histogram
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.model.nodes import all_nodes
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.settings import Settings

HALF = 2.0**-11  # relative rounding of float16


def run(model: Model, **inputs: np.ndarray) -> np.ndarray:
    """The first output in ONNX Runtime, as float32."""
    (values,) = ort.run(model.proto, [inputs])
    return np.asarray(next(iter(values.values())), np.float32)


def rules(made: Converted) -> dict[str, str]:
    return {s.node: s.rule for s in made.kept}


def types(model: Model) -> dict[str, str]:
    """Name -> type of every tensor, as full inference finds them; the checker passes."""
    onnx.checker.check_model(model.proto, full_check=True)
    found = onnx.shape_inference.infer_shapes(model.proto, strict_mode=True).graph
    named = {v.name: v.type.tensor_type.elem_type for v in (*found.value_info, *found.input, *found.output)}
    named |= {t.name: t.data_type for t in found.initializer}
    for value in model.graph.value_info:  # what the file says is what inference says
        assert value.type.tensor_type.elem_type == named[value.name]
    return {name: str(TensorProto.DataType.Name(kind)) for name, kind in named.items()}


def check_form(model: Model) -> None:
    """Sorted, names unique, and no Cast reads a Cast."""
    known = {v.name for v in model.graph.input} | set(model.initializers)
    for entry in model.graph.node:
        assert all(name in known for name in entry.input if name), f"{entry.name} comes too early"
        known.update(entry.output)
    names = [n.name for n in all_nodes(model.graph)]
    assert len(names) == len(set(names)) and all(names)
    outputs = [name for n in model.graph.node for name in n.output]
    assert len(outputs) == len(set(outputs))
    casts = {n.output[0] for n in model.graph.node if n.op_type == "Cast"}
    assert not any(n.op_type == "Cast" and n.input[0] in casts for n in model.graph.node)


def casts(model: Model) -> int:
    return sum(n.op_type == "Cast" for n in model.graph.node)


def measured(model: Model, **amax: float) -> CalibrationTable:
    tensors = {name: Histogram.of(np.array([0.0, value], np.float32)) for name, value in amax.items()}
    return CalibrationTable(model_sha256=model.sha256, samples_sha256="", count=1, tensors=tensors)


def convolution() -> Model:
    rng = np.random.default_rng(0)
    tensors = {"w": rng.normal(size=(8, 4, 3, 3)).astype(np.float32), "b": rng.normal(size=8).astype(np.float32)}
    nodes = [node("Conv", "x w b", "a", pads=[1, 1, 1, 1]), node("Relu", "a", "y")]
    return build(nodes, {"x": (1, 4, 6, 6)}, tensors)


def pointwise(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **tensors: np.ndarray) -> Model:
    return build(list(nodes), {"x": (2, 16)}, tensors, outputs=outputs)


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


WEIGHT = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
X = np.random.default_rng(2).normal(size=(2, 16)).astype(np.float32)


def test_everything_becomes_float16_between_two_casts() -> None:
    model = convolution()
    made = convert(model)
    found = types(made.model)
    check_form(made.model)
    assert found["x"] == found["y"] == "FLOAT" and found["w"] == found["b"] == found["a"] == "FLOAT16"
    assert casts(made.model) == 2 and made.kept == () and made.model.opset == 21
    x = np.random.default_rng(3).normal(size=(1, 4, 6, 6)).astype(np.float32)
    # each product of 36 is off by at most 2 roundings of its factors, the result by 1: 3 * 2^-11 * sum |w x|
    bound = (
        3
        * HALF
        * run(
            build(
                [node("Conv", "x w b", "y", pads=[1, 1, 1, 1])],
                {"x": (1, 4, 6, 6)},
                {"w": np.abs(model.array("w")), "b": np.abs(model.array("b"))},
            ),
            x=np.abs(x),
        )
    )
    error = np.abs(run(made.model, x=x) - run(model, x=x))
    assert (error <= bound).all() and error.max() > 0


def test_inputs_and_outputs_change_when_asked() -> None:
    made = convert(convolution(), keep_io=False)
    found = types(made.model)
    assert {found[n] for n in "xwbay"} == {"FLOAT16"} and casts(made.model) == 0


def test_fp32_changes_nothing_and_other_words_are_refused() -> None:
    model = convolution()
    assert convert(model, unquantized_type="fp32").model is model
    with pytest.raises(InputError, match=r"Unknown type for what is not quantized 'fp61'.*Did you mean 'fp16'"):
        convert(model, unquantized_type="fp61")


def test_the_model_given_is_not_changed_and_the_result_is_the_same_each_time() -> None:
    model = convolution()
    before = model.proto.SerializeToString(deterministic=True)
    first, second = (convert(model).model.proto.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second and model.proto.SerializeToString(deterministic=True) == before


def test_bfloat16_raises_the_opset_and_keeps_what_has_no_bfloat16() -> None:
    nodes = [node("Conv", "x w b", "a"), node("Celu", "a", "c"), node("ConvTranspose", "c v", "y")]
    rng = np.random.default_rng(0)
    tensors = {
        k: rng.normal(size=s).astype(np.float32) for k, s in {"w": (8, 4, 3, 3), "b": (8,), "v": (8, 4, 2, 2)}.items()
    }
    model = build(nodes, {"x": (1, 4, 6, 6)}, tensors)
    made = convert(model, unquantized_type="bf16")
    found = types(made.model)
    assert made.model.opset == 22 and found["a"] == found["w"] == "BFLOAT16"
    assert rules(made) == {"celu": "schema", "convtranspose": "compiler"} and found["c"] == found["v"] == "FLOAT"
    assert "TensorRT-RTX does not compile it in BF16" in made.kept[1].reason


def rms_norm() -> Model:
    nodes = [
        node("Pow", "x two", "square"),
        node("ReduceMean", "square axes", "mean"),
        node("Add", "mean epsilon", "sum"),
        node("Sqrt", "sum", "root"),
        node("Div", "x root", "normal"),
        node("Mul", "normal gamma", "scaled"),
        node("MatMul", "scaled w", "y"),
    ]
    return pointwise(
        *nodes,
        two=number(2),
        axes=np.array([-1], np.int64),
        epsilon=number(1e-6),
        gamma=np.linspace(0.5, 1.5, 16, dtype=np.float32),
        w=WEIGHT,
    )


def test_a_decomposed_norm_survives_values_whose_squares_overflow() -> None:
    model, x = rms_norm(), 400 * X  # 400^2 = 160000 > 65504
    made = convert(model)
    check_form(made.model)
    assert rules(made) == {"pow": "power", "reducemean": "wide", "add": "wide", "sqrt": "wide", "div": "statistic"}
    assert types(made.model)["scaled"] == types(made.model)["w"] == "FLOAT16"
    want, got = run(model, x=x), run(made.model, x=x)
    assert np.abs(got - want).max() < 4 * HALF * np.abs(want).max() * 4  # 16 products of rounded factors, sqrt(16) grow


def test_a_mean_written_as_a_sum_keeps_its_normalization_only() -> None:
    model = pointwise(
        node("ReduceSum", "x axes", "s"),
        node("Mul", "s r", "mean"),
        node("Sub", "x mean", "d"),
        node("MatMul", "d w", "y"),
        axes=np.array([-1], np.int64),
        r=number(1 / 16),
        w=WEIGHT,
    )
    assert rules(convert(model)) == {"reducesum": "sum", "mul": "wide", "sub": "statistic"}


def test_powers_in_disguise_are_found() -> None:
    model = pointwise(
        node("Mul", "x c", "a"),
        node("Mul", "a x", "b", "square"),
        node("Tanh", "b", "t"),
        node("MatMul", "t w", "y"),
        c=number(0.5),
        w=WEIGHT,
    )
    assert {k: v for k, v in rules(convert(model)).items() if v != "neighbours"} == {"square": "power", "tanh": "wide"}


@pytest.mark.parametrize(("amax", "rule"), [(60.0, None), (1e5, "range"), (1e-5, "range")])
def test_measured_ranges_beat_the_rules(amax: float, rule: str | None) -> None:
    model = pointwise(
        node("MatMul", "x w", "a", "first"), node("Exp", "a", "e"), node("MatMul", "e w", "y", "last"), w=WEIGHT
    )
    assert rules(convert(model)) == {"exp": "power", "last": "wide"}
    made = convert(model, table=measured(model, e=amax))
    assert rules(made).get("exp") == rule and ("last" in rules(made)) == (rule is not None)
    if amax > 1:
        reasons = {s.node: s.reason for s in made.kept}
        assert all("it reached 1e+05 on the samples" in reasons[n] for n in reasons)


def test_a_wide_measured_range_lasts_until_a_narrow_one_was_measured() -> None:
    nodes = [
        node("MatMul", "x w", "a", "one"),
        node("MatMul", "a w", "b", "two"),
        node("MatMul", "b w", "c", "three"),
        node("MatMul", "c w", "y", "four"),
    ]
    model = pointwise(*nodes, w=WEIGHT)
    made = convert(model, table=measured(model, a=1e5, c=3.0))
    assert rules(made) == {"one": "range", "two": "wide", "three": "wide"}
    assert convert(model, unquantized_type="bf16", table=measured(model, a=1e5)).kept == ()  # bfloat16 holds it


@pytest.mark.parametrize("size", [1.0, 0.25, 1e-3])
@pytest.mark.parametrize("way", [{"scheme": "w8a16"}, {"piecewise": "on"}])
def test_two_products_of_one_weight_are_added_in_one_type(way: dict[str, str], size: float) -> None:
    """The scale of what the first code leaves vanishes in FP16, beside one that does not, where data are small."""
    nodes = [node("MatMul", "x w", "a", "first"), node("Sigmoid", "a", "s"), node("Mul", "s size", "r")]
    model = pointwise(*nodes, node("Gemm", "r w b", "y", "last"), w=WEIGHT, size=number(size), b=WEIGHT[0])
    plain = {"rounding": "nearest", "equalize": "none", "bias_correction": "off", "calibrator": "max", "shift": False}
    made = quantized(model, [{"x": X}], **plain, **way)
    found = convert(made.model, table=made.table)
    if "scheme" in way:
        assert (size < 1) == ("last_rest_Add" in rules(found))
    kinds = types(found.model)
    for add in (n for n in found.model.graph.node if n.op_type == "Add" and n.name.startswith(("first_", "last_"))):
        makers = [next(n for n in found.model.graph.node if t in n.output) for t in add.input]
        assert not any(n.op_type == "Cast" for n in makers) and len({kinds[t] for t in add.input}) == 1
    assert np.allclose(run(found.model, x=X), run(made.model, x=X), atol=0.02)


def test_positions_stay_exact() -> None:
    nodes = [
        node("Cast", "p", "f", to=TensorProto.FLOAT),
        node("Mul", "f frequency", "angle"),
        node("Sin", "angle", "s"),
        node("MatMul", "s w", "y"),
    ]
    ends = (
        [helper.make_tensor_value_info("p", TensorProto.INT64, [4, 1])],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    tensors = {"frequency": np.linspace(1, 0.1, 16, dtype=np.float32)[None], "w": WEIGHT}
    graph = helper.make_graph(nodes, "tiny", *ends, [numpy_helper.from_array(v, k) for k, v in tensors.items()])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = prepare(Model(proto=proto, directory=Path(), sha256=""))
    made = convert(model)
    assert rules(made) == dict.fromkeys(("cast", "mul", "sin"), "positions")
    p = np.array([[5001], [4099], [3], [9999]], np.int64)  # float16 holds no odd number above 2048
    assert np.abs(run(made.model, p=p) - run(model, p=p)).max() < 16 * 3 * HALF * np.abs(WEIGHT).max()


def test_a_mask_for_softmax_ends_where_a_score_can_be_added() -> None:
    mask = np.triu(np.full((2, 16), np.finfo(np.float32).min, np.float32), 1)
    model = pointwise(node("Add", "x mask", "a"), node("Softmax", "a", "y"), mask=mask)
    made = convert(model)
    assert made.kept == () and made.model.array("mask").min() == -(2**15)
    want = run(model, x=X)
    assert np.abs(run(made.model, x=X) - want).max() <= 4 * HALF and ((want == 0) == (run(made.model, x=X) == 0)).all()


def test_constants_out_of_range_keep_their_node() -> None:
    large = pointwise(
        node("MatMul", "x w", "a"),
        node("Add", "a c", "b"),
        node("Sub", "b c", "d"),
        node("MatMul", "d w", "y", "last"),
        w=WEIGHT,
        c=number(1e6),
    )
    assert rules(convert(large)) == {"add": "constant", "sub": "wide", "last": "wide"}
    tiny = pointwise(
        node("MatMul", "x w", "a"),
        node("Abs", "a", "p"),
        node("Add", "p c", "b"),
        node("MatMul", "b w", "y", "last"),
        w=WEIGHT,
        c=number(1e-9),
    )
    found = convert(tiny)
    assert rules(found)["add"] == "constant" and "vanishes in float16" in found.kept[0].reason
    clip = pointwise(
        node("Clip", "x low high", "a"), node("MatMul", "a w", "y"), w=WEIGHT, low=number(-1e30), high=number(1)
    )
    assert convert(clip).kept == () and convert(clip).model.array("low") == -65504


@pytest.mark.parametrize("moved", [False, True])
def test_a_small_bias_of_a_product_is_nothing_beside_its_values(moved: bool) -> None:
    """As of a network whose biases were drawn with a deviation of 1e-6, and not trained."""
    bias = np.linspace(-4e-6, 4e-6, 16, dtype=np.float32)
    rows = [node("MatMul", "x w", "a"), *([node("Identity", "a", "m")] if moved else [])]
    rows += [node("Add", "m b" if moved else "b a", "s", "add"), node("Erf", "s", "e"), node("MatMul", "e w", "y")]
    assert convert(pointwise(*rows, w=WEIGHT, b=bias)).kept == ()
    gemm = [node("Gemm", "x w b", "s", "product"), node("Erf", "s", "y")]
    assert convert(pointwise(*gemm, w=WEIGHT, b=bias)).kept == ()
    same = np.full(16, 4e-6, np.float32)  # an epsilon
    assert rules(convert(pointwise(*rows, w=WEIGHT, b=same)))["add"] == "constant"
    rooted = [node("Gemm", "x w b", "s", "product"), node("Sqrt", "s", "y")]
    assert rules(convert(pointwise(*rooted, w=WEIGHT, b=bias)))["product"] == "constant"
    weight = [node("MatMul", "x t", "y", "product")]
    assert rules(convert(pointwise(*weight, t=WEIGHT * np.float32(1e-7))))["product"] == "constant"


def test_light_nodes_between_float32_nodes_stay_with_them() -> None:
    model = pointwise(
        node("Celu", "x", "a", "first"),
        node("Mul", "a c", "b"),
        node("Reshape", "b shape", "d"),
        node("Celu", "d", "y", "second"),
        c=number(2),
        shape=np.array([2, 16], np.int64),
    )
    made = convert(model)
    assert rules(made) == {"first": "schema", "mul": "neighbours", "reshape": "neighbours", "second": "schema"}
    assert casts(made.model) == 0


def test_casts_of_the_model_there_and_back_are_removed() -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Cast", "a", "h", "there", to=TensorProto.FLOAT16),
        node("Cast", "h", "f", "back", to=TensorProto.FLOAT),
        node("MatMul", "f w", "y", "last"),
    ]
    model = pointwise(*nodes, w=WEIGHT)
    made = convert(model)
    check_form(made.model)
    assert casts(made.model) == 2 and {n.op_type for n in made.model.graph.node} == {"MatMul", "Cast"}
    types(made.model)


def test_scales_of_resize_and_shapes_stay_as_they_are() -> None:
    nodes = [
        node("Resize", "x - scales", "a", mode="nearest"),
        node("Shape", "a", "s"),
        node("Reshape", "a s", "b"),
        node("Relu", "b", "y"),
    ]
    model = build(nodes, {"x": (1, 2, "h", 4)}, {"scales": np.array([1, 1, 2, 2], np.float32)})
    made = convert(model)
    found = types(made.model)
    assert found["scales"] == "FLOAT" and found["a"] == found["b"] == "FLOAT16"
    assert casts(made.model) == 2  # Shape reads what is there


def test_bodies_stay_float32_with_casts_at_their_border() -> None:
    branch = [
        helper.make_graph([node(op, "a", "r", f"inner_{op}")], op, [], [helper.make_tensor_value_info("r", 1, [2, 16])])
        for op in ("Relu", "Neg")
    ]
    nodes = [
        node("MatMul", "x w", "a"),
        node("ReduceMax", "x", "m", keepdims=0),
        node("Greater", "m zero", "c"),
        helper.make_node("If", ["c"], ["i"], name="if", then_branch=branch[0], else_branch=branch[1]),
        node("MatMul", "i w", "b", "second"),
        node("Add", "a b", "y"),
    ]
    model = pointwise(*nodes, w=WEIGHT, zero=number(0))
    made = convert(model)
    check_form_of_types = types(made.model)
    assert rules(made) == {"if": "body"} and check_form_of_types["a"] == "FLOAT"  # the body's name for it
    for x in (X, -np.abs(X)):
        assert (
            np.abs(run(made.model, x=x) - run(model, x=x)).max()
            < 16 * 6 * HALF * np.abs(WEIGHT).max() ** 2 * np.abs(x).max()
        )


def test_unknown_operators_keep_their_types() -> None:
    proto = onnx.ModelProto()
    model = pointwise(
        node("MatMul", "x w", "a"), node("Relu", "a", "b", "odd"), node("MatMul", "b w", "y", "last"), w=WEIGHT
    )
    proto.CopyFrom(model.proto)
    next(n for n in proto.graph.node if n.name == "odd").domain = "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    made = convert(model.replace(proto))
    assert rules(made) == {"odd": "unknown operator"} and casts(made.model) == 4
    assert made.kept[0].reason == "onnx does not know com.example Relu"
    check_form(made.model)
    del proto.graph.value_info[:]  # nobody knows the type of what it makes: its reader stays as it is too
    assert rules(convert(model.replace(proto))) == {"odd": "unknown operator", "last": "unknown type"}


def qdq_product(scale: float = 0.01, weights: np.ndarray | None = None) -> Model:
    """Q, DQ and a MatMul of INT8 codes whose output channel 1 has the scale 1e-7."""
    scales = np.full(16, 0.02, np.float32) if weights is None else weights
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "codes ws wz", "w", "weight", axis=1),
        node("MatMul", "d w", "y"),
    ]
    codes = np.random.default_rng(5).integers(-127, 128, (16, 16)).astype(np.int8)
    return pointwise(*nodes, s=number(scale), z=np.array(0, np.int8), codes=codes, ws=scales, wz=np.zeros(16, np.int8))


def test_scales_take_the_graphs_type_and_codes_stay() -> None:
    model = qdq_product()
    made = convert(model)
    found = types(made.model)
    assert found["s"] == found["ws"] == found["d"] == found["w"] == "FLOAT16" and found["codes"] == "INT8"
    assert (made.model.array("codes") == model.array("codes")).all() and made.kept == ()
    chain = [n.op_type for n in made.model.graph.node]
    assert chain == ["Cast", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Cast"]


def test_a_dequantizer_that_two_types_read_is_written_twice() -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("Celu", "d", "c"),
        node("MatMul", "d w", "m"),
        node("Add", "c m", "y"),
    ]
    made = convert(pointwise(*nodes, s=number(0.01), z=np.array(0, np.int8), w=WEIGHT))
    found = types(made.model)
    check_form(made.model)
    scales = [found[n.input[1]] for n in made.model.graph.node if n.op_type.endswith("quantizeLinear")]
    quantizer = next(n for n in made.model.graph.node if n.op_type == "QuantizeLinear")
    assert sorted(scales) == ["FLOAT", "FLOAT16"] and found[quantizer.input[0]] == found[quantizer.input[1]]
    assert casts(made.model) == 3  # x, what Celu makes, y: none behind DQ


def test_weight_scales_that_vanish_are_raised_and_their_codes_follow() -> None:
    scales = np.full(16, 0.02, np.float32)
    scales[1], scales[2] = 1e-7, 4e-6  # float16: 1e-7 is off by 20 %; 4e-6, a subnormal number, by less than 1 %
    model = qdq_product(weights=scales)
    made = convert(model)
    (dequantize,) = [n for n in made.model.graph.node if n.name == "weight"]
    codes, stored = (made.model.array(t).astype(np.float64) for t in dequantize.input[:2])
    old = model.array("codes") * scales.astype(np.float64)
    assert stored.min() > 0 and stored[1] == 2.0**-14
    # half a step of the raised scale; elsewhere the rounding of a float16 scale, 2^-8 for the subnormal one
    assert np.abs(codes * stored - old)[:, 1].max() <= 2.0**-15
    assert np.abs(codes * stored - old)[:, [0, *range(2, 16)]].max() <= 127 * 0.02 * HALF
    assert (codes[:, 2:] == model.array("codes")[:, 2:]).all()
    assert made.kept == () and set(types(made.model)) >= set(dequantize.input)


def test_an_activation_whose_scale_vanishes_stays_float32_to_its_product() -> None:
    made = convert(qdq_product(scale=1e-7))
    assert rules(made) == {"quantizelinear": "scale", "dequantizelinear": "scale", "matmul": "wide"}
    assert types(made.model)["ws"] == "FLOAT" and casts(made.model) == 0
    assert rules(convert(qdq_product(scale=600.0)))["matmul"] == "wide"  # 128 * 600 > 65504


@pytest.mark.parametrize("unquantized_type", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_zero_stays_zero_behind_a_shift(kind: str, unquantized_type: str) -> None:
    """Behind a ReLU most values are 0: their code times rounded scales must still cancel the bias."""
    model = graphs.conv() if kind == "Conv" else graphs.product(kind, bias=None if kind == "MatMul" else (8,))
    made = quantized(model, graphs.samples(model, low=0), shift=True, calibrator="max")
    low = ml_dtypes.bfloat16 if unquantized_type == "bf16" else np.float16
    result = convert(made.model, unquantized_type=unquantized_type)
    assert set(rules(result).values()) <= {"shift", "neighbours"} and "shift" in rules(result).values()
    zero = {i.name: np.zeros([d if isinstance(d, int) else 1 for d in i.shape or ()], np.float32) for i in model.inputs}
    evaluate = ReferenceEvaluator(model.proto).run(None, zero)[0]
    got = _exact(result.model, zero)
    # what is left: the bias in two numbers of the low type, one more rounding of the result for each Add behind it
    eps = float(ml_dtypes.finfo(low).eps)
    assert np.abs(got - evaluate).max() <= eps**2 * 300 + 2 * eps * np.abs(evaluate).max()


def test_a_product_that_its_bias_cancels_keeps_its_weights_exact() -> None:
    """Data near one value, and outputs that are small beside what the weights' sum makes of it."""
    rng = np.random.default_rng(2)
    weight = rng.uniform(0.5, 1.5, (8, 256, 1, 1)).astype(np.float32)
    tensors = {"w": weight, "b": (-weight.sum(axis=(1, 2, 3)) / 2).astype(np.float32)}
    model = build([node("Conv", "x w b", "y", "conv")], {"x": (1, 256, 4, 4)}, tensors)
    data = [{"x": (0.5 + 0.002 * rng.standard_normal((1, 256, 4, 4))).astype(np.float32)} for _ in range(4)]
    made = quantized(model, data, shift=True, calibrator="max")
    exact = graphs.run(made.model, data)[0]["y"]

    def lost(one_scale: tuple[str, ...]) -> float:
        result = convert(made.model, unquantized_type="fp16", table=made.table, one_scale=one_scale)
        assert ("conv" in rules(result)) == (not one_scale)
        return float(np.abs(graphs.run(result.model, data)[0]["y"] - exact).max())

    assert lost(()) < lost(("conv",)) / 4
    plain = graphs.samples(model)
    usual = quantized(model, plain, shift=True, calibrator="max")
    assert "conv" not in rules(convert(usual.model, unquantized_type="fp16", table=usual.table))


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_roundings_of_weights_behind_a_shift_add_up_to_little(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quiet data near the value of zero see the sum of all roundings; another scale nearby makes it small."""
    rng = np.random.default_rng(3)
    shape = {"Conv": (16, 96, 1, 1), "Gemm": (96, 16), "MatMul": (96, 16)}[kind]
    tensors = {"w": rng.normal(size=shape).astype(np.float32), "b": rng.normal(size=16).astype(np.float32)}
    nodes = [node(kind, "x w" if kind == "MatMul" else "x w b", "p" if kind == "MatMul" else "y", "product")]
    nodes += [node("Add", "p b", "y", "add")] if kind == "MatMul" else []
    size = (2, 96, 3, 3) if kind == "Conv" else (9, 96)
    model = build(nodes, {"x": size}, tensors)
    data = [{"x": rng.uniform(0, 4, size).astype(np.float32)} for _ in range(3)]
    made = quantized(model, data, shift=True, calibrator="max", equalize="none", rounding="nearest")
    quiet = {"x": (rng.uniform(0, 0.1, size) ** 2).astype(np.float32)}
    exact = graphs.run(made.model, [quiet])[0]["y"]

    def lost() -> float:
        result = convert(made.model, unquantized_type="fp16")
        found = arithmetic.session(result.model.proto).run(None, quiet)[0]
        return float(np.square(found - exact).mean())

    found = lost()
    monkeypatch.setattr("qdq.assemble.precision.shift.STEPS", 0)
    assert found < lost() / 2


def test_scales_for_a_steady_sum_stay_near_and_in_the_low_type() -> None:
    rng = np.random.default_rng(4)
    codes, scales = rng.integers(-127, 128, (8, 300)).astype(np.int8), rng.uniform(1e-3, 1e-1, 8)
    found = steady(codes, scales, "float16")
    assert (found == found.astype(np.float16)).all() and (np.abs(found - scales) <= 2.0**-9 * scales).all()

    def lost(scale: np.ndarray) -> np.ndarray:
        exact = codes * scale[:, None].astype(np.float64)
        return np.asarray(np.abs((exact.astype(np.float16) - exact).sum(axis=1)))

    nearest = scales.astype(np.float16).astype(np.float64)
    assert (lost(found) <= lost(nearest)).all() and lost(found).mean() < lost(nearest).mean() / 2
    assert (steady(codes, scales, "bfloat16") == scales.astype(ml_dtypes.bfloat16)).all()
    assert (steady(codes, np.full(8, 1e-9), "float16") == 0).all()  # which no type of 16 bits holds: left to others


def test_a_matrix_product_that_its_bias_cancels_compiles() -> None:
    """In FP32 between FP16 neighbours the compiler fails on its integer kernel."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    from engines.backends import rtx
    from engines.verify.audit import audit

    rng = np.random.default_rng(2)
    weight = rng.uniform(0.5, 1.5, (256, 64)).astype(np.float32)
    tensors = {"w": weight, "b": -weight.sum(axis=0) / 2, "v": graphs.normal(64, 64), "c": np.zeros(64, np.float32)}
    nodes = [node("Gemm", "x w b", "h", "first"), node("Gelu", "h", "g"), node("Gemm", "g v c", "y", "second")]
    model = build(nodes, {"x": (16, 256)}, tensors)
    data = [{"x": (0.5 + 0.002 * rng.standard_normal((16, 256))).astype(np.float32)} for _ in range(4)]
    made = quantized(model, data, shift=True, calibrator="max")
    result = convert(made.model, unquantized_type="fp16", table=made.table)
    assert {"first", "second"}.isdisjoint(rules(result))
    assert audit(result.model.proto, rtx.build(result.model.proto).table).int8_share == 1.0


@pytest.mark.parametrize("compiler", ["rtx", "tensorrt"])
def test_a_large_bias_is_in_two_numbers_where_the_compiler_fuses_the_second(compiler: str) -> None:
    """A folded BatchNormalization leaves biases that lose more by rounding than their weights."""
    tensors = {"w": graphs.normal(4, 4, 3, 3) / 8, "b": np.float32([100.1, -99.3, 77.7, 55.5])}
    model = build([node("Conv", "x w b", "y", "conv", pads=[1] * 4)], {"x": (1, 4, 6, 6)}, tensors)
    plan = placement.plan(model, Settings(compiler=compiler, exclude=("conv",)))
    found = finish(model, plan, unquantized_type="fp16", table=None).model
    operators = [n.op_type for n in found.graph.node if n.op_type != "Cast"]
    assert operators == (["Conv", "Sub"] if compiler == "rtx" else ["Conv"])


@pytest.mark.filterwarnings("error")
def test_a_shift_constant_beyond_float16_is_left_without_a_warning() -> None:
    assert rounded([1e6, -1.0], "float16").tolist() == [np.inf, -1]
    model = graphs.product("Gemm", bias=(8,))
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    (bias,) = (t for t in proto.graph.initializer if t.name == "b")
    bias.CopyFrom(numpy_helper.from_array(np.full(8, 1e6, np.float32), "b"))
    model = model.replace(proto)
    made = quantized(model, graphs.samples(model, low=0), shift=True, calibrator="max").model
    assert compensate(made, "float16", (), split_biases=True).node("gemm").input[2] == made.node("gemm").input[2]


def _exact(model: Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The model's arithmetic without rounding of activations: all low types widened to float32, Casts dropped."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    low = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for tensor in proto.graph.initializer:
        if tensor.data_type in low:
            name, values = tensor.name, numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, name))
    for entry in proto.graph.node:
        for attribute in entry.attribute:
            attribute.i = TensorProto.FLOAT if attribute.name == "to" and attribute.i in low else attribute.i
    del proto.graph.value_info[:]
    return np.asarray(ReferenceEvaluator(proto).run(None, feeds)[0], np.float32)


def test_external_weights_are_read_where_they_lie(tmp_path: Path) -> None:
    from qdq.model.storage import load

    model, copied = convolution(), convolution()
    onnx.save(copied.proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    made = convert(load(tmp_path / "m.onnx"))
    assert made.model.array("w").dtype == np.float16 and types(made.model)["w"] == "FLOAT16"
    assert (made.model.array("w") == model.array("w").astype(np.float16)).all()


@pytest.mark.parametrize("unquantized_type", ["fp16", "bf16"])
def test_what_is_converted_compiles_and_stays_int8(unquantized_type: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    from engines.backends import rtx
    from engines.verify.audit import audit

    model = graphs.conv()
    made = quantized(model, graphs.samples(model, low=0), shift=True, calibrator="max")
    result = convert(made.model, unquantized_type=unquantized_type).model
    found = audit(result.proto, rtx.build(result.proto).table)
    assert found.int8_share == 1.0 and not found.missed
    norm = convert(rms_norm(), unquantized_type=unquantized_type).model
    table = rtx.build(norm.proto).table
    assert {"fp16": "float16", "bf16": "bfloat16"}[unquantized_type] in Counter(
        n.consumed for n in audit(norm.proto, table).nodes
    )


@pytest.mark.parametrize(("words", "kept"), [(64, True), (4096, False)])
def test_a_table_of_words_before_a_node_in_fp32_is_stored_in_half(words: int, kept: bool) -> None:
    table = np.random.default_rng(0).normal(size=(words, 32)).astype(np.float32)
    ones = np.ones(32, np.float32)
    nodes = [
        node("Cast", "x", "ids", to=TensorProto.INT64),
        node("Gather", "table ids", "word"),
        node("LayerNormalization", "word ones", "y", epsilon=1e-12, axis=-1),
    ]
    made = convert(build(nodes, {"x": (1, 8)}, {"table": table, "ones": ones}))
    assert rules(made).get("gather") == ("neighbours" if kept else None)
    assert made.model.array("table").dtype == (np.float32 if kept else np.float16)
