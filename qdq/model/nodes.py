"""What nodes read and hold, and new names for what a pass adds. Must not know models or passes.

Questions about one node alone are `engines.core.nodes`, given on here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from engines.core.fp4 import DOMAIN as TRT_DOMAIN
from engines.core.fp4 import QUANTIZE as FP4_QUANTIZE
from engines.core.nodes import attribute, attribute_value, bodies, factor, input_axis, ints, weight_axis
from engines.core.operators import WEIGHTED
from engines.core.shapes import without_initializers

__all__ = [
    "FP4_QUANTIZE",
    "TRT_DOMAIN",
    "WEIGHTED",
    "Names",
    "all_nodes",
    "all_tensors",
    "attribute",
    "attribute_value",
    "bodies",
    "captured",
    "factor",
    "input_axis",
    "ints",
    "needed",
    "reads",
    "weight_axis",
    "without_initializers",
]


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
    for held in node.attribute:
        if held.HasField("t"):
            yield held.t
        yield from held.tensors
    for body in bodies(node):
        yield from _graph_tensors(body)
