"""Sequences become tensors with the same values, wherever their readers allow it; what cannot be is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
from graphs import node, normal
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.backends import rtx
from engines.backends.compiler import ShapeRange
from engines.core import onnx_runtime as ort
from engines.core.errors import BuildError
from qdq.model.model import Model
from qdq.model.nodes import all_nodes
from qdq.model.storage import load
from qdq.passes.prepare import prepare

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
value = helper.make_tensor_value_info
X = normal(4, 3, 16)
NUMBERS = {name: np.array(number) for name, number in {"zero": 0, "one": 1, "two": 2, "last": -1}.items()}
NUMBERS |= {
    "front": np.array([0]),
    "parts": np.array([1, 3]),
    "both": np.array([2, 2]),
    "w": normal(16, 16, seed=1),
    "yes": np.array(True),
}


def graph(
    nodes: Sequence[NodeProto], rows: int | str = "T", outputs: Mapping[str, int] | None = None
) -> onnx.ModelProto:
    """As an exporter writes it: x (rows, 3, 16) -> outputs, y where none are given."""
    ends = [value(name, kind, None) for name, kind in (outputs or {"y": FLOAT}).items()]
    stored = [numpy_helper.from_array(array, name) for name, array in NUMBERS.items()]
    made = helper.make_graph(nodes, "g", [value("x", FLOAT, [rows, 3, 16])], ends, stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def loop(*steps: NodeProto, element: str = "e", insert: str = "so_far e", trip: str = "rows") -> list[NodeProto]:
    """A scripted loop that appends an element a turn, by default relu of a product of row `turn`, to `parts_made`."""
    sequence = helper.make_tensor_sequence_value_info
    inner = [*steps] or [
        node("Gather", "x turn", "row", axis=0),
        node("MatMul", "row w", "p", "product"),
        node("Relu", "p", element),
    ]
    inner += [node("SequenceInsert", insert, "longer"), node("Identity", "go", "on")]
    given = [value("turn", INT, []), value("go", BOOL, []), sequence("so_far", FLOAT, None)]
    body = helper.make_graph(inner, "body", given, [value("on", BOOL, []), sequence("longer", FLOAT, None)])
    return [
        node("Shape", "x", "shape", "shape"),
        node("Gather", "shape zero", "rows", "rows"),
        node("SequenceEmpty", "", "empty"),
        node("Loop", f"{trip} yes empty", "parts_made", body=body),
    ]


def same(proto: onnx.ModelProto, x: np.ndarray = X) -> Model:
    """The prepared model, which has no sequence and gives what the model gave."""
    done = prepare(load(proto))
    assert not [n.op_type for n in all_nodes(done.graph) if "Sequence" in n.op_type]
    want, got = (ort.session(p).run(None, {"x": x}) for p in (proto, done.proto))
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(want, got, strict=True))
    return done


@pytest.mark.parametrize(
    "joined",
    [*({"axis": axis, "new_axis": 1} for axis in (0, 1, 2, -1)), *({"axis": axis} for axis in (0, 1, -1))],
)
def test_what_a_loop_appends_is_stacked(joined: dict[str, int]) -> None:
    model = same(graph([*loop(), node("ConcatFromSequence", "parts_made", "y", **joined)]))
    assert "product" in model.inner_nodes


def test_elements_and_length_of_what_a_loop_appends() -> None:
    readers = [
        node("SequenceAt", "parts_made last", "y"),
        node("SequenceAt", "parts_made one", "z", "second"),
        node("SequenceLength", "parts_made", "n"),
    ]
    same(graph([*loop(), *readers], outputs={"y": FLOAT, "z": FLOAT, "n": INT}))


def test_a_state_that_is_appended_too() -> None:
    """A recurrence over a list, as torch.jit.script gives it: the state, and all states."""
    proto = graph([*loop(), node("ConcatFromSequence", "parts_made", "y", axis=0, new_axis=1)])
    holder = next(n for n in proto.graph.node if n.op_type == "Loop")
    body = next(a.g for a in holder.attribute if a.HasField("g"))
    body.input.insert(2, value("h", FLOAT, None))
    body.output.insert(1, value("e", FLOAT, None))
    body.node.insert(2, node("Add", "p h", "s", "sum"))
    next(n for n in body.node if n.op_type == "Relu").input[0] = "s"
    holder.input.insert(2, "first")
    holder.output.insert(0, "end")
    proto.graph.node.insert(0, node("Gather", "x zero", "first", "first_row", axis=0))
    proto.graph.output.append(value("end", FLOAT, None))
    same(proto)


SPLITS = {
    "ones kept": ("x", {}, "one"),
    "ones dropped": ("x", {"keepdims": 0}, "one"),
    "ones from behind": ("x", {"keepdims": 0}, "last"),
    "a scalar of one, dropped": ("x one", {"keepdims": 0}, "two"),
    "equal parts": ("x two", {}, "one"),
    "given parts": ("x parts", {}, "one"),
    "given parts from behind": ("x parts", {}, "last"),
    "another axis": ("x", {"axis": -2, "keepdims": 0}, "two"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_parts_of_a_split(case: str) -> None:
    inputs, attributes, index = SPLITS[case]
    split = node("SplitToSequence", inputs, "s", **attributes)
    readers = [node("SequenceAt", f"s {index}", "y"), node("SequenceLength", "s", "n")]
    same(graph([split, *readers], outputs={"y": FLOAT, "n": INT}))


@pytest.mark.parametrize("rows", [4, 5])
def test_the_last_equal_part_may_be_shorter(rows: int) -> None:
    split = node("SplitToSequence", "x two", "s")
    readers = [node("SequenceAt", "s two" if rows == 5 else "s one", "y"), node("SequenceLength", "s", "n")]
    same(graph([split, *readers], outputs={"y": FLOAT, "n": INT}), normal(rows, 3, 16))


def test_a_split_that_is_joined_again() -> None:
    same(graph([node("SplitToSequence", "x two", "s"), node("ConcatFromSequence", "s", "y", axis=0)]))


@pytest.mark.parametrize(("parts", "keepdims"), [("two", 1), ("both", 1), ("", 1), ("", 0)])
@pytest.mark.parametrize("new", [0, 1])
def test_parts_of_known_number_are_joined_along_another_axis(parts: str, keepdims: int, new: int) -> None:
    split = node("SplitToSequence", f"x {parts}".strip(), "s", keepdims=keepdims)
    nodes = [split, node("ConcatFromSequence", "s", "y", axis=1, new_axis=new), node("SequenceLength", "s", "n")]
    same(graph(nodes, 4, outputs={"y": FLOAT, "n": INT}))


def test_parts_of_an_open_number_stay() -> None:
    """Of the length of an input, which the file leaves open."""
    nodes = [node("SplitToSequence", "x two", "s"), node("ConcatFromSequence", "s", "y", axis=1)]
    assert [n.op_type for n in prepare(load(graph(nodes))).graph.node] == ["SplitToSequence", "ConcatFromSequence"]


@pytest.mark.parametrize("new", [0, 1])
def test_lists(new: int) -> None:
    nodes = [
        node("Relu", "x", "a"),
        node("Neg", "x", "b"),
        node("SequenceConstruct", "a b", "s"),
        node("SequenceInsert", "s x zero", "s2", "front"),
        node("SequenceInsert", "s2 a", "s3", "back"),
        node("SequenceErase", "s3 one", "s4"),
        node("ConcatFromSequence", "s4", "y", axis=1, new_axis=new),
        node("SequenceLength", "s4", "n"),
        node("SequenceAt", "s4 last", "z"),
    ]
    same(graph(nodes, outputs={"y": FLOAT, "n": INT, "z": FLOAT}))


@pytest.mark.parametrize("width", [1, 2])
def test_a_slice_at_the_turn_becomes_a_gather_that_compiles(width: int) -> None:
    """x[t:t+1] of any length; parts of two where the length is fixed."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    split = [node("SplitToSequence", "x two" if width == 2 else "x", "s"), node("SequenceLength", "s", "count")]
    steps = [node("SequenceAt", "s turn", "row"), node("MatMul", "row w", "p", "product"), node("Relu", "p", "e")]
    if width == 1:
        split = [node("Identity", "x", "again")]
        steps[:1] = [
            node("Add", "turn one", "next"),
            node("Unsqueeze", "turn front", "from", "from"),
            node("Unsqueeze", "next front", "to", "to"),
            node("Slice", "x from to front", "row"),
        ]
    first, second, *rest = loop(*steps, trip="count" if width == 2 else "rows")
    nodes = [first, second, *split, *rest, node("ConcatFromSequence", "parts_made", "y", axis=0)]
    model = same(graph(nodes, "T" if width == 1 else 4))
    assert "Slice" not in {model.node(name).op_type for name in model.inner_nodes}
    rtx.build(model.proto, shapes={"x": ShapeRange.fixed((4, 3, 16))} if width == 1 else {})


