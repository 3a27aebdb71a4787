"""Multiply-adds are exact wherever the shapes decide them, and not known elsewhere: never 1 or 0 in place of a size."""

from __future__ import annotations

from collections.abc import Sequence

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.core.macs import macs
from engines.core.quantizers import read_graph
from engines.core.shapes import inferred_at


def counted(model: onnx.ModelProto, **inputs: Sequence[int]) -> list[int | None]:
    """The multiply-adds of each product."""
    return [macs(graph, product.node) for graph, product in read_graph(model, inputs).all_products()]


def ints(g: graphs.Graph, name: str, *values: int) -> str:
    return g.init(name, np.array(values, np.int64))


def halves(computed: bool, times: int = 2, channels: int | str = 16) -> onnx.ModelProto:
    """1x1 convolutions 16 -> 16, between which the first half of the channels is cut out and put twice.

    `computed`: the size of a half is (size + 1) / 2 of a Shape, as exporters write `chunk`; else it is a constant.
    """
    g = graphs.Graph()
    y = "x"
    axis, start, one, two = ints(g, "axis", 1), ints(g, "start", 0), ints(g, "one", 1), ints(g, "two", 2)
    for k in range(times):
        if computed:
            size = g.add("Gather", [g.add("Shape", [y], name=f"shape{k}"), axis], name=f"size{k}")
            end = g.add("Div", [g.add("Add", [size, one], name=f"plus{k}"), two], name=f"half{k}")
        else:
            end = ints(g, f"end{k}", 8)
        half = g.add("Slice", [y, start, end, axis], name=f"cut{k}")
        twice = g.add("Concat", [half, half], name=f"twice{k}", axis=1)
        y = g.add("Conv", [twice, g.weight(f"w{k}", [16, 16, 1, 1], fmt=None)], name=f"conv{k}")
    return g.finish(y, [1, channels, 8, 8], [1, 16, 8, 8])


@pytest.mark.parametrize("times", [1, 5])
def test_sizes_that_are_computed_from_a_shape_count_as_constants_do(times: int) -> None:
    expected = [16 * 64 * 16] * times
    assert counted(halves(False, times)) == counted(halves(True, times)) == expected
    assert counted(halves(True, times, "channels"), x=(1, 16, 8, 8)) == expected


def test_the_nodes_of_the_graph_stay_as_they_are() -> None:
    model = halves(True)
    shown = inferred_at(model, {})
    assert [n.op_type for n in shown.node] == [n.op_type for n in model.graph.node]
    assert {v.name for v in shown.value_info} >= {name for n in model.graph.node[:-1] for name in n.output}


def test_an_open_size_is_not_known_until_it_is_given() -> None:
    g = graphs.Graph()
    flat = g.add("Reshape", ["x", ints(g, "rows", -1, 64)], name="flat")
    a = g.add("Gemm", [flat, g.weight("w", [64, 32], fmt=None)], name="a")
    back = g.add("Reshape", [a, ints(g, "back", -1, 8, 32)], name="back")
    y = g.add("MatMul", [back, g.weight("v", [32, 4], fmt=None)], name="b")
    model = g.finish(y, ["batch", 8, 64], ["batch", 8, 4])
    assert counted(model) == [None, None]
    assert counted(model, x=(4, 8, 64)) == [4 * 8 * 64 * 32, 4 * 8 * 32 * 4]


def test_an_input_of_the_same_named_size_follows() -> None:
    nodes = [helper.make_node("MatMul", ["x", "z"], ["y"], name="m")]
    ends = [graphs.value("x", ["n", 4]), graphs.value("z", [4, "n"])], [graphs.value("y", ["n", "n"])]
    assert counted(graphs.model(nodes, *ends), x=(6, 4)) == [6 * 6 * 4]


def test_a_size_that_depends_on_data_is_not_known() -> None:
    g = graphs.Graph()
    found = g.add("Transpose", [g.add("NonZero", ["x"], name="found")], name="turned")
    rows = g.add("Cast", [found], name="rows", to=TensorProto.FLOAT)
    y = g.add("MatMul", [rows, g.weight("w", [2, 4], fmt=None)], name="m")
    assert counted(g.finish(y, [3, 3], ["found", 4])) == [None]


@pytest.mark.parametrize("stated", [True, False])
def test_behind_an_unknown_operator_what_the_file_states_counts(stated: bool) -> None:
    nodes = [
        helper.make_node("Strange", ["x"], ["a"], name="strange", domain="custom"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="m"),
    ]
    info = [graphs.value("a", ["batch", 5, 8])] if stated else []
    ends = [graphs.value("x", ["batch", 3])], [graphs.value("y", ["batch", 5, 4])]
    weight = [graphs.const("w", np.ones((8, 4), np.float32))]
    graph = helper.make_graph(nodes, "g", *ends, weight, value_info=info)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("custom", 1)])
    assert counted(model, x=(7, 3)) == ([7 * 5 * 8 * 4] if stated else [None])
    assert counted(model) == [None]


def test_large_values_are_not_computed() -> None:
    """A shape of a trillion elements would fill the memory."""
    g = graphs.Graph()
    huge = g.add("ConstantOfShape", [ints(g, "size", 10**12)], name="huge")
    total = g.add("Unsqueeze", [g.add("ReduceSum", [huge], name="sum", keepdims=0), ints(g, "front", 0)], name="u")
    cut = g.add("Slice", ["x", ints(g, "start", 0), g.add("Cast", [total], name="c", to=7), ints(g, "a", 1)], name="s")
    y = g.add("MatMul", [cut, g.weight("w", [4, 4], fmt=None)], name="m")
    assert counted(g.finish(y, [2, 4], [2, "n"])) == [None]


