"""How often the products of a body run: turns of Loop and Scan that the graph or given sizes decide; nested ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.core.macs import macs
from engines.core.quantizers import read_graph

node, FLOAT, INT, BOOL = helper.make_node, TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
W = graphs.const("w", np.eye(4, dtype=np.float32))


def body(*inner: onnx.NodeProto, on: Sequence[onnx.NodeProto] = (), name: str = "h") -> onnx.GraphProto:
    """A turn that carries `name`: a product with w, and what else is asked for; it goes on while it is told to."""
    end = [*(on or [node("Identity", [f"{name}_go"], [f"{name}_on"])])]
    ends = [graphs.value(f"{name}_i", [], INT), graphs.value(f"{name}_go", [], BOOL), graphs.value(name, ["n", 4])]
    made = [graphs.value(f"{name}_on", [], BOOL), graphs.value(f"{name}_2", ["n", 4])]
    nodes = [node("MatMul", [name, "w"], [f"{name}_p"], f"{name}_product"), *inner]
    last = inner[-1].output[0] if inner else f"{name}_p"
    return helper.make_graph([*nodes, node("Tanh", [last], [f"{name}_2"]), *end], f"{name}_body", ends, made)


def turns(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    shapes: Mapping[str, Sequence[int]],
    *stored: onnx.TensorProto,
) -> dict[str, tuple[int | None, int | None]]:
    """Of each product: its turns, and its multiply-adds in one of them."""
    ends = [graphs.value(name, shape, kind) for name, (kind, shape) in inputs.items()]
    graph = helper.make_graph(nodes, "g", ends, [graphs.value("y", [])], [W, *stored])
    graph.output[0].type.tensor_type.shape.Clear()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return {p.node.name: (g.turns, macs(g, p.node)) for g, p in read_graph(model, shapes).all_products()}


X = {"x": (FLOAT, ["n", 4])}
AT = {"x": (3, 4)}
TRIP, TRUE, FALSE = (graphs.const(n, np.array(v)) for n, v in (("trip", 5), ("yes", True), ("no", False)))


@pytest.mark.parametrize("start", ["", "yes"])
def test_a_constant_trip_count(start: str) -> None:
    loop = node("Loop", ["trip", start, "x"], ["y"], body=body())
    assert turns([loop], X, AT, TRIP, TRUE) == {"h_product": (5, 3 * 4 * 4)}


def test_a_trip_count_in_a_constant_node_and_a_condition_that_is_always_true() -> None:
    count = node("Constant", [], ["count"], value=graphs.const("", np.array(7)))
    on = [node("Constant", [], ["t"], value=graphs.const("", np.array(True))), node("Identity", ["t"], ["h_on"])]
    assert turns([count, node("Loop", ["count", "", "x"], ["y"], body=body(on=on))], X, AT) == {"h_product": (7, 48)}


def test_a_trip_count_that_is_a_size() -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "front"], ["rows"]),
        node("Mul", ["rows", "two"], ["count"]),
        node("Loop", ["count", "", "x"], ["y"], body=body()),
    ]
    stored = (graphs.const("front", np.array(0)), graphs.const("two", np.array(2)))
    assert turns(nodes, X, AT, *stored) == {"h_product": (6, 48)}


@pytest.mark.parametrize("case", ["given", "ends itself", "told not to start", "no count"])
def test_what_depends_on_values_is_not_known(case: str) -> None:
    inputs = X | ({"count": (INT, [])} if case == "given" else {})
    on = [node("ReduceMax", ["h_p"], ["m"], keepdims=0), node("Cast", ["m"], ["h_on"], to=BOOL)]
    trip = {"given": "count", "no count": ""}.get(case, "trip")
    start = "no" if case == "told not to start" else "yes"
    loop = node("Loop", [trip, start, "x"], ["y"], body=body(on=on if case == "ends itself" else ()))
    assert turns([loop], inputs, AT, TRIP, TRUE, FALSE) == {"h_product": (None, 48)}


def test_loops_in_loops_and_branches_in_them() -> None:
    inner = node("Loop", ["trip", "", "h_p"], ["z"], body=body(name="k"))
    outer = node("Loop", ["three", "", "x"], ["y"], body=body(inner))
    found = turns([outer], X, AT, TRIP, graphs.const("three", np.array(3)))
    assert {name: count for name, (count, _) in found.items()} == {"h_product": 3, "k_product": 15}


def test_a_scan_runs_as_often_as_what_it_scans_is_long() -> None:
    ends = [graphs.value("h", [3, 4]), graphs.value("s", [3, 4])]
    made = [graphs.value("h_2", [3, 4]), graphs.value("o", [3, 4])]
    nodes = [
        node("MatMul", ["s", "w"], ["p"], "product"),
        node("Add", ["p", "h"], ["h_2"]),
        node("Identity", ["h_2"], ["o"]),
    ]
    scan = node(
        "Scan", ["x", "seq"], ["last", "y"], body=helper.make_graph(nodes, "b", ends, made), num_scan_inputs=1,
        scan_input_axes=[1],
    )  # fmt: skip
    inputs = X | {"seq": (FLOAT, [3, "time", 4])}
    assert turns([scan], inputs, AT | {"seq": (3, 9, 4)}) == {"product": (9, 48)}
    assert turns([scan], inputs, AT) == {"product": (None, 48)}


def test_a_state_that_grows_has_no_known_size() -> None:
    grown = node("Concat", ["h_p", "x"], ["more"], axis=0)
    loop = node("Loop", ["trip", "", "x"], ["y"], body=body(grown))
    assert turns([loop], X, AT, TRIP) == {"h_product": (5, None)}
