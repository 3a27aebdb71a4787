"""Groups: quantized nodes that must have one precision, so that a plan of several precisions chooses for them at once.

Model + Plan -> nodes united that read one tensor or one weight, and, where kernels write codes, that end in one sum
-> `Group`s in the order of the graph; plans of several choices -> `together`, whose table serves every one of them.
It must not choose.

A tensor is quantized once, so its readers cannot have several formats. The convolutions whose kernels end in one Add
read and write its codes on both sides, where the compiler's kernels write codes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from engines.core.documents import replace
from qdq.model.model import Model
from qdq.model.nodes import controlled_nodes
from qdq.plan.plan import Plan, Point, Skip
from qdq.plan.rules.tensorrt import backbone

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Nodes of one precision, in the order of the graph; the first names the group."""

    nodes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first node's."""
        return self.nodes[0]


def united(items: Iterable[T], sets: Iterable[Iterable[T]]) -> dict[T, T]:
    """Item -> the first of all items that chains of the sets connect it with; what is no item is left out of the sets.

    >>> united("abcd", ["ca", "cxd"])
    {'a': 'a', 'b': 'b', 'c': 'a', 'd': 'a'}
    """
    order = {item: number for number, item in enumerate(items)}
    parent = {item: item for item in order}

    def root(item: T) -> T:
        while parent[item] != item:
            item = parent[item]
        return item

    for some in sets:
        roots = sorted({root(item) for item in some if item in order}, key=order.__getitem__)
        for other in roots[1:]:
            parent[other] = roots[0]
    return {item: root(item) for item in order}


def groups(model: Model, plan: Plan) -> tuple[Group, ...]:
    """The groups of the nodes whose weight a plan quantizes.

    Args:
        model: that the plan names nodes of.
        plan: of everything that may be quantized.
    """
    quantized = set(plan.quantized_nodes)
    names = [node.name for node in (*model.graph.node, *controlled_nodes(model.graph)) if node.name in quantized]
    roots = united(names, (*_by_operand(model, quantized), *_by_sum(model, plan, quantized)))
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(roots[name], []).append(name)
    return tuple(Group(nodes=tuple(some)) for some in found.values())


def _by_operand(model: Model, quantized: set[str]) -> Iterator[list[str]]:
    """The quantized nodes that read one tensor, of each tensor that they multiply."""
    readers: dict[str, list[str]] = {}
    for name in sorted(quantized):
        for tensor in model.node(name).input[:2]:
            readers.setdefault(tensor, []).append(name)
    yield from readers.values()


def _by_sum(model: Model, plan: Plan, quantized: set[str]) -> Iterator[list[str]]:
    """The convolutions whose kernels end in an Add that reads codes, where kernels write codes."""
    if not plan.settings.profile.integer_output:
        return
    beside = {name for p in plan.activations for name, _ in p.uses if name not in quantized}
    for name in sorted(beside):
        if (node := model.node(name)).op_type == "Add":
            makers = (backbone(model, tensor) for tensor in node.input)
            yield [maker.name for maker in makers if maker is not None]


def together(plans: Sequence[Plan]) -> Plan:
    """A plan whose calibration table serves each of some plans of one model, after the same rewrites.

    A node is quantized as the first of them has it that quantizes its data, else the first that quantizes it. All
    tensors are measured alike, whatever their formats are to be.
    """
    first = plans[0]
    reads_codes = [{name for p in plan.activations for name, _ in p.uses} for plan in plans]
    owner: dict[str, int] = {}
    for number, plan in enumerate(plans):
        for name in (*plan.quantized_nodes, *reads_codes[number]):
            better = name in reads_codes[number] and name not in reads_codes[owner.get(name, number)]
            if name not in owner or better:
                owner[name] = number
    points: dict[tuple[str, str, int | None], Point] = {}
    for number, plan in enumerate(plans):
        for point in plan.points:
            mine = tuple(c for c in point.consumers if owner[c.rpartition(":")[0]] == number)
            key = (point.role, point.tensor, point.spec.axis if point.role == "weight" else None)
            if mine and key in points:
                points[key] = replace(points[key], consumers=(*points[key].consumers, *mine))
            elif mine:
                points[key] = replace(point, consumers=mine, tie=None)
    skips = {skip.node: skip for plan in plans for skip in plan.skips if skip.node not in owner}
    left: tuple[Skip, ...] = tuple(skips.values())
    return replace(first, points=tuple(points.values()), skips=left)
