"""If, Loop and Scan: the weighted nodes of their bodies are quantized as others are, and run INT8."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from graphs import node, normal
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from engines.backends import rtx
from engines.verify.audit import audit
from qdq.assemble.precision.convert import convert
from qdq.assemble.quantize import Quantized, quantize
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan.settings import Settings

SIZE = 64
FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def value(name: str, *shape: int | str, kind: int = FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def rows(name: str) -> ValueInfoProto:
    return value(name, 4, SIZE)


def stored(**arrays: np.ndarray) -> list[TensorProto]:
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def weight(seed: int, *shape: int) -> np.ndarray:
    return normal(*shape or (SIZE, SIZE), seed=seed) / np.float32(SIZE**0.5)


def body(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    name: str = "body",
    **arrays: np.ndarray,
) -> GraphProto:
    return helper.make_graph(nodes, name, inputs, outputs, stored(**arrays))


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    **arrays: np.ndarray,
) -> Model:
    """As a user has it, not prepared."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored(**arrays))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return Model(proto=proto, directory=Path(), sha256=hashlib.sha256(proto.SerializeToString()).hexdigest())


def branches() -> Model:
    """Two branches of the same inner names: a captured tensor times a weight of the branch, times one from outside."""

    def branch(name: str, curve: str, seed: int) -> GraphProto:
        nodes = [node("MatMul", "a w", "p", "first"), node(curve, "p", "q"), node("MatMul", "q v", "r", "second")]
        return body(nodes, [], [rows("r")], name, w=weight(seed))

    nodes = [
        node("Relu", "x", "a"),
        node("ReduceSum", "x", "s", keepdims=0),
        node("Greater", "s zero", "c"),
        node("If", "c", "y", then_branch=branch("yes", "Relu", 1), else_branch=branch("no", "Tanh", 2)),
    ]
    return model(nodes, [rows("x")], [rows("y")], zero=np.float32(0), v=weight(3))


def convolutions() -> Model:
    """Padded convolutions with a bias, shifted data in front of one, a weight behind a Transpose in the body."""
    image = value("r", 1, 8, 6, 6)
    nodes = [
        node("Conv", "a w b", "p", "padded", pads=[1, 1, 1, 1]),
        node("Relu", "p", "q"),
        node("Transpose", "u", "ut", perm=[1, 0, 2, 3]),
        node("Conv", "q ut", "r", "turned"),
    ]
    arrays = {"w": normal(8, 8, 3, 3) / 8, "b": normal(8, seed=1), "u": normal(8, 8, 1, 1, seed=2) / 4}
    then = body(nodes, [], [image], "then", **arrays)
    other = body([node("Neg", "a", "r")], [], [image], "other")
    nodes = [
        node("Sigmoid", "x", "a"),
        node("ReduceSum", "x", "s", keepdims=0),
        node("Greater", "s low", "c"),
        node("If", "c", "y", then_branch=then, else_branch=other),
    ]
    return model(nodes, [value("x", 1, 8, 6, 6)], [value("y", 1, 8, 6, 6)], low=np.float32(-1e9))


def rounds(trip: int | None = 5) -> Model:
    """A carried state, a captured tensor and weight, a weight of its own; all states stacked, the last one not read."""
    nodes = [
        node("MatMul", "h w", "p", "carried"),
        node("Add", "p a", "s"),
        node("Tanh", "s", "h2"),
        node("MatMul", "h2 u", "o", "out"),
        node("Identity", "c", "c2"),
    ]
    inputs = [value("i", kind=INT), value("c", kind=BOOL), rows("h")]
    loop = body(nodes, inputs, [value("c2", kind=BOOL), rows("h2"), rows("o")], w=weight(1))
    main = [node("Relu", "x", "a"), node("Loop", "trip true a", "last y", body=loop)]
    given = {} if trip is None else {"trip": np.array(trip)}
    fed = [value("trip", kind=INT)] if trip is None else []
    return model(main, [rows("x"), *fed], [value("y", "T", 4, SIZE)], true=np.array(True), u=weight(2), **given)


def scanned(back: int = 0) -> Model:
    """A recurrence: slices and a state times a weight each."""
    nodes = [
        node("MatMul", "xs w", "p", "slice"),
        node("MatMul", "h u", "q", "state"),
        node("Add", "p q", "s"),
        node("Tanh", "s", "h2"),
        node("Identity", "h2", "o"),
    ]
    inner = body(nodes, [rows("h"), rows("xs")], [rows("h2"), rows("o")], w=weight(1), u=weight(2))
    main = [
        node("Relu", "h0", "a"),
        node("Scan", "a x", "last y", body=inner, num_scan_inputs=1, scan_input_directions=[back]),
    ]
    return model(main, [rows("h0"), value("x", 7, 4, SIZE)], [value("y", 7, 4, SIZE), rows("last")])


