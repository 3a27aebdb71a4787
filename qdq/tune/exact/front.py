"""Sets of units of which none is both faster and less noisy than another, where time and noise are sums over units.

`UnitSum` + noise of each unit -> units in an order in which groups are short -> one unit after the other, in or out ->
of partial sets that what follows cannot tell apart, those that are fastest for their noise -> the front
What follows tells partial sets apart by the groups that are begun and not ended (dynamic programming over a path
decomposition). Of sets whose noises differ by less than a ratio the fastest is kept, which is the only thing lost; the
ratio grows with the number of sets. It must not run a model: a noise is a number here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qdq.tune.exact.unit_sum import UnitSum

MOST_SETS = 3000  # that are kept from one unit to the next
LEAST_RATIO = 1.002  # of noises between which one set is kept


@dataclass(frozen=True, slots=True)
class _Part:
    """A set of the units that were decided, as bits, with its sums so far."""

    noise: float
    us: float
    bits: int


def front(total: UnitSum, noise: Mapping[str, float]) -> list[frozenset[str]]:
    """Sets from the least noise to the least time; the same arguments give the same sets.

    Args:
        noise: of each unit, not below 0.
    """
    order = ordered(total)
    place = {unit: index for index, unit in enumerate(order)}
    gains, costs = (_as_bits(groups, place) for groups in (total.gains, total.costs))
    parts, decided = [_Part(0.0, 0.0, 0)], 0
    for index, unit in enumerate(order):
        bit = 1 << index
        decided |= bit
        ended = [(us, group) for group, us in gains.items() if group & bit and not group & ~decided]
        begun = [(us, group) for group, us in costs.items() if group & bit]
        grown = list(parts)
        for part in parts:
            bits = part.bits | bit
            us = part.us + total.alone[unit] - math.fsum(us for us, group in ended if group & bits == group)
            us += math.fsum(us for us, group in begun if not group & part.bits)
            grown.append(_Part(part.noise + noise[unit], us, bits))
        whole = [group & decided for group in gains if group & decided and group & ~decided]
        met = [group & decided for group in costs if group & decided and group & ~decided]
        parts = _best(grown, whole, met)
    return [frozenset(unit for unit in order if part.bits >> place[unit] & 1) for part in parts]


def ordered(total: UnitSum) -> list[str]:
    """The units, each after the one that it shares most groups with; next is what ends most of the groups begun."""
    groups = [group for some in (total.gains, total.costs) for _, group in some if len(group) > 1]
    of: dict[str, list[int]] = {unit: [] for unit in total.nodes}
    for index, group in enumerate(groups):
        for unit in group:
            of[unit].append(index)
    left, begun, found = dict.fromkeys(sorted(total.nodes)), Counter[int](), list[str]()

    def key(unit: str) -> tuple[float, int]:
        near = math.fsum(1 / (len(groups[i]) - begun[i]) for i in of[unit] if begun[i])
        return near, -sum(not begun[i] for i in of[unit])

    while left:
        unit = max(left, key=key)
        del left[unit]
        found.append(unit)
        begun.update(of[unit])
    return found


def _as_bits(groups: Collection[tuple[float, frozenset[str]]], place: Mapping[str, int]) -> dict[int, float]:
    """Groups as bits, those with the same units as one."""
    found: dict[int, float] = {}
    for us, group in groups:
        bits = sum(1 << place[unit] for unit in group)
        found[bits] = found.get(bits, 0.0) + us
    return found


def _best(parts: Collection[_Part], whole: Collection[int], met: Collection[int]) -> list[_Part]:
    """Those that are fastest for their noise, apart for what follows."""
    alike: dict[tuple[tuple[bool, ...], tuple[bool, ...]], list[_Part]] = {}
    for part in sorted(parts, key=lambda p: (p.noise, p.us, p.bits)):
        key = tuple(part.bits & g == g for g in whole), tuple(part.bits & g > 0 for g in met)
        some = alike.setdefault(key, [])
        if not some or part.us < some[-1].us - 1e-9:
            some.append(part)
    ratio, kept = LEAST_RATIO, [part for some in alike.values() for part in some]
    while len(kept) > MOST_SETS and ratio < math.inf:
        kept = [part for some in alike.values() for part in _thinned(some, ratio)]
        ratio = ratio**4 if ratio < 1e3 else math.inf
    return sorted(kept, key=lambda p: (p.us, p.noise, p.bits))[:MOST_SETS]


def _thinned(parts: Collection[_Part], ratio: float) -> list[_Part]:
    """Of those with about the same noise the fastest; they come by noise, each faster than the one before."""
    found: dict[float, _Part] = {}
    for part in parts:
        found[-math.inf if part.noise <= 0 else math.floor(math.log(part.noise) / math.log(ratio))] = part
    return list(found.values())
