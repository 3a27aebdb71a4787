"""FP64 models compute in FP32 once prepared; what a caller feeds and reads stays FP64."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import node, normal
from onnx import TensorProto, helper, numpy_helper
from raw_models import feeds, operators, prepared_alike, raw

from engines.core import onnx_runtime as ort
from engines.core.errors import EngineError
from qdq.core.errors import ModelError
from qdq.deploy.check import float_session
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.doubles import narrowed
from qdq.passes.prepare import prepare
from qdq.plan import placement

X = {"x": (("n", 6), "float64")}
WEIGHT = normal(6, 6).astype(np.float64)


def types(model: Model) -> set[str]:
    """The types of what lies between inputs and outputs, constants included."""
    made = (name for n in model.graph.node for name in n.output if not model.is_output(name))
    return {model.dtype(name) for name in (*made, *model.initializers)}


def test_weights_and_nodes_become_fp32_and_the_border_stays() -> None:
    nodes = [
        node("MatMul", "x w", "a", "first"),
        node("Add", "a b", "c"),
        node("Relu", "c", "z"),
        node("MatMul", "z w", "y", "second"),
    ]
    model = raw(nodes, X, {"w": WEIGHT, "b": normal(6).astype(np.float64)}, outputs=("y", "z"))
    done = prepared_alike(model, {"n": 3})
    assert [i.dtype for i in done.inputs] == ["float64"] and [o.dtype for o in done.outputs] == ["float64"] * 2
    assert types(done) == {"float32"}
    assert placement.plan(done).quantized_nodes == ("first", "second")
    assert len(done.notes) == 1 and "FP32" in done.notes[0]


def test_a_model_without_doubles_has_no_note() -> None:
    assert prepare(raw([node("Relu", "x", "y")], {"x": (2, 3)})).notes == ()


def test_casts_and_constants_of_a_float_model_become_fp32() -> None:
    """NumPy's numbers are FP64: a scale that was traced from one makes part of a model FP64."""
    nodes = [
        node("Cast", "x", "d", "up", to=TensorProto.DOUBLE),
        node("Constant", "", "k", value=numpy_helper.from_array(np.float64(0.1))),
        node("Mul", "d k", "m"),
        node("Sqrt", "m", "s"),
        node("Cast", "s", "f", "down", to=TensorProto.FLOAT),
        node("MatMul", "f w", "y"),
    ]
    done = prepared_alike(
        raw(nodes, {"x": ((2, 6), "float32")}, {"w": np.abs(normal(6, 4))}, opset=18), given={"x": np.abs(normal(2, 6))}
    )
    assert operators(done) == ["Mul", "Sqrt", "MatMul"] and types(done) == {"float32"}


def test_sizes_are_still_computed_in_fp64() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Cast", "s", "d", "up", to=TensorProto.DOUBLE),
        node("Mul", "d factor", "m"),
        node("Floor", "m", "f"),
        node("Cast", "f", "i", "down", to=TensorProto.INT64),
        node("Resize", "x - - i", "r", mode="nearest", coordinate_transformation_mode="asymmetric"),
        node("Relu", "r", "y"),
    ]
    model = raw(nodes, {"x": (1, 2, "h", "w")}, {"factor": np.array([1, 1, 4 / 3, 1.1])})
    done = prepared_alike(model, {"h": 3, "w": 10}, {"h": 30, "w": 70})
    assert done.dtype("m") == "float64" and done.dtype("r") == "float32" and done.notes == ()


def test_bodies_become_fp32_too() -> None:
    end = [helper.make_tensor_value_info("r", TensorProto.DOUBLE, None)]
    one = numpy_helper.from_array(np.float64([2]), "two")
    bodies = [
        helper.make_graph([node("Mul", "a two", "r", "double")], "then", [], end, [one]),
        helper.make_graph([node("Neg", "a", "b"), node("Add", "b x", "r", "plus")], "else", [], end),
    ]
    nodes = [
        node("MatMul", "x w", "a"),
        node("ReduceSum", "a", "total", keepdims=0),
        node("Greater", "total nought", "flag"),
        node("If", "flag", "y", then_branch=bodies[0], else_branch=bodies[1]),
    ]
    model = raw(nodes, {"x": ((2, 6), "float64")}, {"w": WEIGHT, "nought": np.float64(0)})
    for sign in (1, -1):
        done = prepared_alike(model, given={"x": sign * np.abs(normal(2, 6)).astype(np.float64)})
    assert types(done) == {"float32", "bool"}