def nested(outer: str = "Loop") -> Model:
    """An If in a Loop or Scan, whose branches differ from run to run."""

    def branch(name: str, curve: str, seed: int) -> GraphProto:
        nodes = [node("MatMul", "h w", "p", "product"), node(curve, "p", "r")]
        return body(nodes, [], [rows("r")], name, w=weight(seed))

    turns = [
        node("ReduceSum", "h", "s", keepdims=0),
        node("Greater", "s most", "cc"),
        node("If", "cc", "h2", then_branch=branch("yes", "Softplus", 1), else_branch=branch("no", "Sigmoid", 2)),
    ]
    most = np.float32(80)
    if outer == "Scan":
        turns += [node("Add", "h2 xs", "h3"), node("Identity", "h3", "o")]
        inner = body(turns, [rows("h"), rows("xs")], [rows("h3"), rows("o")], most=most)
        main = [node("Scan", "h0 x", "last y", body=inner, num_scan_inputs=1)]
        return model(main, [rows("h0"), value("x", 7, 4, SIZE)], [value("y", 7, 4, SIZE), rows("last")])
    inputs = [value("i", kind=INT), value("c", kind=BOOL), rows("h")]
    inner = body([*turns, node("Identity", "c", "c2")], inputs, [value("c2", kind=BOOL), rows("h2")], most=most)
    main = [node("Loop", "trip true x", "y", body=inner)]
    return model(main, [rows("x")], [rows("y")], trip=np.array(5), true=np.array(True))


MODELS: Mapping[str, Callable[[], Model]] = {
    "if": branches,
    "convolutions": convolutions,
    "loop": rounds,
    "open loop": lambda: rounds(None),
    "scan": scanned,
    "scan backwards": lambda: scanned(1),
    "if in a loop": nested,
    "if in a scan": lambda: nested("Scan"),
}
QUANTIZED = {
    "if": {"first", "second", "first_2", "second_2"},
    "convolutions": {"padded", "turned"},
    "loop": {"carried", "out"},
    "open loop": {"carried", "out"},
    "scan": {"slice", "state"},
    "scan backwards": {"slice", "state"},
    "if in a loop": {"product", "product_2"},
    "if in a scan": {"product", "product_2"},
}


def samples(prepared: Model, count: int = 8) -> list[graphs.Sample]:
    made = graphs.samples(prepared, count)
    return [{n: np.array(4) if n == "trip" else array for n, array in sample.items()} for sample in made]


def sqnr_db(wanted: Sequence[graphs.Sample], found: Sequence[graphs.Sample], name: str) -> float:
    error = sum(((a[name].astype(np.float64) - b[name]) ** 2).sum() for a, b in zip(wanted, found, strict=True))
    return float(10 * np.log10(sum((a[name].astype(np.float64) ** 2).sum() for a in wanted) / max(error, 1e-30)))


@cache
def made(name: str) -> tuple[Model, Quantized, list[graphs.Sample]]:
    raw = MODELS[name]()
    prepared = prepare(raw)
    data = samples(prepared)
    return raw, quantize(prepared, data), data


@pytest.mark.parametrize("name", MODELS)
def test_preparing_changes_no_output_and_is_done_once(name: str) -> None:
    raw = MODELS[name]()
    prepared = prepare(raw)
    onnx.checker.check_model(prepared.proto, full_check=True)
    data = samples(prepared)
    for a, b in zip(graphs.run(raw, data), graphs.run(prepared, data), strict=True):
        for key in a:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=1e-6)
    assert prepare(prepared).proto == prepared.proto


@pytest.mark.parametrize("name", MODELS)
def test_weighted_nodes_in_bodies_are_quantized_and_the_outputs_kept(name: str) -> None:
    raw, q, data = made(name)
    assert set(q.plan.quantized_nodes) == QUANTIZED[name]
    onnx.checker.check_model(q.model.proto, full_check=True)
    wanted, found = graphs.run(raw, data), graphs.run(q.model, data)
    for output in wanted[0]:
        assert sqnr_db(wanted, found, output) > 33
    entries = {s.node for s in q.plan.skips} | set(q.plan.quantized_nodes)
    assert q.prepared.inner_nodes <= entries