def padded(group: int, *, pad: bool) -> onnx.ModelProto:
    """A quantized 3x3 convolution of 12 channels, with 2 zero channels put behind those of each group, or none."""
    g = graphs.Graph()
    each = 12 // group
    source = "x"
    if pad and group > 1:
        source = g.add("Reshape", [source, ints(g, "apart", 0, group, each, 8, 8)], name="apart_")
        source = g.add("Pad", [source, ints(g, "pads", 0, 0, 0, 1, 1, 0, 0, 2, 1, 1)], name="pad")
        source = g.add("Reshape", [source, ints(g, "joined", 0, group * (each + 2), 10, 10)], name="joined_")
    elif pad:
        source = g.add("Pad", [source, ints(g, "pads", 0, 0, 1, 1, 0, 2, 1, 1)], name="pad")
    shifted = g.add("Sub", [source, g.init("shift", np.float32(0.1))], name="shifted")
    w = g.weight("w", [12, each + 2 * pad, 3, 3])
    around = 0 if pad else 1
    y = g.add("Conv", [g.activation(shifted), w], name="conv", group=group, pads=[around] * 4)
    return g.finish(y, [1, 12, 8, 8], [1, 12, 8, 8])


@pytest.mark.parametrize("group", [1, 3, 12])
def test_channels_of_zeros_are_nobodys_multiply_adds(group: int) -> None:
    assert counted(padded(group, pad=True)) == counted(padded(group, pad=False)) == [12 * 64 * 12 // group * 9]


def test_padded_heads_and_rows_of_matrices_count_as_without() -> None:
    g = graphs.Graph()
    more, wide = ints(g, "more", 0, 0, 0, 0, 0, 0, 0, 4), ints(g, "wide", 0, 0, 0, 4)
    heads = g.add("Pad", ["x", more], name="heads")
    keys = g.add("Transpose", [heads], name="keys", perm=[0, 1, 3, 2])
    scores = g.add("MatMul", [heads, keys], name="scores")
    mixed = g.add("MatMul", [scores, heads], name="mix")
    flat = g.add("Reshape", ["x", ints(g, "flat", 60, 12)], name="flat_")
    rows = g.add("MatMul", [g.add("Pad", [flat, wide], name="rows_"), g.weight("w", [16, 7], fmt=None)], name="rows")
    y = g.add("Add", [g.add("ReduceMax", [mixed], name="a", keepdims=0), rows], name="y")
    scores_macs = 2 * 3 * 10 * 10 * 12
    assert counted(g.finish(y, [2, 3, 10, 12], [60, 7])) == [scores_macs, scores_macs, 60 * 12 * 7]


@pytest.mark.parametrize(
    ("equation", "a", "b", "expected"),
    [
        ("...ij,...jk->...ik", [2, 3, 4, 5], [2, 3, 5, 6], 2 * 3 * 4 * 5 * 6),
        ("...ij,jk->...ik", [2, 3, 4, 5], [5, 6], 2 * 3 * 4 * 5 * 6),
        ("b...i,i...->b...", [2, 1, 4, 5], [5, 3, 4], 2 * 3 * 4 * 5),
        ("bij,bjk->bik", [7, 4, 5], [7, 5, 6], 7 * 4 * 5 * 6),
    ],
)
def test_einsum_multiplies_every_index_once(equation: str, a: list[int], b: list[int], expected: int) -> None:
    node = helper.make_node("Einsum", ["a", "b"], ["y"], name="e", equation=equation)
    graph = helper.make_graph([node], "g", [graphs.value("a", a), graphs.value("b", b)], [graphs.value("y", [])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    assert counted(model) == [expected]


def test_of_nothing_nothing_is_multiplied() -> None:
    assert counted(graphs.conv(batch="n", data=None, fmt=None), x=(0, 16, 8, 8)) == [0]


def compound(op_type: str, shapes: Sequence[Sequence[int]], **attributes: int) -> int | None:
    names = [f"i{k}" if shape else "" for k, shape in enumerate(shapes)]
    node = helper.make_node(op_type, names, ["y"], name="c", **attributes)
    inputs = [graphs.value(name, shape) for name, shape in zip(names, shapes, strict=True) if name]
    graph = helper.make_graph([node], "g", inputs, [graphs.value("y", [])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return macs(read_graph(model, {}), node)


@pytest.mark.parametrize(("op_type", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_recurrence_multiplies_its_weights_at_every_step(op_type: str, gates: int) -> None:
    shapes = [[20, 2, 32], [1, gates * 16, 32], [1, gates * 16, 16]]
    assert compound(op_type, shapes, hidden_size=16) == 20 * 2 * gates * 16 * (32 + 16)


def test_attention_has_two_products() -> None:
    expected = 2 * 4 * 10 * 16 * (32 + 24)
    assert compound("Attention", [[2, 4, 10, 32], [2, 4, 16, 32], [2, 4, 16, 24]]) == expected
    heads = {"q_num_heads": 4, "kv_num_heads": 2}
    assert compound("Attention", [[2, 10, 128], [2, 16, 64], [2, 16, 48]], **heads) == expected
    past = [[2, 4, 10, 32], [2, 4, 6, 32], [2, 4, 6, 24], [], [2, 4, 10, 32], [2, 4, 10, 24]]
    assert compound("Attention", past) == expected
