"""Which candidate each group gets, where error and costs are sums over groups and over pairs of groups.

`Sum` of what is minimized and of what is limited -> mixed-integer program (HiGHS) -> a candidate for each group
It must not run or compile anything: what the sums leave out, the search finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from qdq.core.errors import MissingRuntimeError

Chosen = tuple[str, ...]  # a candidate for each group
Pair = tuple[int, int]
Both = tuple[str, str]
PAIRED = 96  # changes of one group, of either kind, that are tried two together
LEAST = 1e-12  # of the largest number of a program: less is nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """A figure of a choice as a sum.

    Attributes:
        base: beside the groups.
        groups: of each group, candidate -> its part. What is not finite is not taken.
        pairs: of two groups, what they add together in two candidates.
    """

    base: float = 0.0
    groups: Sequence[Mapping[str, float]]
    pairs: Mapping[Pair, Mapping[Both, float]] = field(default_factory=dict)

    def of(self, chosen: Sequence[str]) -> float:
        """The figure of a choice."""
        alone = math.fsum(own[name] for own, name in zip(self.groups, chosen, strict=True))
        return (
            self.base + alone + math.fsum(some.get((chosen[a], chosen[b]), 0.0) for (a, b), some in self.pairs.items())
        )


Limit = tuple[Sum, float]
"""A figure and the most that it may be."""


def least(aim: Sum, limits: Sequence[Limit] = ()) -> Chosen | None:
    """The choice with the least sum of those within the limits; None where there is none.

    Raises:
        MissingRuntimeError: SciPy is not installed.
    """
    sums = [aim, *(each for each, _ in limits)]
    options = [
        [name for name in own if all(math.isfinite(each.groups[g].get(name, math.inf)) for each in sums)]
        for g, own in enumerate(aim.groups)
    ]
    if not all(options):
        return None
    chosen = _solved(aim, limits, options)
    if chosen is None or aim.pairs or aim.base:
        return chosen
    if (bound := aim.of(chosen)) > 0:  # HiGHS stops within 1e-6 of the sum in the unit that it is given
        within = [[name for name in names if aim.groups[g][name] <= bound] for g, names in enumerate(options)]
        again = _solved(aim, limits, within, unit=bound)
        chosen = min(filter(None, (chosen, again)), key=aim.of)
    return chosen


def _solved(aim: Sum, limits: Sequence[Limit], options: Sequence[Sequence[str]], *, unit: float = 0.0) -> Chosen | None:
    """Solve the program; a pair in two candidates is a variable that is 1 where both are chosen."""
    optimize = require_scipy()
    places = {(g, name): i for i, (g, name) in enumerate((g, n) for g, names in enumerate(options) for n in names)}
    both = {
        (a, one, b, other): 0
        for each in (aim, *(each for each, _ in limits))
        for (a, b), some in each.pairs.items()
        for (one, other), value in some.items()
        if value and (a, one) in places and (b, other) in places
    }
    both = {key: len(places) + i for i, key in enumerate(both)}
    width = len(places) + len(both)

    def row(each: Sum) -> np.ndarray:
        found = np.zeros(width)
        for (g, name), column in places.items():
            found[column] = each.groups[g][name]
        for (a, one, b, other), column in both.items():
            found[column] = each.pairs.get((a, b), {}).get((one, other), 0.0)
        return found

    cost = row(aim)
    scale = unit or float(np.abs(cost).max(initial=0.0)) or 1.0
    rules = [optimize.LinearConstraint(_one_each(places, len(options), width), 1.0, 1.0)]
    for each, most in limits:
        size = max(abs(most - each.base), LEAST)
        rules.append(optimize.LinearConstraint(row(each)[None] / size, -np.inf, (most - each.base) / size))
    if both:
        rules.append(
            optimize.LinearConstraint(_together(places, both, width), -np.inf, np.tile([0.0, 0, 1], len(both)))
        )
    found = optimize.milp(
        cost / scale,
        constraints=rules,
        integrality=np.r_[np.ones(len(places)), np.zeros(len(both))],
        bounds=optimize.Bounds(0.0, 1.0),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    chosen = {g: name for (g, name), column in places.items() if found.x[column] > 0.5}
    return tuple(chosen[g] for g in range(len(options)))


def _one_each(places: Mapping[tuple[int, str], int], groups: int, width: int) -> np.ndarray:
    one = np.zeros((groups, width))
    for (g, _), column in places.items():
        one[g, column] = 1.0
    return one


def _together(places: Mapping[tuple[int, str], int], both: Mapping[Any, int], width: int) -> np.ndarray:
    """Rows y <= x, y <= z and x + z - y <= 1 of each pair: y is 1 where both are chosen, 0 else."""
    rows = np.zeros((3 * len(both), width))
    for i, ((a, one, b, other), column) in enumerate(both.items()):
        x, z = places[a, one], places[b, other]
        rows[3 * i, [column, x]] = 1.0, -1.0
        rows[3 * i + 1, [column, z]] = 1.0, -1.0
        rows[3 * i + 2, [column, x, z]] = -1.0, 1.0, 1.0
    return rows


def neighbours(aim: Sum, chosen: Chosen, limits: Sequence[Limit]) -> list[Chosen]:
    """Choices that differ from one in a group or two and are within the limits, the least sum first.

    Args:
        aim: what is minimized.
        chosen: the choice.
        limits: with the most that each sum may be here: what is known of the choice itself is in it.
    """
    sums = [aim, *(each for each, _ in limits)]
    room = np.array([most - each.of(chosen) for each, most in limits])
    moves = [
        (g, name)
        for g, own in enumerate(aim.groups)
        for name in own
        if name != chosen[g] and all(math.isfinite(each.groups[g].get(name, math.inf)) for each in sums)
    ]
    gains = {move: np.array([_change(each, chosen, move) for each in sums]) for move in moves}
    found: list[tuple[float, tuple[tuple[int, str], ...]]] = [
        (gains[move][0], (move,)) for move in moves if (gains[move][1:] <= room).all()
    ]
    better = sorted((m for m in moves if gains[m][0] < 0 and (gains[m][1:] > room).any()), key=lambda m: gains[m][0])
    giving = sorted((m for m in moves if gains[m][0] >= 0 and (gains[m][1:] < 0).any()), key=lambda m: gains[m][0])
    found += [
        (gains[a][0] + gains[b][0], (a, b))
        for a in better[:PAIRED]
        for b in giving[:PAIRED]
        if a[0] != b[0] and (gains[a][1:] + gains[b][1:] <= room).all()
    ]
    return [
        tuple(dict(own).get(g, name) for g, name in enumerate(chosen)) for _, own in sorted(found, key=lambda f: f[0])
    ]


def flipped(start: Chosen, order: Sequence[tuple[int, str]], limits: Sequence[Limit]) -> Chosen | None:
    """A choice made greedily: one group after the other is changed until all sums are within the limits.

    Source: Pandey et al., A practical mixed precision algorithm for post-training quantization (2302.05397).

    Args:
        start: the choice to begin with.
        order: groups and what they become; a later entry of a group replaces an earlier one.
        limits: sums and the most that each may be.
    """
    chosen = list(start)
    for g, name in order:
        if all(each.of(chosen) <= most for each, most in limits):
            break
        chosen[g] = name
    return tuple(chosen) if all(each.of(chosen) <= most for each, most in limits) else None


def _change(each: Sum, chosen: Chosen, move: tuple[int, str]) -> float:
    """What a change of one group adds to a sum."""
    g, name = move
    found = each.groups[g][name] - each.groups[g][chosen[g]]
    for (a, b), some in each.pairs.items():
        if g in (a, b):
            new = (name, chosen[b]) if g == a else (chosen[a], name)
            found += some.get(new, 0.0) - some.get((chosen[a], chosen[b]), 0.0)
    return found


def require_scipy() -> Any:
    """SciPy's optimizers.

    Raises:
        MissingRuntimeError: it is not installed.
    """
    try:
        return import_module("scipy.optimize")
    except ImportError:
        raise MissingRuntimeError(
            "A precision for each group is chosen by SciPy's HiGHS, and SciPy is not installed. Install it with: "
            "pip install 'qdq[mixed]'"
        ) from None
