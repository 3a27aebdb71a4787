"""Costs of a choice as sums, of a few engines: float everywhere, each candidate everywhere, and two of them by turns.

engines -> `fitted`: each group's share in each candidate; of times also `with_changes`: what it costs that two groups
next to each other have different precisions. What whole choices show corrects any sum
by as little as can be (`corrected`). It must not choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from engines.core.documents import replace
from qdq.build.pricing.costing import TIME, Cost
from qdq.plan.choice import FLOAT
from qdq.tune.sensitivity.mixed.allocate import Both, Chosen, Pair, Sum
from qdq.tune.sensitivity.mixed.choices import Choices
from qdq.tune.sensitivity.mixed.pairs import adjacent, alternating, apart

CostOf = Callable[[Chosen], Cost]
LEAST = 1e-9
PART, WHOLE = 0.5, 0.01  # standard deviations that are expected: of a part of a sum, and of the corrected sum, relative
LEAST_PART = 0.1  # of what a part was: none is corrected to less


def fitted(name: str, noise: Sequence[Mapping[str, float]], choices: Choices, cost: CostOf) -> Sum:
    """A cost as a sum: each group's share, times what the engine of all groups in that candidate takes against it.

    Of bytes the share is that of the formats, of time that of the kernels which the group's nodes are in.

    Args:
        name: of the cost.
        noise: of each group, the candidates that it may have.
        choices: of the model.
        cost: of a choice.
    """
    texts = [text for text in choices.candidates.plans if any(text in own for own in noise)]
    engines = {text: cost(choices.everywhere(text)) for text in (FLOAT, *texts)}
    if name == TIME:
        times = {text: _kernel_times(choices, engine) for text, engine in engines.items()}
        shares = [{text: times[text][g] for text in own if text in times} for g, own in enumerate(noise)]
    else:
        shares = [choices.weight_bytes(g, [text for text in own if text in engines]) for g, own in enumerate(noise)]
    base = engines[FLOAT].of[name] - math.fsum(own[FLOAT] for own in shares)
    factor = {FLOAT: 1.0}
    for text in texts:
        mine = math.fsum(own[text] for own in shares if text in own)
        others = math.fsum(own[FLOAT] for own in shares if text not in own)
        factor[text] = max(0.0, engines[text].of[name] - base - others) / max(mine, LEAST)
    return Sum(base=base, groups=[{text: value * factor[text] for text, value in own.items()} for own in shares])


def with_changes(time: Sum, choices: Choices, cost: CostOf, most: int) -> Sum:
    """The same with what a change of precision between two groups costs, alike for all pairs next to each other.

    Of every two candidates, one engine has them by turns; what it takes beyond the sum is shared by the pairs in it.

    Args:
        time: of the groups alone.
        choices: of the model.
        cost: of a choice.
        most: engines that are compiled for it.
    """
    pairs, found = adjacent(choices.candidates.model, choices.candidates.groups), dict[Pair, dict[Both, float]]()
    texts = [text for text in (FLOAT, *choices.candidates.plans) if any(text in own for own in time.groups)]
    for one, other in list(combinations(texts, 2))[:most]:
        chosen = alternating(pairs, (one, other), [tuple(own) for own in time.groups], FLOAT)
        if changes := apart(chosen, pairs):
            each = (cost(chosen).of[TIME] - time.of(chosen)) / len(changes)
            for pair in pairs if math.isfinite(each) and each > 0 else ():
                found.setdefault(pair, {}).update({(one, other): each, (other, one): each})
    return replace(time, pairs=found)


def corrected(each: Sum, seen: Mapping[Chosen, float]) -> Sum:
    """A sum whose parts are changed as little as makes it agree with what whole choices were seen to have.

    Ridge regression of what was seen on the parts, each of which may be off by a share of itself.

    Args:
        each: the sum.
        seen: choice -> figure; what is not finite counts for nothing.
    """
    known = {chosen: value for chosen, value in seen.items() if math.isfinite(value) and value > 0}
    if not known:
        return each
    places = {
        (g, name): i for i, (g, name) in enumerate((g, n) for g, own in enumerate(each.groups) for n in own if own[n])
    }
    parts, apart_ = np.zeros((len(known), len(places) + 1)), np.zeros(len(known))
    for row, (chosen, value) in enumerate(known.items()):
        parts[row, -1] = each.base / value
        for g, name in enumerate(chosen):
            if math.isfinite(part := each.groups[g][name]) and (g, name) in places:
                parts[row, places[g, name]] = part / value
        apart_[row] = 1.0 - each.of(chosen) / value
    ridge = (WHOLE / PART) ** 2 * np.eye(parts.shape[1])
    share = np.maximum(1.0 + np.linalg.solve(parts.T @ parts + ridge, parts.T @ np.nan_to_num(apart_)), LEAST_PART)
    groups = [
        {name: part * float(share[places[g, name]]) if (g, name) in places else part for name, part in own.items()}
        for g, own in enumerate(each.groups)
    ]
    return replace(each, base=each.base * float(share[-1]), groups=groups)


def _kernel_times(choices: Choices, engine: Cost) -> list[float]:
    """Microseconds of the kernels of each group; one that several groups are in is shared alike."""
    number = {node: g for g, group in enumerate(choices.candidates.groups) for node in group.nodes}
    found = [0.0] * len(choices.candidates.groups)
    for kernel in engine.kernels:
        inside = {number[node] for node in kernel.nodes if node in number}
        for g in inside:
            found[g] += kernel.us / len(inside)
    return found
