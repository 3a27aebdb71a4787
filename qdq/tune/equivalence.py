"""Which nodes of a graph the compiler cannot tell apart: the same operator and sizes in the same surroundings.

Model -> a hash per node, refined by the hashes around it -> groups of alike nodes. It must not look at weights' values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from qdq.model.model import Model
from qdq.model.nodes import attribute_value

RADIUS = 2  # nodes are alike if their surroundings are, this many nodes far


def grouped(nodes: Iterable[str], alike: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Nodes of one class together, in their order; a name that has no class is alone."""
    groups: dict[str, list[str]] = {}
    for node in nodes:
        groups.setdefault(alike.get(node, node), []).append(node)
    return [tuple(group) for group in groups.values()]


def classes(model: Model) -> dict[str, str]:
    """Node name -> a hash that is the same for nodes which the compiler cannot tell apart by their surroundings.

    Each node starts as its operator, attributes, and the types and shapes of its tensors; `RADIUS` times it takes in
    the hashes of the nodes around it. The blocks of a network that repeats them come out alike, the first and last not.
    """
    nodes = model.graph.node
    labels: dict[str, str] = {}
    for node in nodes:
        infos = [(t, model.info(t)) for t in (*node.input, *node.output)]
        seen = [(model.is_constant(t), i.dtype, i.shape) if i else None for t, i in infos]
        attributes = sorted((a.name, repr(attribute_value(node, a.name, None))) for a in node.attribute)
        labels[node.name] = _hash(node.domain, node.op_type, seen, attributes)
    for _ in range(RADIUS):
        around = {}
        for node in nodes:
            before = [labels[p.name] if (p := model.producer(t)) else "" for t in node.input]
            after = [sorted(f"{u.index}{labels[u.node.name]}" for u in model.consumers(t)) for t in node.output]
            around[node.name] = _hash(labels[node.name], before, after)
        labels = around
    return labels


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