def test_what_a_loop_carries_becomes_fp32_though_the_file_states_its_type() -> None:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("MatMul", "c w", "m"), node("Tanh", "m", "next"), node("Identity", "on", "going")],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("on", TensorProto.BOOL, []),
            value("c", TensorProto.DOUBLE, ["n", 6]),
        ],
        [value("going", TensorProto.BOOL, []), value("next", TensorProto.DOUBLE, ["n", 6])],
    )
    nodes = [node("Loop", "turns true x", "last", body=body), node("Add", "last x", "y")]
    model = raw(nodes, X, {"w": WEIGHT, "turns": np.int64(3), "true": np.bool_(True)})
    model.proto.graph.value_info.append(value("last", TensorProto.DOUBLE, ["n", 6]))
    assert prepared_alike(model, {"n": 3}).dtype("last") == "float32"


def test_inputs_that_are_outputs_and_constants_that_are_outputs_stay() -> None:
    nodes = [node("Identity", "w", "c"), node("Identity", "x", "z", "same"), node("Mul", "x w", "y")]
    done = prepared_alike(raw(nodes, {"x": ((6, 6), "float64")}, {"w": WEIGHT}, outputs=("y", "z", "c")))
    assert [o.dtype for o in done.outputs] == ["float64"] * 3


def test_what_is_beyond_fp32_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'far' holds 1e\+40"):
        prepare(raw([node("Mul", "x far", "y")], X, {"far": np.float64(1e40)}))


def test_limits_stay_limits_and_small_scalars_no_zero() -> None:
    wide = np.finfo(np.float64)
    made = narrowed(np.array([wide.max, wide.min, np.inf, -np.inf, 0, -1e-300]), "mask")
    narrow = np.finfo(np.float32)
    assert made.tolist() == [float(narrow.max), float(narrow.min), np.inf, -np.inf, 0, 0]
    assert narrowed(np.float64([-1e-300]), "epsilon").item() == -narrow.tiny
    assert np.isnan(narrowed(np.array([np.nan, 1]), "nan")).tolist() == [True, False]


def test_what_onnx_runtime_has_no_fp64_kernel_for_is_compared_in_fp32() -> None:
    model = raw(
        [node("Conv", "x w", "y")], {"x": ((1, 4, 6, 6), "float64")}, {"w": normal(4, 4, 3, 3).astype(np.float64)}
    )
    with pytest.raises(EngineError, match="Could not find an implementation for Conv"):
        ort.session(model.proto)
    (made,) = float_session(model, "the model").run(None, feeds(model))
    assert made.dtype == np.float64


def test_the_bits_of_a_double_are_not_those_of_a_float() -> None:
    nodes = [node("Mul", "x two", "m"), node("BitCast", "m", "y", to=TensorProto.INT64)]
    made = prepare(raw(nodes, X, {"two": np.full(1, 2.0)}, opset=26))
    (bits,) = [n for n in made.graph.node if n.op_type == "BitCast"]
    before = made.producer(bits.input[0])
    assert before is not None and before.op_type == "Cast" and made.dtype(bits.input[0]) == "float64"


def test_a_model_of_other_domains_alone_stays() -> None:
    """What each operator takes is FP64; a Cast would need the default domain, which the model does not import."""
    tree = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[0.0], scale=[1.0])
    start = helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", 6])
    graph = helper.make_graph([tree], "g", [start], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])])
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 3)], ir_version=10))
    assert operators(prepare(model)) == ["Scaler"] and not prepare(model).notes