def test_a_slice_that_may_be_cut_short_stays_and_is_named() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    split = [node("SplitToSequence", "x two", "s"), node("SequenceLength", "s", "count")]
    steps = [node("SequenceAt", "s turn", "row"), node("MatMul", "row w", "p", "product"), node("Relu", "p", "e")]
    first, second, *rest = loop(*steps, trip="count")
    model = same(graph([first, second, *split, *rest, node("ConcatFromSequence", "parts_made", "y", axis=0)]))
    with pytest.raises(BuildError, match="at a place that the turn decides") as refused:
        rtx.build(model.proto, shapes={"x": ShapeRange.fixed((4, 3, 16))})
    assert refused.value.nodes[-1] == "sequenceat_Slice"


@pytest.mark.parametrize(("turns", "fits"), [(3, True), (4, False)])
def test_windows_that_overlap_are_gathered_where_the_last_one_ends_inside(turns: int, fits: bool) -> None:
    """x[2t : 2t + 4] of eight rows: the fourth window has two."""
    steps = [
        node("Mul", "turn two", "place"),
        node("Add", "place four", "stop"),
        node("Unsqueeze", "place front", "from", "from"),
        node("Unsqueeze", "stop front", "to", "to"),
        node("Slice", "x from to front", "window"),
        node("ReduceMax", "window", "e", axes=[0]),
    ]
    nodes = [*loop(*steps, trip="turns"), node("ConcatFromSequence", "parts_made", "y", axis=0)]
    proto = graph(nodes, 8)
    stored = {"four": np.array(4), "turns": np.array(turns)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    model = same(proto, normal(8, 3, 16))
    assert ("Slice" in {model.node(name).op_type for name in model.inner_nodes}) is not fits


@pytest.mark.parametrize(
    ("index", "width", "turns", "kept"),
    [
        (TensorProto.INT32, 2, 4, False),  # indices of the same type are needed
        (INT, 1, 8, False),
        (INT, 1, 9, True),  # the last turn takes nothing, which a Gather cannot
    ],
)
def test_a_slice_by_the_turn_is_a_gather_of_its_elements(index: int, width: int, turns: int, kept: bool) -> None:
    kind = np.int32 if index == TensorProto.INT32 else np.int64
    steps = [
        node("Cast", "turn", "t", to=index),
        node("Mul", "t width", "at"),
        node("Unsqueeze", "at front", "from"),
        node("Add", "from width", "to"),
        node("Slice", "x from to front_too", "window"),
        node("ReduceSum", "window front", "e", keepdims=0),
    ]
    proto = graph([*loop(*steps, trip="turns"), node("ConcatFromSequence", "parts_made", "y", axis=0)], 8)
    stored = {"width": np.array(width, kind), "front_too": np.array([0], kind), "turns": np.array(turns)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    model = same(proto, normal(8, 3, 16))
    assert ("Slice" in {model.node(name).op_type for name in model.inner_nodes}) is kept


UNTOUCHED = {
    "inserted in front": [*loop(insert="so_far e zero"), node("ConcatFromSequence", "parts_made", "y", axis=0)],
    "a list of unknown order": [
        node("SequenceConstruct", "x", "s"),
        node("ArgMax", "x", "i", axis=0),
        node("ReduceMax", "i", "m", keepdims=0),
        node("SequenceAt", "s m", "y"),
    ],
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_other_sequences_stay(case: str) -> None:
    done = prepare(load(graph(UNTOUCHED[case])))
    assert any("Sequence" in n.op_type for n in all_nodes(done.graph))


def test_sequences_and_text_that_stay_are_refused_with_what_to_do() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    proto = graph([node("SequenceConstruct", "x x", "y")])
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_sequence_value_info("y", FLOAT, None))
    with pytest.raises(BuildError, match="no sequences, which SequenceConstruct makes or reads: let the model give"):
        rtx.build(prepare(load(proto)).proto, shapes={"x": ShapeRange.fixed((4, 3, 16))})
    proto = graph([node("ArgMax", "x", "i", axis=0), node("Gather", "names i", "y", "pick")], outputs={"y": 8})
    proto.graph.initializer.append(helper.make_tensor("names", TensorProto.STRING, [4], [b"a", b"b", b"c", b"d"]))
    with pytest.raises(BuildError, match="no text, and tensor 'names', read by Gather 'pick', is text"):
        rtx.build(prepare(load(proto)).proto, shapes={"x": ShapeRange.fixed((4, 3, 16))})
    names = node("LabelEncoder", "i", "y", "look_up", domain="ai.onnx.ml", keys_int64s=[0], values_strings=["a"])
    proto = graph([node("ArgMax", "x", "i", axis=0), names], outputs={"y": 8})
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    with pytest.raises(BuildError, match="no text, and tensor 'y', made by LabelEncoder 'look_up', is text"):
        rtx.build(prepare(load(proto)).proto, shapes={"x": ShapeRange.fixed((4, 3, 16))})
