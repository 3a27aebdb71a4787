"""The least set by a minimum cut is that of all subsets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest

from qdq.tune.exact.cut import STEPS, least

Groups = list[tuple[float, list[int]]]


def total(chosen: Iterable[int], alone: dict[int, float], gains: Groups, costs: Groups) -> float:
    some = set(chosen)
    saved = sum(gain for gain, group in gains if some.issuperset(group))
    paid = sum(cost for cost, group in costs if some.intersection(group))
    return sum(alone[u] for u in some) - saved + paid


@pytest.mark.parametrize("seed", range(60))
def test_no_subset_is_less(seed: int) -> None:
    rng = random.Random(seed)
    members = range(rng.randint(1, 9))
    alone = {u: rng.uniform(-3, 3) for u in members}
    gains, costs = (
        [
            (rng.uniform(0, 4), rng.sample(members, rng.randint(1, min(len(members), 4))))
            for _ in range(rng.randint(0, 6))
        ]
        for _ in range(2)
    )
    every = itertools.chain.from_iterable(itertools.combinations(members, n) for n in range(len(members) + 1))
    best = min(total(chosen, alone, gains, costs) for chosen in every)
    found = total(least(alone, gains, costs), alone, gains, costs)
    assert best <= found <= best + 40 * 4 / STEPS  # rounded to steps


def test_of_equal_sets_the_smallest() -> None:
    assert least({}, [], []) == frozenset()
    assert least({"a": 0.0, "b": 0.0}, [], [(1.0, "a")]) == frozenset()
    assert least({"a": 1.0, "b": 1.0}, [(2.0, "ab")], []) == frozenset()
    assert least({"a": 1.0, "b": 0.5, "c": -1.0}, [(2.0, "ab")], []) == {"a", "b", "c"}


def test_many_members() -> None:
    rng = random.Random(0)
    alone = {u: rng.uniform(-3, 3) for u in range(300)}
    gains, costs = ([(rng.uniform(0, 4), rng.sample(range(300), 5)) for _ in range(400)] for _ in range(2))
    found = least(alone, gains, costs)
    value = total(found, alone, gains, costs)
    for u in alone:  # no single change is better
        assert total(found ^ {u}, alone, gains, costs) >= value - 1e-3
