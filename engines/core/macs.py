"""How many multiply-adds a product takes, from the shapes of what it reads and makes. Must not count anything else."""

from __future__ import annotations

import math
from itertools import zip_longest

from onnx import NodeProto

from engines.core.nodes import attribute, attribute_value
from engines.core.quantizers import QuantizedGraph


def macs(graph: QuantizedGraph, node: NodeProto) -> int:
    """Multiply-adds of a product; 0 where a shape cannot be inferred, and 1 for a size left open.

    Conv: output elements x weight elements per output channel. ConvTranspose: input elements x weight elements
    per input channel. Gemm and MatMul: output elements x inner length. Einsum: product of all index lengths.
    """
    a, b, out = (_sizes(graph, name) for name in (*node.input[:2], node.output[0]))
    if a is None or b is None:
        return 0
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(b[1:]) if out else 0
    if node.op_type == "ConvTranspose":
        return math.prod(a) * math.prod(b[1:])
    if node.op_type == "Einsum":
        return _einsum(graph, node)
    if node.op_type == "Gemm":
        rows, inner = a[::-1] if attribute(node, "transA", 0) else a
        return rows * inner * b[0 if attribute(node, "transB", 0) else 1]
    batch = math.prod(map(max, zip_longest(reversed(a[:-2]), reversed(b[:-2]), fillvalue=1)))
    return batch * (a[-2] if len(a) > 1 else 1) * a[-1] * (b[-1] if len(b) > 1 else 1)


def _sizes(graph: QuantizedGraph, name: str) -> tuple[int, ...] | None:
    shape = graph.shape(name)
    return None if shape is None else tuple(size or 1 for size in shape)


def _einsum(graph: QuantizedGraph, node: NodeProto) -> int:
    """Product of the lengths of all indices; 0 with an ellipsis."""
    terms = attribute_value(node, "equation", b"").decode().replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        shape = _sizes(graph, name) or ()
        if "." in term or len(term) != len(shape):
            return 0
        sizes.update(zip(term, shape, strict=True))
    return math.prod(sizes.values())
