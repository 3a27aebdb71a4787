"""How many multiply-adds a product takes, from the shapes of what it reads and makes. Must not guess a size.

Zeros that a Pad puts around channels, as quantizers and compilers do to fill their kernels, are nobody's
multiply-adds: the same network has the same count in every type.
"""

from __future__ import annotations

import math
from itertools import zip_longest

from onnx import NodeProto

from engines.core.nodes import attribute, attribute_value, ints
from engines.core.operators import COMPOUNDS, family
from engines.core.quantizers import QuantizedGraph

# What leaves every value at its place; where there are two operands, the second is constant.
IN_PLACE = family("Add Cast DequantizeLinear Div Identity Mul QuantizeLinear Sub TRT_FP4DynamicQuantize")


def macs_in_all(graph: QuantizedGraph, node: NodeProto) -> int | None:
    """Multiply-adds as of `macs`, in all turns of the body that the node is in; of one where these are not known."""
    once = macs(graph, node)
    return once if once is None or graph.turns is None else once * graph.turns


def macs(graph: QuantizedGraph, node: NodeProto) -> int | None:
    """Multiply-adds of a product or compound when it runs once; None where a size that they depend on is not known.

    Conv: output elements x weight elements per output channel. ConvTranspose: input elements x weight elements
    per input channel. Gemm and MatMul: output elements x inner length. Einsum: product of all index lengths.
    GRU, LSTM and RNN: steps x batch x weight elements. Attention: those of its two products.
    """
    if node.op_type in COMPOUNDS:
        return _compound(graph, node)
    a, b, out = (_sizes(graph, name) for name in (*node.input[:2], node.output[0]))
    if a is None or b is None or (out is None and node.op_type == "Conv"):
        return None
    if node.op_type == "Conv" and out is not None:
        return math.prod(out) * math.prod(b[1:]) * _real(graph, node.input[0], a)[1] // max(a[1], 1)
    if node.op_type == "ConvTranspose":
        return math.prod(a) * math.prod(b[1:])
    if node.op_type == "Einsum":
        return _einsum(node, a, b)
    if node.op_type == "Gemm":
        inner, columns = (1, 0) if attribute(node, "transB", 0) else (0, 1)
        rows, along = (1, 0) if attribute(node, "transA", 0) else (0, 1)
        return a[rows] * min(_real(graph, node.input[0], a)[along], b[inner]) * b[columns]
    left, right = _real(graph, node.input[0], a), _real(graph, node.input[1], b)
    batch = math.prod(map(_broadcast, zip_longest(reversed(a[:-2]), reversed(b[:-2]), fillvalue=1)))
    inner = min(left[-1], right[-2] if len(right) > 1 else right[-1])
    return batch * (a[-2] if len(a) > 1 else 1) * inner * (right[-1] if len(right) > 1 else 1)


def _sizes(graph: QuantizedGraph, name: str) -> tuple[int, ...] | None:
    """The shape of a tensor; None where a size of it is not known."""
    shape = graph.shape(name)
    sizes = tuple(size for size in shape or () if size is not None)
    return None if shape is None or len(sizes) < len(shape) else sizes


def _real(graph: QuantizedGraph, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a tensor of that shape without the zeros that a Pad put around it, where that can be followed."""
    node = graph.producer(name)
    before = _sizes(graph, node.input[0]) if node is not None and node.input else None
    if node is None or before is None:
        return shape
    if node.op_type in IN_PLACE and before == shape:
        alone = len(node.input) == 1 or graph.is_constant(node.input[1])
        return _real(graph, node.input[0], before) if alone else shape
    if node.op_type == "Pad" and attribute_value(node, "mode", b"constant") == b"constant":
        return tuple(map(min, _real(graph, node.input[0], before), shape))
    if node.op_type == "Transpose":
        real = _real(graph, node.input[0], before)
        return tuple(real[axis] for axis in ints(node, "perm", [*range(len(real))][::-1]))
    if node.op_type == "Reshape":
        return _reshaped(_real(graph, node.input[0], before), before, shape)
    return shape


def _reshaped(real: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    """The real sizes of a tensor in another shape: those of axes that stay or that become one axis; else all of it."""
    found, start = list(after), 0
    for axis, size in enumerate(after):
        end = start
        while end < len(before) and math.prod(before[start:end]) < size:
            end += 1
        if end == start and end < len(before) and before[end] == 1:
            end += 1
        if math.prod(before[start:end]) != size:
            return after  # an axis is cut apart
        found[axis], start = math.prod(real[start:end]), end
    return tuple(found)


def _broadcast(sizes: tuple[int, int]) -> int:
    """The size of two that are equal or 1."""
    return sizes[1] if sizes[0] == 1 else sizes[0]


def _einsum(node: NodeProto, *shapes: tuple[int, ...]) -> int | None:
    """Product of the lengths of all indices, those that an ellipsis stands for counted from the right."""
    terms = attribute_value(node, "equation", b"").decode().replace(" ", "").split("->")[0].split(",")
    sizes: dict[str | int, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        if hidden < 0 or (hidden and not dots):
            return None
        for index, size in zip((*before, *range(-hidden, 0), *after), shape, strict=True):
            sizes[index] = _broadcast((sizes.get(index, 1), size))
    return math.prod(sizes.values())


def _compound(graph: QuantizedGraph, node: NodeProto) -> int | None:
    """Of a recurrence or of an Attention; of the latter with the keys and values that it is given of the past."""
    first, second, third = (_sizes(graph, name) for name in node.input[:3])
    if first is None or second is None or third is None:
        return None
    if node.op_type != "Attention":
        return first[0] * first[1] * (math.prod(second) + math.prod(third))
    past = _sizes(graph, node.input[4]) if len(node.input) > 4 and node.input[4] else (0, 0, 0)
    if past is None:
        return None
    if len(first) == 4:  # batch, heads, rows, size
        return math.prod(first[:3]) * (second[2] + past[2]) * (first[3] + third[3])
    batch, rows, wide = first
    mixed = attribute(node, "q_num_heads", 1) * third[2] // attribute(node, "kv_num_heads", 1)
    return batch * rows * (second[1] + past[2]) * (wide + mixed)
