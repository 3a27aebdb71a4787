"""Small questions about one node, and new names for what a pass adds. Must not know models or passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

# Of TensorRT's parser: data -> FP4 codes and FP8 scales of blocks of 16. No standard operator does it.
FP4_QUANTIZE, TRT_DOMAIN = "TRT_FP4DynamicQuantize", "trt"


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def ints(node: NodeProto, name: str, default: list[int]) -> list[int]:
    """An attribute of integers."""
    return next((list(a.ints) for a in node.attribute if a.name == name), default)


def attribute_value(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute of any kind, or what the standard says where it is absent."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def input_axis(node: NodeProto, rank: int) -> int:
    """The axis of a weight that runs over input channels: Conv 1; Gemm 0 or 1 by transB; MatMul the last but one."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 1
    return rank - 2


class Names:
    """The names of a graph, which only grow.

    >>> names = Names(["x"])
    >>> names.fresh("x"), names.fresh("x"), names.fresh("y")
    ('x_2', 'x_3', 'y')
    """

    def __init__(self, taken: Iterable[str]) -> None:
        """Start with the names that are taken."""
        self._taken = set(taken)

    def fresh(self, wanted: str) -> str:
        """`wanted`, or the first of wanted_2, wanted_3, ... that is free; it is taken from then on."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


WEIGHTED = ("Conv", "Gemm", "MatMul")


def weight_axis(node: NodeProto, rank: int) -> int:
    """The axis of a weight that runs over output channels: Conv 0; Gemm 0 or 1 by transB; MatMul the last."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return rank - 1


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among a node's attributes (of If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node of a graph and of the bodies inside it."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from all_nodes(body)


def all_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model stores: initializers and attributes, bodies and functions included."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)


def without_initializers(proto: ModelProto) -> ModelProto:
    """A copy of a model that leaves out the initializers of the main graph, which is nearly all of its bytes."""
    copy = ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _assign(copy, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name != "initializer":
            _assign(copy.graph, field.name, value)
    return copy


def captured(node: NodeProto) -> frozenset[str]:
    """Names that the bodies of a node read from the graphs around it."""
    found: set[str] = set()
    for body in bodies(node):
        own = {v.name for v in body.input} | {t.name for t in body.initializer}
        read = {v.name for v in body.output}
        for inner in body.node:
            read |= set(inner.input) | captured(inner)
            own |= set(inner.output)
        found |= read - own
    return frozenset(found - {""})


def reads(node: NodeProto) -> list[str]:
    """Names of the tensors that a node and its bodies read."""
    return [*filter(None, node.input), *sorted(captured(node))]


def needed(nodes: Sequence[NodeProto], wanted: Iterable[str]) -> list[NodeProto]:
    """Those of a graph's nodes that some tensors depend on, in the same order."""
    read, found = set(wanted), []
    for node in reversed(nodes):
        if not read.isdisjoint(node.output):
            found.append(node)
            read.update(reads(node))
    return found[::-1]


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
    for body in bodies(node):
        yield from _graph_tensors(body)


def _assign(message: ModelProto | GraphProto, name: str, value: object) -> None:
    """Set one field of a message to a copy of a value."""
    target = getattr(message, name)
    if hasattr(target, "MergeFrom"):
        target.MergeFrom(value)
    else:
        setattr(message, name, value)
