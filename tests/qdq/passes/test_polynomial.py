"""Polynomials of tensors say what the graph computes, for random arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from graphs import node, run
from hypothesis import given, settings, strategies as st
from onnx import TensorProto, helper

from qdq.model.model import Model
from qdq.passes.rewrites.polynomial import DEPTH, ancestors, polynomial, powers

CONSTANTS = {"half": 0.5, "minus": -1.5, "two": 2.0}
OPERATORS = ("Add", "Sub", "Mul", "Div", "Neg", "Reciprocal", "Pow")


def graph(nodes: list[onnx.NodeProto]) -> Model:
    """x and z -> nodes -> y, with every tensor an output; not prepared, so that nothing is folded."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xz"]
    made = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, [3]) for n in nodes]
    tensors = [onnx.numpy_helper.from_array(np.float32([value]), name) for name, value in CONSTANTS.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "tiny", ends, made[-1:], tensors, value_info=made[:-1]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return Model(proto=proto, directory=Path(), sha256="")


@st.composite
def arithmetic(draw: st.DrawFn) -> Model:
    """Up to six operators, each on earlier tensors and constants."""
    nodes: list[onnx.NodeProto] = []
    for index in range(draw(st.integers(1, 6))):
        op = draw(st.sampled_from(OPERATORS))
        earlier = ["x", "z", *(n.output[0] for n in nodes)]
        last = earlier[-1] if nodes else draw(st.sampled_from(earlier))
        other = draw(st.sampled_from([*earlier, *CONSTANTS]))
        reads = {"Neg": last, "Reciprocal": last, "Pow": f"{last} two"}.get(op)
        if reads is None:
            reads = f"{last} {other}" if draw(st.booleans()) else f"{other} {last}"
        nodes.append(node(op, reads, f"t{index}", f"n{index}"))
    return graph(nodes)


@given(model=arithmetic())
@settings(max_examples=60, deadline=None)
def test_value_is_that_of_the_graph(model: Model) -> None:
    rng = np.random.default_rng(0)
    sample = {name: rng.uniform(0.5, 1.5, 3).astype(np.float32) for name in "xz"}
    tensor = model.outputs[0].name
    found = polynomial(model, tensor, {"x": "x", "z": "z"})
    if found is None:
        return
    total = np.zeros(3)
    size = 0.0
    for key, factor in found.items():
        term = factor * math.prod(sample[name].astype(np.float64) ** exponent for name, exponent in key)
        total, size = total + term, max(size, float(np.abs(term).max()))
    (values,) = run(model, [sample])
    np.testing.assert_allclose(values[tensor], total, rtol=1e-4, atol=1e-5 * max(size, 1))


def test_other_operators_and_other_tensors_end_it() -> None:
    model = graph([node("Mul", "x z", "a"), node("Tanh", "a", "b"), node("Add", "b x", "c")])
    assert polynomial(model, "c", {"x": "x", "z": "z"}) is None
    assert polynomial(model, "a", {"x": "x"}) is None
    found = polynomial(model, "c", {"x": "x", "b": "t"})
    assert found is not None and found.keys() == {powers(x=1), powers(t=1)}
    assert list(ancestors(model, "c")) == ["c", "b", "x"]


def test_sums_are_not_inverted_and_what_cancels_is_gone() -> None:
    model = graph(
        [node("Add", "x z", "a"), node("Reciprocal", "a", "b"), node("Sub", "a z", "c"), node("Add", "b c", "d")]
    )
    assert polynomial(model, "b", {"x": "x", "z": "z"}) is None
    found = polynomial(model, "c", {"x": "x", "z": "z"})
    assert found is not None and found.keys() == {powers(x=1)}


def test_depth_is_bounded() -> None:
    nodes = [node("Neg", f"t{i - 1}" if i else "x", f"t{i}", f"n{i}") for i in range(DEPTH + 1)]
    model = graph(nodes)
    assert polynomial(model, f"t{DEPTH - 1}", {"x": "x"}) is not None
    assert polynomial(model, f"t{DEPTH}", {"x": "x"}) is None