@pytest.mark.parametrize("low", ["fp32", "fp16"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "open loop"])
def test_products_in_bodies_run_int8(name: str, low: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    _, q, _ = made(name)
    proto = convert(q.model, unquantized_type=low, table=q.table).model.proto
    seen = audit(proto, rtx.build(proto, targets=["sm86", "sm89"]).table)
    assert {n.node: n.consumed for n in seen.nodes} == dict.fromkeys(QUANTIZED[name], "int8")


def test_values_in_bodies_are_those_of_every_run() -> None:
    prepared = prepare(rounds())
    x = samples(prepared, 1)[0]["x"]
    w, a = prepared.array("w"), np.maximum(x, 0)
    states = [a]
    for _ in range(5):
        states.append(np.tanh(states[-1] @ w + a))
    seen = Session(prepared, ["h", "h2", "a"])({"x": x})
    np.testing.assert_allclose(seen["h"], np.concatenate(states[:-1]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["h2"], np.concatenate(states[1:]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen["a"], a)


@pytest.mark.parametrize("outer", ["Loop", "Scan"])
def test_a_branch_that_runs_now_and_then_gives_the_values_of_its_runs(outer: str) -> None:
    prepared = prepare(nested(outer))
    sample = samples(prepared, 1)[0]
    seen = Session(prepared, ["h", "p", "p_2"])(sample)
    turns = seen["h"].reshape(-1, 4, SIZE)
    high = turns.sum((1, 2)) > 80
    for name, w, taken in (("p", "w", ~high), ("p_2", "w_2", high)):  # else_branch stands first
        assert (name in seen) == taken.any()
        if taken.any():
            np.testing.assert_allclose(seen[name], turns[taken].reshape(-1, SIZE) @ prepared.array(w), atol=1e-4)


def test_runs_of_other_lengths_are_joined_along_the_axis_that_differs() -> None:
    """A cache that grows by a row each turn."""
    nodes = [
        node("Concat", "h x", "h2", axis=0),
        node("MatMul", "h2 w", "p", "product"),
        node("ReduceSum", "p axes", "o", keepdims=0),
        node("Identity", "c", "c2"),
    ]
    inputs = [value("i", kind=INT), value("c", kind=BOOL), value("h", "n", SIZE)]
    outputs = [value("c2", kind=BOOL), value("h2", "m", SIZE), value("o", SIZE)]
    loop = body(nodes, inputs, outputs, axes=np.array([0]), w=weight(1))
    raw = model(
        [node("Loop", "trip true x", "last y", body=loop)],
        [rows("x")],
        [value("y", 3, SIZE)],
        trip=np.array(3),
        true=np.array(True),
    )
    prepared = prepare(raw)
    data = samples(prepared)
    seen = Session(prepared, ["h2"])(data[0])["h2"]
    np.testing.assert_array_equal(seen, np.concatenate([data[0]["x"]] * (2 + 3 + 4)))
    q = quantize(prepared, data)
    assert q.plan.quantized_nodes == ("product",)
    assert sqnr_db(graphs.run(raw, data), graphs.run(q.model, data), "y") > 33


def test_a_branch_that_no_sample_takes_stays_float_and_says_so() -> None:
    raw = branches()
    prepared = prepare(raw)
    data = [{"x": np.abs(sample["x"])} for sample in samples(prepared)]
    q = quantize(prepared, data)
    assert set(q.plan.quantized_nodes) == {"first", "first_2", "second_2"}  # the captured tensor was seen
    (skip,) = [s for s in q.plan.skips if s.rule == "unreached"]
    assert skip.node == "second" and "no calibration sample" in skip.reason
    file = q.table.to_json()
    again = quantize(prepared, data, plan=q.plan, table=q.table)
    assert again.model.proto == q.model.proto and '"samples": 0' in file


def test_the_branch_of_a_constant_condition_takes_the_place_of_the_if() -> None:
    raw = branches()
    raw.proto.graph.ClearField("node")
    nodes = [n for n in branches().graph.node if n.op_type in ("Relu", "If")]
    raw.graph.node.extend(nodes)
    raw.graph.initializer.append(numpy_helper.from_array(np.array(False), "c"))
    prepared = prepare(raw)
    assert [n.op_type for n in prepared.graph.node if n.op_type != "Identity"] == ["Relu", "MatMul", "Tanh", "MatMul"]
    data = samples(prepared, 2)
    for a, b in zip(graphs.run(raw, data), graphs.run(prepared, data), strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])


def test_what_shapes_decide_is_folded_in_bodies() -> None:
    """A branch that asks whether a size is 1, as torch exports squeeze; the size is static."""
    single = body([node("Tanh", "p", "o")], [], [rows("o")], "yes")
    several = body([node("Relu", "p", "o")], [], [rows("o")], "no")
    nodes = [
        node("MatMul", "a w", "p", "product"),
        node("Shape", "p", "shape"),
        node("Gather", "shape zero", "size"),
        node("Equal", "size one", "single"),
        node("If", "single", "q", "inner", then_branch=single, else_branch=several),
    ]
    then = body(nodes, [], [rows("q")], "then", w=weight(1), zero=np.array(0), one=np.array(1))
    other = body([node("Neg", "a", "q")], [], [rows("q")], "other")
    main = [
        node("Relu", "x", "a"),
        node("ReduceSum", "x", "s", keepdims=0),
        node("Greater", "s none", "c"),
        node("If", "c", "y", "outer", then_branch=then, else_branch=other),
    ]
    raw = model(main, [rows("x")], [rows("y")], none=np.float32(0))
    prepared = prepare(raw)
    branch = next(a.g for a in prepared.node("outer").attribute if a.name == "then_branch")
    assert [n.op_type for n in branch.node if n.op_type != "Identity"] == ["MatMul", "Relu"]
    data = samples(prepared, 4)
    for a, b in zip(graphs.run(raw, data), graphs.run(prepared, data), strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])


def test_a_quantizer_behind_a_reflected_border_in_a_body_compiles() -> None:
    """As voice detectors pad what they hear; TensorRT-RTX fails on it without an Add in between."""
    pytest.importorskip("tensorrt_rtx")

    def branch(name: str, seed: int) -> GraphProto:
        nodes = [
            node("Pad", "a pads", "b", "border", mode="reflect"),
            node("Unsqueeze", "b one", "c"),
            node("Conv", "c w", "r", "heard"),
        ]
        w, pads = normal(8, 1, 8, seed=seed) / 4, np.array([0, 4, 0, 4])
        return body(nodes, [], [value("r", 4, 8, SIZE + 1)], name, w=w, pads=pads, one=np.array([1]))

    main = [
        node("Identity", "x", "a"),
        node("ReduceSum", "x", "s", keepdims=0),
        node("Greater", "s none", "k"),
        node("If", "k", "y", then_branch=branch("yes", 1), else_branch=branch("no", 2)),
    ]
    raw = model(main, [rows("x")], [value("y", 4, 8, SIZE + 1)], none=np.float32(0))
    prepared = prepare(raw)
    data = samples(prepared)
    q = quantize(prepared, data, settings=Settings(shift=False, rounding="nearest", bias_correction="off"))
    assert set(q.plan.quantized_nodes) == {"heard", "heard_2"}
    assert sqnr_db(graphs.run(raw, data), graphs.run(q.model, data), "y") > 33
    seen = audit(q.model.proto, rtx.build(q.model.proto).table)
    assert {n.node: n.consumed for n in seen.nodes} == {"heard": "int8", "heard_2": "int8"}


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_a_recurrence_in_fp32_behind_fp16_compiles(kind: str) -> None:
    """One with sequence_lens stays FP32; TensorRT-RTX fails on the Cast in front of it without an Add in between."""
    pytest.importorskip("tensorrt_rtx")
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[kind] * 32
    tensors = {"w": weight(1, SIZE, 16), "W": weight(2, 1, gates, 16), "R": weight(3, 1, gates, 32)}
    nodes = [
        node("MatMul", "x w", "p", "before"),
        node("Transpose", "p", "t", perm=[1, 0, 2]),
        node(kind, "t W R - lengths", "h", "recurrence", hidden_size=32),
        node("Squeeze", "h one", "s"),
        node("MatMul", "s v", "y", "after"),
    ]
    tensors |= {"v": weight(4, 32, 8), "lengths": np.array([7, 4], np.int32), "one": np.array([1])}
    prepared = graphs.build(nodes, {"x": (2, 7, SIZE)}, tensors)
    data = graphs.samples(prepared)
    q = quantize(prepared, data, settings=Settings(rounding="nearest", bias_correction="off"))
    proto = convert(q.model, table=q.table).model.proto
    seen = audit(proto, rtx.build(proto).table)
    assert {n.node: n.consumed for n in seen.nodes if n.op_type == "MatMul"} == {"before": "int8", "after": "int8"}
    assert sqnr_db(graphs.run(prepared, data), graphs.run(proto, data), "y") > 33
