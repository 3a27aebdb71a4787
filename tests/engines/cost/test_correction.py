"""What a few engines say of the others."""

from __future__ import annotations

import numpy as np
import pytest

from engines.cost.correction import factors


@pytest.mark.parametrize(("work", "start"), [(1.0, 1.0), (0.8, 1.4), (1.3, 0.9), (1.5, 1.5)])
def test_engines_of_many_shares_of_starts_tell_both_factors(work: float, start: float) -> None:
    predicted, starts = np.full(8, 100.0), np.linspace(5, 95, 8)
    measured = (predicted - starts) * work + starts * start
    found = factors(predicted.tolist(), starts.tolist(), measured.tolist())
    assert (found.work, found.start) == pytest.approx((work, start), rel=0.03)


def test_engines_of_one_share_are_corrected_by_one_factor() -> None:
    found = factors([100.0] * 4, [30.0] * 4, [130.0] * 4)
    assert 0.7 * found.work + 0.3 * found.start == pytest.approx(1.3, rel=0.02)
    assert 1.1 < found.start < found.work < 1.4


def test_starts_that_no_engine_tells_of_follow_the_rest() -> None:
    found = factors([100.0], [1.0], [200.0])
    assert found.work == pytest.approx(2, rel=0.02) and 1.7 < found.start < found.work


def test_both_factors_lead_to_better_times_than_one() -> None:
    """A GPU whose starts take twice as long and its work as predicted, with noise: what four engines say of others."""
    rng = np.random.default_rng(0)
    predicted, share = rng.uniform(50, 5000, 200), rng.uniform(0.05, 0.9, 200)
    starts = predicted * share
    measured = (predicted + starts) * np.exp(0.05 * rng.standard_normal(200))
    two, one = [], []
    for _ in range(50):
        some = rng.choice(200, 4, replace=False)
        found = factors(predicted[some].tolist(), starts[some].tolist(), measured[some].tolist())
        both = (predicted - starts) * found.work + starts * found.start
        single = predicted * np.exp(np.log(measured[some] / predicted[some]).mean())
        two.append(np.median(np.abs(both / measured - 1)))
        one.append(np.median(np.abs(single / measured - 1)))
    assert np.mean(two) < 0.65 * np.mean(one)
