"""Inference follows the arithmetic of shapes, and a long vector costs it no memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.core import shapes
from engines.core.shapes import propagated

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
LENGTH = 3_000_000  # 400 MB and more of onnx's values of shapes
ALLOWED_MB = 150
# what reads a long vector; 'computed' makes the vector by a shape that is itself computed
READERS = ("Add", "Mul", "Concat", "Cast", "Slice", "Gather", "Range", "computed", "body", "constant", "int64")


def graph(
    nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, list[int]]], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    last = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "g", values, [last], stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def reading(what: str, length: int) -> onnx.ModelProto:
    """A model in which something reads long vectors."""
    node, inputs = helper.make_node, {"x": (INT64 if what == "int64" else FLOAT, [length])}
    one = {"zero": np.array([0]), "one": np.array([1])}
    if what in ("Add", "Mul", "int64"):
        return graph([node("Add" if what == "int64" else what, ["x", "x"], ["z"])], inputs, {})
    if what == "Concat":
        return graph([node("Concat", ["x", "x"], ["z"], axis=0)], inputs, {})
    if what == "Cast":
        return graph([node("Cast", ["x"], ["z"], to=TensorProto.FLOAT16)], inputs, {})
    if what == "Slice":
        return graph([node("Slice", ["x", "zero", "end"], ["z"])], inputs, {**one, "end": np.array([length - 1])})
    if what == "Gather":
        return graph([node("Gather", ["x", "one"], ["z"])], inputs, one)
    if what == "Range":
        ends = {"from": np.float32(0), "to": np.float32(length), "by": np.float32(1)}
        ends = {name: np.asarray(value) for name, value in ends.items()}
        return graph([node("Range", [*ends], ["r"]), node("Add", ["r", "r"], ["z"])], {}, ends)
    if what == "constant":
        return graph([node("Add", ["c", "c"], ["z"])], {}, {"c": np.zeros(length, np.int64)})
    if what == "body":
        then = helper.make_graph([node("Add", ["x", "x"], ["t"])], "b", [], [helper.make_empty_tensor_value_info("t")])
        same = helper.make_graph([node("Mul", ["x", "x"], ["e"])], "b", [], [helper.make_empty_tensor_value_info("e")])
        made = node("If", ["c"], ["z"], then_branch=then, else_branch=same)
        return graph([made], inputs, {"c": np.array(True)})
    flat = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["a"]), node("Gather", ["s", "one"], ["b"])]
    flat += [node("Mul", ["a", "b"], ["p"]), node("Reshape", ["x", "p"], ["v"]), node("Add", ["v", "v"], ["z"])]
    return graph(flat, {"x": (FLOAT, [length // 8, 8])}, one)


CHILD = """
import resource, sys
sys.path[:0] = {paths!r}
from test_shapes import reading, LENGTH
from engines.core.shapes import propagated
model = reading({what!r}, LENGTH)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
propagated(model)
print((peak() - before) // 1024)
"""


@pytest.mark.parametrize("what", READERS)
def test_a_long_vector_costs_no_memory(what: str) -> None:
    """The peak of a process of its own: what onnx allocates, no Python tool sees."""
    code = CHILD.format(paths=[__file__.rpartition("/")[0], *sys.path], what=what)
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert int(made.stdout) < ALLOWED_MB


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, tuple[int | str, ...]]]:
    infos = (*model.graph.value_info, *model.graph.output)
    return {
        v.name: (
            v.type.tensor_type.elem_type,
            tuple(d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim),
        )
        for v in infos
    }


@pytest.mark.parametrize("what", READERS)
def test_what_is_inferred_stays(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "LONG", 50)
    model = reading(what, 64)
    before = model.SerializeToString()
    found, usual = propagated(model), onnx.shape_inference.infer_shapes(model, data_prop=True)
    assert sizes(found) == sizes(usual)
    assert found.graph.node == usual.graph.node and found.graph.input == usual.graph.input
    assert found.graph.initializer == usual.graph.initializer
    assert model.SerializeToString() == before


def test_shapes_that_are_computed_beside_and_of_long_vectors_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch of one tensor, and the length of the vector, go through arithmetic to a Reshape."""
    monkeypatch.setattr(shapes, "LONG", 50)
    node = helper.make_node
    nodes = [
        node("Add", ["x", "bias"], ["y"]),
        node("Shape", ["bias"], ["length"]),
        node("Sub", ["length", "most"], ["part"]),
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["batch"]),
        node("Concat", ["batch", "eight", "part"], ["target"], axis=0),
        node("Reshape", ["y", "target"], ["z"]),
        node("Mul", ["bias", "bias"], ["b2"]),
        node("Add", ["b2", "bias"], ["b3"]),
        node("Unsqueeze", ["b3", "zero"], ["row"]),
        node("Add", ["row", "y"], ["w"]),
        node("Identity", ["z"], ["out"]),
    ]
    inputs = {"x": (FLOAT, ["B", 64]), "bias": (FLOAT, [64])}  # type: ignore[list-item]
    model = graph(nodes, inputs, {"zero": np.array([0]), "eight": np.array([8]), "most": np.array([56])})  # type: ignore[arg-type]
    found = sizes(propagated(model))
    assert found == sizes(onnx.shape_inference.infer_shapes(model, data_prop=True))
    assert found["out"][1] == ("B", 8, 8) and found["row"][1] == (1, 64) and found["w"][1] == ("B", 64)
    assert found["b3"][1] == (64,)
