"""Where a network is cut into blocks: at few tensors, each block with some weights that are learned together.

BRECQ (Li et al., arXiv 2102.05426) reconstructs residual blocks. They are found here without knowing them: of all
places in the order of the nodes where a block could end, the one that the fewest tensors cross, so that a shortcut is
in its block, and a U-Net's skip connections may cross. This module must not run anything.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qdq.model.model import Model
from qdq.model.nodes import reads

MOST = 8  # weights of a block: more to learn at a time, from the same samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The end of a block.

    Attributes:
        node: index of the last node that may belong to it.
        tensors: computed tensors from nodes up to there that later ones read.
        width: how many tensors cross, inputs of the model among them.
    """

    node: int
    tensors: frozenset[str]
    width: int


def cut(model: Model, learned: Collection[str], barred: Collection[str], outputs: Sequence[str]) -> list[list[str]]:
    """Of each block the tensors that it leaves, in the order of the blocks.

    Args:
        model: the prepared float model.
        learned: the nodes whose weights are learned.
        barred: tensors that cannot be cut at.
        outputs: tensors that the last block leaves.

    Returns:
        One list a block; a tensor is left by one block, the first that computes it.
    """
    end = Place(node=len(model.graph.node) - 1, tensors=frozenset(outputs), width=len(outputs))
    places = [*(p for p in _places(model, set(barred)) if p.node < end.node), end]
    counts = _counts(model, learned)
    found, left, before = list[list[str]](), set[str](), 0
    while places:
        near = [p for p in places if counts[p.node] > before]
        near = [p for p in near if counts[p.node] <= before + MOST] or near[:1] or [end]
        narrow = min(p.width for p in near)
        first = next(p for p in near if p.width == narrow)
        last = [p for p in near if p.width == narrow and counts[p.node] == counts[first.node]][-1]
        if counts[last.node] == counts[-1]:  # nothing to learn is left behind it
            last = end
        found.append(sorted(last.tensors - left))
        left, before = left | last.tensors, counts[last.node]
        places = [p for p in places if p.node > last.node]
    return found


def _counts(model: Model, learned: Collection[str]) -> list[int]:
    """How many learned nodes there are up to each node."""
    counts, total = [], 0
    for node in model.graph.node:
        total += node.name in learned
        counts.append(total)
    return counts


def _places(model: Model, barred: set[str]) -> list[Place]:
    """Every place where nothing barred crosses."""
    nodes, fixed = model.graph.node, set(model.initializers)
    last = dict[str, int]()
    for index, node in enumerate(nodes):
        last.update(dict.fromkeys(reads(node), index))
    given = {i.name for i in model.inputs}
    live, found = given & last.keys(), []
    for index, node in enumerate(nodes):
        read = reads(node)
        if read and fixed.issuperset(read):
            fixed.update(name for name in node.output if name)
        live.update(name for name in node.output if name and last.get(name, -1) > index and name not in fixed)
        live -= {name for name in read if last[name] <= index}
        if live - given and not live & barred:
            found.append(Place(node=index, tensors=frozenset(live - given), width=len(live)))
    return found
