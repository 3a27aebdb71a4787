"""What ONNX messages hold: the nodes, tensors and bodies of a graph, what a node reads, and what some tensors need.

    ModelProto, GraphProto, NodeProto -> walks over them, bodies of If, Loop and Scan included

It must not know models or passes, change a message, or read tensor data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto


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
