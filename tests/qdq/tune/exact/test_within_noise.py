"""Sets of units within a budget of noise: never above it, and the fastest where every subset can be looked at."""

from __future__ import annotations

import itertools
import random

import pytest

from qdq.tune.exact import front
from qdq.tune.exact.unit_sum import UnitSum
from qdq.tune.exact.within_noise import WithinNoise

UNITS = "abcdefghij"


def random_sum(rng: random.Random, units: str = UNITS) -> UnitSum:
    """A chain as engines have it: neighbours save what is between them, some pay a quantizer."""
    pairs = [frozenset(pair) for pair in itertools.pairwise(units)]
    some = [frozenset(rng.sample(units, 3)) for _ in range(3)]
    return UnitSum(
        nodes={unit: (unit,) for unit in units},
        alone={unit: rng.uniform(-4, 3) for unit in units},
        gains=tuple((rng.uniform(0, 4), group) for group in (*pairs, *some)),
        costs=tuple((rng.uniform(0, 2), frozenset(rng.sample(units, 2))) for _ in range(4)),
    )


def best(total: UnitSum, noise: dict[str, float], budget: float) -> float:
    every = itertools.chain.from_iterable(itertools.combinations(UNITS, n) for n in range(len(UNITS) + 1))
    return min(total.us(some) for some in every if sum(noise[u] for u in some) <= budget)


def budgets(noise: dict[str, float]) -> list[float]:
    return [share * sum(noise.values()) for share in (0.0, 0.05, 0.2, 0.5, 0.8, 1.0)]


@pytest.mark.parametrize("seed", range(6))
def test_few_units_are_chosen_exactly(seed: int) -> None:
    rng = random.Random(seed)
    total, noise = random_sum(rng), {unit: rng.lognormvariate(0, 1.5) for unit in UNITS}
    sets = WithinNoise(total, noise)
    for budget in budgets(noise):
        found = sets.fastest(budget)
        assert sets.noise_of(found) <= budget and total.us(found) == pytest.approx(best(total, noise, budget))


def test_sets_that_a_front_leaves_out_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "MOST_SETS", 12)  # as if there were too many for all
    exact = losses = 0
    gains = 0.0
    for seed in range(40):
        rng = random.Random(seed)
        total, noise = random_sum(rng), {unit: rng.lognormvariate(0, 1.5) for unit in UNITS}
        sets = WithinNoise(total, noise)
        for budget in budgets(noise):
            found = sets.fastest(budget)
            assert sets.noise_of(found) <= budget * (1 + 1e-12) and total.us(found) <= 1e-9
            least = best(total, noise, budget)
            exact += total.us(found) <= least + 1e-6
            losses += total.us(found) > 0.8 * least
            gains += total.us(found) / least if least < 0 else 1.0
    assert exact >= 0.9 * 240 and losses <= 240 * 0.05 and gains >= 0.98 * 240


def test_a_long_chain_is_chosen_exactly() -> None:
    """A set that differs from another in more than two units: changes of one or two do not lead there."""
    units = [f"{letter}{index}" for index in range(4) for letter in "ab"]
    alone = {unit: 2.0 if unit[0] == "a" else 1.0 for unit in units}
    gains = tuple((4.0, frozenset(pair)) for pair in itertools.pairwise(units))
    noise = {unit: 1.0 + 0.01 * index for index, unit in enumerate(units)}
    total = UnitSum(nodes={u: (u,) for u in units}, alone=alone, gains=gains, costs=())
    sets = WithinNoise(total, noise)
    for budget in (2.0, 3.1, 4.1, 5.2, 6.5):
        every = itertools.chain.from_iterable(itertools.combinations(units, n) for n in range(9))
        least = min(total.us(some) for some in every if sum(noise[u] for u in some) <= budget)
        assert total.us(sets.fastest(budget)) == pytest.approx(least)
    assert front.ordered(total) in (units, units[::-1])


def test_cuts_alone_find_less() -> None:
    """Three units that gain alike, with noise for two: weighing noise against time takes all of them or none."""
    noise = dict.fromkeys("abc", 1.0)
    total = UnitSum(nodes={u: (u,) for u in "abc"}, alone=dict.fromkeys("abc", -1.0), gains=(), costs=())
    for weight in (0.5, 0.9, 1.1, 2.0):
        assert len(total.least({u: weight * noise[u] for u in "abc"})) in (0, 3)
    assert len(WithinNoise(total, noise).fastest(2.5)) == 2


def test_neighbours_are_each_one_change() -> None:
    total = random_sum(random.Random(1))
    sets = WithinNoise(total, dict.fromkeys(UNITS, 1.0))
    start = frozenset("abc")
    found = set(sets.neighbours(start))
    assert start | {"d"} in found and start - {"a"} in found and start - {"a"} | {"j"} in found
    assert start | {"d", "e"} in found and all(len(start ^ other) <= 2 for other in found)
