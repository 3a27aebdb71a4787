"""Which groups lie next to each other, or on the two sides of a sum, and what that adds to the sums of both.

model + groups -> pairs; what two groups together show more than each alone -> the same of their other candidates
It must not run or compile anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import reads
from qdq.plan.groups import Group
from qdq.tune.sensitivity.mixed.allocate import Both, Chosen, Pair

JOINING = frozenset(("Add", "Sub", "Mul", "Concat", "Sum"))


def adjacent(model: Model, groups: Sequence[Group]) -> list[Pair]:
    """Pairs of groups of which one reads what the other makes, or whose outputs one node joins, by number.

    Nodes of no group may lie between.
    """
    number = {node: g for g, group in enumerate(groups) for node in group.nodes}
    behind: dict[str, frozenset[int]] = {}
    found = dict[Pair, None]()
    for node in model.graph.node:
        sources = [behind.get(name, frozenset()) for name in reads(node)]
        before = frozenset[int]().union(*sources)
        if node.name in number:
            here = frozenset((number[node.name],))
            found |= dict.fromkeys((min(g, *here), max(g, *here)) for g in before - here)
            before = here
        elif node.op_type in JOINING:
            found |= dict.fromkeys(_across(sources))
        behind |= dict.fromkeys(_made(node), before)
    return sorted(found)


def _made(node: NodeProto) -> Iterator[str]:
    yield from (name for name in node.output if name)


def _across(sources: Sequence[frozenset[int]]) -> Iterator[Pair]:
    """Pairs of groups from two operands."""
    for one, other in combinations(sources, 2):
        yield from ((min(a, b), max(a, b)) for a in one for b in other if a != b)


def correlated(
    noise: Sequence[Mapping[str, float]], pair: Pair, both: Both, together: float, quantizes: Sequence[str]
) -> dict[Both, float]:
    """What two groups add to the sum of their noises, in every two candidates that quantize.

    Errors of two groups that are correlated by r have a noise of n + m + 2 r sqrt(n m), and r is taken to be the same
    in other candidates.

    Args:
        noise: of each group, candidate -> noise.
        pair: of groups.
        both: the candidates that the two had.
        together: their noise as a whole.
        quantizes: candidates that r is for.
    """
    own, other = noise[pair[0]], noise[pair[1]]
    n, m = own[both[0]], other[both[1]]
    if not (n > 0 and m > 0 and math.isfinite(n + m + together)):
        return {}
    r = min(max((together - n - m) / (2 * math.sqrt(n * m)), -1.0), 1.0)
    texts = [(a, b) for a in own for b in other if a in quantizes and b in quantizes]
    found = {(a, b): 2 * r * math.sqrt(own[a] * other[b]) for a, b in texts}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def alternating(pairs: Sequence[Pair], texts: Both, applies: Sequence[Sequence[str]], plain: str) -> Chosen:
    """A choice in which as many pairs as can be have two candidates: groups by turns along the pairs.

    Args:
        pairs: of groups.
        texts: the two candidates.
        applies: of each group, its candidates.
        plain: of a group that lacks one of the two.
    """
    side: dict[int, int] = {}
    for a, b in pairs:
        side.setdefault(a, 1 - side.get(b, 1))
        side.setdefault(b, 1 - side[a])
    chosen = (texts[side.get(g, g % 2)] for g in range(len(applies)))
    return tuple(text if text in own else plain for text, own in zip(chosen, applies, strict=True))


def apart(chosen: Chosen, pairs: Sequence[Pair]) -> list[tuple[Pair, Both]]:
    """The pairs with two candidates in a choice."""
    both = [((a, b), (chosen[a], chosen[b])) for a, b in pairs]
    return [(pair, texts) for pair, texts in both if texts[0] != texts[1]]
