"""What nodes read and hold, and new names for what a pass adds. Must not know models or passes.

Questions about one node alone are `engines.core.nodes`, given on here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from onnx import GraphProto, NodeProto

from engines.core import fp4
from engines.core.nodes import (
    all_graphs as all_graphs,
    all_nodes as all_nodes,
    all_tensors as all_tensors,
    attribute as attribute,
    attribute_value as attribute_value,
    bodies as bodies,
    captured as captured,
    constant_tensor as constant_tensor,
    factor as factor,
    input_axis as input_axis,
    ints as ints,
    reads as reads,
    weight_axis as weight_axis,
)
from engines.core.operators import WEIGHTED as WEIGHTED
from engines.core.shapes import without_initializers as without_initializers

CONTROLS = ("If", "Loop", "Scan")
FP4_QUANTIZE, TRT_DOMAIN = fp4.QUANTIZE, fp4.DOMAIN


def read_as(node: NodeProto, names: Mapping[str, str]) -> None:
    """Let a node, and the bodies in it, read tensors of the graph around by other names: old name -> new name."""
    node.input[:] = [names.get(name, name) for name in node.input]
    for body in bodies(node):
        own = {v.name for v in (*body.input, *body.initializer)}.union(*(n.output for n in body.node))
        outer = {name: new for name, new in names.items() if name not in own}
        for inner in body.node:
            read_as(inner, outer)
        for value in body.output:
            value.name = outer.get(value.name, value.name)


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


def made(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Names of the tensors that some nodes make."""
    return (name for node in nodes for name in node.output if name)


def controls(node: NodeProto) -> bool:
    """Whether a node is an If, Loop or Scan, whose bodies are graphs like the one around them."""
    return node.op_type in CONTROLS and node.domain in ("", "ai.onnx")


def controlled_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node of the bodies of If, Loop and Scan in a graph, in bodies inside them too."""
    for node in filter(controls, graph.node):
        for body in bodies(node):
            yield from body.node
            yield from controlled_nodes(body)


def needed(nodes: Sequence[NodeProto], wanted: Iterable[str]) -> list[NodeProto]:
    """Those of a graph's nodes that some tensors depend on, in the same order."""
    read, found = set(wanted), []
    for node in reversed(nodes):
        if not read.isdisjoint(node.output):
            found.append(node)
            read.update(reads(node))
    return found[::-1]
