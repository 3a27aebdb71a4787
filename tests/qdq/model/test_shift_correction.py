"""A product of shifted data, corrected, gives what it gave before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qdq.model.nodes import Names
from qdq.model.shift_correction import channel_sums, correct

OFFSET = 0.75
WEIGHTS = {"Conv": (4, 2, 3, 3), "Gemm": (2, 4), "MatMul": (2, 4)}
DATA = {"Conv": (1, 2, 5, 5), "Gemm": (3, 2), "MatMul": (3, 2)}

# operator, attributes, shape of the bias, whether it takes the correction
CASES = [
    ("Conv", {}, None, True),
    ("Conv", {}, (4,), True),
    ("Conv", {}, "computed", False),
    ("Gemm", {"alpha": 0.5}, None, True),
    ("Gemm", {"transB": 1}, (1, 4), True),
    ("Gemm", {}, (), True),
    ("Gemm", {}, (3, 4), False),
    ("Gemm", {}, (3, 1), False),
    ("Gemm", {"beta": 2.0}, (4,), False),
    ("MatMul", {}, None, False),
]


def run(nodes: list[NodeProto], constants: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The output y."""
    ends = [[helper.make_tensor_value_info(n, TensorProto.DOUBLE, None)] for n in ("x", "y")]
    stored = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    made = helper.make_model(helper.make_graph(nodes, "g", *ends, stored), opset_imports=[helper.make_opsetid("", 21)])
    (y,) = ReferenceEvaluator(made).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize(("op", "attributes", "shape", "merged"), CASES, ids=str)
def test_the_shift_is_taken_back(op: str, attributes: dict[str, Any], shape: Any, merged: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=WEIGHTS[op][::-1] if attributes.get("transB") else WEIGHTS[op])
    constants = {"w": weight, "c": np.float64(OFFSET)}
    nodes = []
    if shape == "computed":
        constants["b0"] = rng.normal(size=4)
        nodes.append(helper.make_node("Neg", ["b0"], ["b"]))
    elif shape is not None:
        constants["b"] = rng.normal(size=shape)
    inputs = ["x", "w"] if shape is None else ["x", "w", "b"]
    node = helper.make_node(op, inputs, ["y"], name="n", **attributes)
    x = rng.normal(size=DATA[op])
    before = run([*nodes, node], constants, x)
    names = Names([*constants, "x", "y", "n"])

    def constant(wanted: str, values: np.ndarray) -> str:
        name = names.fresh(wanted)
        constants[name] = np.asarray(values)
        return name

    lacking = OFFSET * channel_sums(node, weight)
    added = correct(node, lacking, weight.ndim, stored=constants.get, constant=constant, fresh=names.fresh)
    assert (added is None) == merged
    node.input[0] = "shifted"
    nodes += [helper.make_node("Sub", ["x", "c"], ["shifted"]), node, *([added] if added else [])]
    np.testing.assert_allclose(run(nodes, constants, x), before, rtol=1e-9)


@pytest.mark.parametrize("shape", [(3, 2), (5, 3, 2)], ids=str)
def test_a_weight_on_either_side_of_a_product(shape: tuple[int, ...]) -> None:
    """A constant vector of c at each place of the data adds the sums to the output."""
    weight = np.random.default_rng(0).normal(size=shape)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    right, left = channel_sums(node, weight), channel_sums(node, weight, 0)
    np.testing.assert_allclose(
        np.broadcast_to(right, (np.ones((*shape[:-2], 7, 3)) @ weight).shape), np.ones((7, 3)) @ weight
    )
    np.testing.assert_allclose(np.broadcast_to(left, (*shape[:-1], 7)), weight @ np.ones((2, 7)))
