"""FP16 and BF16 computed in FP32: every result is rounded once to the type of its tensor, and nothing else is."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from places import ROOT, SHARED

from engines.core import arithmetic, onnx_runtime as ort
from engines.core.arithmetic import Written, stand_in
from engines.core.errors import EngineError
from engines.core.operators import family

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")

HALF, BRAIN, FLOAT = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT
DTYPE = {HALF: np.dtype(np.float16), BRAIN: np.dtype(ml_dtypes.bfloat16), FLOAT: np.dtype(np.float32)}
CHECKED = family(
    "Add BatchNormalization Conv ConvTranspose DequantizeLinear Elu Gelu Gemm HardSwish InstanceNormalization LSTM "
    "LayerNormalization MatMul MaxPool Mean Pow QuantizeLinear ReduceMean Resize Slice Softmax Split Where"
)
node = helper.make_node


def low(values: Any, kind: int = HALF) -> np.ndarray:
    """Values as a type holds them, float32."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(DTYPE[kind]).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Any] | None = None,
    *,
    kind: int = HALF,
    ends: int = FLOAT,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 22,
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    """x (4,) of type `ends` -> outputs of it; tensors of floats are stored in `kind`."""
    stored = [
        numpy_helper.from_array(np.asarray(v, DTYPE[kind] if np.asarray(v).dtype.kind == "f" else None), k)
        for k, v in (tensors or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "low",
        [helper.make_tensor_value_info("x", ends, [4])],
        [helper.make_tensor_value_info(name, ends, None) for name in outputs],
        stored,
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10, functions=list(functions))


def cast_in(*inner: onnx.NodeProto, kind: int = HALF) -> list[onnx.NodeProto]:
    """x -> h, low -> nodes -> r, low -> y."""
    return [node("Cast", ["x"], ["h"], to=kind), *inner, node("Cast", ["r"], ["y"], to=FLOAT)]


def result(proto: onnx.ModelProto, x: Any, written: Written | None = None) -> np.ndarray:
    """y of the stand-in."""
    return np.asarray(next(ort.run(arithmetic.session(proto, written=written), [{"x": np.asarray(x)}]))["y"])


X = np.array([1.2345, -0.3333, 300.7, 1e-6], np.float32)


@pytest.mark.parametrize("kind", [HALF, BRAIN])
def test_each_result_is_rounded_once(kind: int) -> None:
    """(x * a) + b: two roundings of FP32 results, none of them in between."""
    nodes = cast_in(node("Mul", ["h", "a"], ["m"]), node("Add", ["m", "b"], ["r"]), kind=kind)
    a, b = low(1.7, kind), low(-2.3, kind)
    wanted = low(low(low(X, kind) * a, kind) + b, kind)
    assert np.array_equal(result(model(nodes, {"a": 1.7, "b": -2.3}, kind=kind), X), wanted)
    assert not np.array_equal(wanted, low(low(X, kind) * a + b, kind))  # one rounding alone would show


def test_an_overflow_between_nodes_is_seen() -> None:
    """300.7^2 is infinite in FP16, whatever divides it afterwards; ONNX Runtime's own run shows a finite number."""
    proto = model(cast_in(node("Mul", ["h", "h"], ["m"]), node("Mul", ["m", "t"], ["r"])), {"t": 0.001})
    assert np.isinf(result(proto, X)[2])
    assert np.isfinite(next(ort.run(proto, [{"x": X}]))["y"]).all()


def test_a_model_in_fp32_is_its_own_stand_in() -> None:
    proto = model([node("Relu", ["x"], ["y"])])
    assert stand_in(proto) is proto


def test_movers_and_pickers_are_not_rounded_again() -> None:
    nodes = cast_in(node("Relu", ["h"], ["a"]), node("Reshape", ["a", "s"], ["r"]))
    made = stand_in(model(nodes, {"s": np.array([2, 2])}))
    low_casts = [
        n for n in made.graph.node if n.op_type == "Cast" and helper.get_attribute_value(n.attribute[0]) == HALF
    ]
    assert len(low_casts) == 1  # of x itself


@pytest.mark.parametrize(
    ("op", "attributes", "tensors", "rounds"),
    [
        ("Resize", {"mode": "linear"}, 1, True),
        ("Resize", {"mode": "nearest"}, 1, False),
        ("ScatterElements", {"reduction": "add"}, 1, True),
        ("ScatterElements", {}, 1, False),
        ("Dropout", {}, 3, True),
        ("Dropout", {}, 1, False),
        ("Softmax", {}, 1, True),
        ("If", {}, 1, False),
    ],
)
def test_what_rounds_may_depend_on_attributes(op: str, attributes: Any, tensors: int, rounds: bool) -> None:
    assert arithmetic.rounds(node(op, ["a", "b", "c"][:tensors], ["y"], **attributes)) is rounds


@pytest.mark.parametrize("kind", [HALF, BRAIN])
def test_inputs_and_outputs_keep_their_low_type(kind: int) -> None:
    """An output that is read again, and one that a Relu makes, which rounds nothing."""
    nodes = [node("Mul", ["x", "a"], ["y"]), node("Relu", ["y"], ["z"]), node("Exp", ["z"], ["e"])]
    proto = model(nodes, {"a": 1.7}, kind=kind, ends=kind, outputs=("y", "z", "e"))
    opened = arithmetic.session(proto)
    found = {"tensor(float16)"} if kind == HALF else {"tensor(bfloat16)"}
    assert {v.type for v in (*opened.get_inputs(), *opened.get_outputs())} == found
    if kind == HALF:
        outputs = next(ort.run(opened, [{"x": (X / 100).astype(np.float16)}]))
        y = low(low(X / 100) * low(1.7))
        wanted = {"y": y, "z": np.maximum(y, 0), "e": low(np.exp(np.maximum(y, 0)))}
        assert all(np.array_equal(outputs[k].astype(np.float32), v) for k, v in wanted.items())


@pytest.mark.parametrize("outer", ["h", "a"])
def test_bodies_round_too_and_read_what_is_outside(outer: str) -> None:
    """If: one branch multiplies a captured tensor twice, the other hands a constant of its own on."""
    inner = [node("Mul", [outer, "b"], ["m"]), node("Mul", ["m", "b"], ["t"])]
    own = numpy_helper.from_array(np.full(4, 0.1, np.float16), "own")
    then = helper.make_graph(inner, "then", [], [helper.make_tensor_value_info("t", HALF, None)])
    other = helper.make_graph([], "else", [], [helper.make_tensor_value_info("own", HALF, [4])], [own])
    for flag in (True, False):
        nodes = cast_in(node("If", ["c"], ["r"], then_branch=then, else_branch=other))
        proto = model(nodes, {"a": np.full(4, 3.3), "b": 1.7, "c": np.array(flag)})
        start = low(X) if outer == "h" else low(np.full(4, 3.3))
        wanted = low(low(start * low(1.7)) * low(1.7)) if flag else low(np.full(4, 0.1))
        assert np.array_equal(result(proto, X), wanted)


def test_a_loop_carries_rounded_values() -> None:
    body = helper.make_graph(
        [node("Mul", ["v", "b"], ["w"]), node("Identity", ["c"], ["d"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", HALF, None),
        ],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []), helper.make_tensor_value_info("w", HALF, None)],
    )
    proto = model(cast_in(node("Loop", ["n", "", "h"], ["r"], body=body)), {"b": 1.1, "n": np.array(5)})
    wanted = low(X)
    for _ in range(5):
        wanted = low(wanted * low(1.1))
    assert np.array_equal(result(proto, X), wanted)


def test_functions_of_the_model_are_inlined_and_round_inside() -> None:
    inside = [node("Mul", ["a", "a"], ["s"]), node("Sqrt", ["s"], ["o"])]
    function = helper.make_function("own", "Size", ["a"], ["o"], inside, [helper.make_opsetid("", 22)])
    proto = model(cast_in(node("Size", ["h"], ["r"], domain="own")), functions=(function,))
    found = result(proto, X)
    assert np.isinf(found[2]) and np.array_equal(found, low(np.sqrt(low(low(X) ** 2))))


def test_casts_between_low_types_and_like_another_tensor() -> None:
    nodes = [
        node("Cast", ["x"], ["h"], to=HALF),
        node("CastLike", ["h", "b"], ["k"]),
        node("Cast", ["k"], ["y"], to=FLOAT),
    ]
    proto = model(nodes, {"b": 1.0}, kind=BRAIN)
    assert np.array_equal(result(proto, X), low(low(X), BRAIN))


def test_quantizers_divide_in_fp32_and_dequantizers_round_their_product() -> None:
    nodes = cast_in(node("QuantizeLinear", ["h", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["r"]))
    proto = model(nodes, {"s": 0.0371, "z": np.int8(3)})
    s = low(0.0371)
    codes = np.clip(np.rint(low(X) / s) + 3, -128, 127)
    assert np.array_equal(result(proto, X), low((codes - 3) * s))


def test_bits_of_a_low_type_are_those_of_that_type() -> None:
    """BitCast needs opset 26: the stand-in gives it FP16 itself."""
    nodes = [node("Cast", ["x"], ["h"], to=HALF), node("Mul", ["h", "h"], ["m"]), node("BitCast", ["m"], ["y"], to=5)]
    made = stand_in(model(nodes, opset=26))
    cast = next(n for n in made.graph.node if n.op_type == "BitCast")
    before = next(n for n in made.graph.node if cast.input[0] in n.output)
    assert before.op_type == "Cast" and helper.get_attribute_value(before.attribute[0]) == HALF


def test_an_operator_of_an_unknown_domain_gets_and_gives_its_own_type() -> None:
    nodes = [node("Mul", ["x", "x"], ["m"]), node("Own", ["m", "a"], ["o"], domain="own"), node("Exp", ["o"], ["y"])]
    made = stand_in(model(nodes, {"a": 1.0}, ends=HALF))
    by = {name: n for n in made.graph.node for name in n.output}
    own = next(n for n in made.graph.node if n.op_type == "Own")
    assert own.input[1] == "a"
    assert helper.get_attribute_value(by[own.input[0]].attribute[0]) == HALF
    exp = next(n for n in made.graph.node if n.op_type == "Exp")
    assert by[exp.input[0]].input[0] == own.output[0]  # through a Cast to FP32


def test_external_constants_stay_where_they_are(tmp_path: Path) -> None:
    values = np.linspace(-3, 3, 4000).astype(np.float32)
    proto = model(cast_in(node("Mul", ["h", "a"], ["m"]), node("ReduceSum", ["m"], ["r"])), {"a": values})
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4000
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    x = np.linspace(0, 1, 4000).astype(np.float32)
    found = next(ort.run(arithmetic.session(tmp_path / "m.onnx"), [{"x": x}]))["y"]
    assert found.item() == pytest.approx(low(low(low(x) * low(values)).sum()).item(), rel=2**-10)


def test_sequences_of_a_low_type_are_refused_at_the_ends() -> None:
    proto = model([node("SequenceConstruct", ["x"], ["y"])], ends=HALF)
    proto.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", HALF, None))
    with pytest.raises(EngineError, match="'y' is a sequence"):
        stand_in(proto)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"m\.onnx"):
        arithmetic.session(tmp_path / "m.onnx")


def test_roundings_of_an_engine_replace_those_of_the_file() -> None:
    nodes = cast_in(node("Mul", ["h", "a"], ["m"], name="mul"), node("Add", ["m", "a"], ["r"], name="add"))
    proto, a = model(nodes, {"a": 1.7}), low(1.7)
    none = Written(types=dict.fromkeys(("h", "m", "r"), "float32"), inside={})
    assert np.array_equal(result(proto, X, none), X * a + a)
    both = Written(types={"h": "float16", "m": "bfloat16", "r": "float32"}, inside={"h": {"mul"}})
    assert np.array_equal(result(proto, X, both), low(X * a, BRAIN) + a)


def test_scales_behind_a_convolution_do_not_round_its_weights() -> None:
    """Codes times a power of two are exact, so that a bias cancels them; codes times the ratios would be rounded."""
    rng = np.random.default_rng(0)
    codes = rng.integers(100, 127, size=(2, 4, 1)).astype(np.int8)
    ratios = np.array([1.2345, 1.7771]).astype(np.float16)
    tensors = {
        "codes": codes,
        "scale": np.float16(2**-5),
        "bias": -16.0 * 2**-5 * codes.sum(axis=(1, 2)),
        "ratios": ratios.reshape(1, 2, 1),
        "shape": np.array([1, 4, 1]),
    }
    inner = (
        node("Reshape", ["h", "shape"], ["image"]),
        node("DequantizeLinear", ["codes", "scale"], ["weight"]),
        node("Conv", ["image", "weight", "bias"], ["product"]),
        node("Mul", ["product", "ratios"], ["r"]),
    )
    found = result(model(cast_in(*inner), tensors), np.full(4, 16.0, np.float32))
    assert not found.any()
    folded = low(codes * 2.0**-5 * ratios.astype(np.float64)[:, None, None])
    assert np.abs(16 * folded.sum(axis=(1, 2)) + low(tensors["bias"]) * ratios).max() > 0.01


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("check_fp16")


@pytest.mark.parametrize("op", sorted(CHECKED))
def test_node_tests_of_onnx_agree_with_the_reference_within_a_unit(tool: ModuleType, op: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = [tool.judge(case) for case in tool.node_tests(op)]
    assert [o for o in outcomes if o.verdict == "differs"] == []
    assert any(o.verdict == "agrees" for o in outcomes)


def test_the_tool_sees_a_difference(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against results that are 1 % larger nothing agrees: the comparison can fail."""
    case = next(c for c in tool.node_tests("Exp") if c.name == "test_exp")
    assert tool.judge(case).verdict == "agrees"
    exact = tool.expected
    monkeypatch.setattr(tool, "_native", lambda *_: [])
    monkeypatch.setattr(
        tool, "expected", lambda *given: {name: v * np.float32(1.01) for name, v in exact(*given).items()}
    )
    assert tool.judge(case).verdict == "differs"


def test_every_node_of_a_model_agrees_with_the_reference(tool: ModuleType) -> None:
    rng = np.random.default_rng(0)
    nodes = cast_in(node("MatMul", ["h", "w"], ["m"]), node("Add", ["m", "b"], ["s"]), node("Tanh", ["s"], ["r"]))
    proto = model(nodes, {"w": rng.normal(size=(4, 8)), "b": rng.normal(size=8)})
    outcomes = tool.node_by_node(proto, {"x": X})
    assert [o.verdict for o in outcomes] == ["agrees"] * 5


def test_every_node_of_a_real_model_agrees_with_the_reference(tool: ModuleType) -> None:
    """The 13-atom ANI network, halved: 8 chains of Gemm and Celu."""
    path = SHARED / "models/ani1ccx/ani1ccx_mlp_H.onnx"
    if not path.is_file():
        pytest.skip(f"no {path}: set QDQ_SHARED to the folder of the models")
    proto = tool.halved(onnx.load(path))
    width = proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    sample = {proto.graph.input[0].name: np.random.default_rng(0).random((3, width)).astype(np.float16)}
    outcomes = tool.node_by_node(proto, sample)
    assert len(outcomes) > 20 and {o.verdict for o in outcomes} == {"agrees"}
