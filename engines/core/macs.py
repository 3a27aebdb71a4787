"""How many multiply-adds a product takes, from the shapes of what it reads and makes. Must not guess a size."""

from __future__ import annotations

import math
from itertools import zip_longest

from onnx import NodeProto

from engines.core.nodes import attribute, attribute_value
from engines.core.quantizers import QuantizedGraph


def macs(graph: QuantizedGraph, node: NodeProto) -> int | None:
    """Multiply-adds of a product; None where a size that they depend on is not known.

    Conv: output elements x weight elements per output channel. ConvTranspose: input elements x weight elements
    per input channel. Gemm and MatMul: output elements x inner length. Einsum: product of all index lengths.
    """
    a, b, out = (_sizes(graph, name) for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Conv":
        return None if b is None or out is None else math.prod(out) * math.prod(b[1:])
    if a is None or b is None:
        return None
    if node.op_type == "ConvTranspose":
        return math.prod(a) * math.prod(b[1:])
    if node.op_type == "Einsum":
        return _einsum(node, a, b)
    if node.op_type == "Gemm":
        rows, inner = a[::-1] if attribute(node, "transA", 0) else a
        return rows * inner * b[0 if attribute(node, "transB", 0) else 1]
    batch = math.prod(map(_broadcast, zip_longest(reversed(a[:-2]), reversed(b[:-2]), fillvalue=1)))
    return batch * (a[-2] if len(a) > 1 else 1) * a[-1] * (b[-1] if len(b) > 1 else 1)


def _sizes(graph: QuantizedGraph, name: str) -> tuple[int, ...] | None:
    """The shape of a tensor; None where a size of it is not known."""
    shape = graph.shape(name) or ()
    sizes = tuple(size for size in shape if size is not None)
    return None if graph.shape(name) is None or len(sizes) < len(shape) else sizes


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
