"""The sampler's arithmetic against the papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest

from qdq.core.errors import InputError
from qdq.deploy.diffusion.schedule import Schedule, cosine

RANDOM = np.random.default_rng(0)
X, NOISE, DRAWN = RANDOM.standard_normal((3, 2, 3, 4, 4), np.float32)


def test_eta_1_is_the_posterior_of_ddpm() -> None:
    for step in list(Schedule.spaced(cosine(), 50))[:-1]:
        alpha = step.kept / step.kept_next
        mean = (X - (1 - alpha) / np.sqrt(1 - step.kept) * NOISE) / np.sqrt(alpha)
        variance = (1 - alpha) * (1 - step.kept_next) / (1 - step.kept)
        assert np.allclose(step.next(X, NOISE, DRAWN), mean + np.sqrt(variance) * DRAWN, rtol=1e-4, atol=1e-5)


def test_with_the_true_noise_ddim_ends_at_the_picture() -> None:
    schedule, at = Schedule.spaced(cosine(), 20, eta=0), None
    for step in schedule:
        at = np.sqrt(step.kept) * X + np.sqrt(1 - step.kept) * NOISE if at is None else at
        assert np.allclose(at, np.sqrt(step.kept) * X + np.sqrt(1 - step.kept) * NOISE, atol=1e-4)
        at = step.next(at, NOISE, DRAWN)
    assert at is not None and np.allclose(at, X, atol=1e-4)


def test_an_error_of_the_prediction_moves_the_next_array_by_the_factor() -> None:
    for eta in (0.0, 0.5, 1.0):
        for step in Schedule.spaced(cosine(), 10, eta=eta):
            moved = step.next(X, NOISE + 1, DRAWN) - step.next(X, NOISE, DRAWN)
            assert np.allclose(moved, step.factor, rtol=1e-3, atol=1e-4)


def test_as_much_less_noise_is_added_as_the_prediction_has() -> None:
    step = next(iter(Schedule.spaced(cosine(), 50)))
    for excess, left in ((0.1, step.variance - 0.1 * step.factor**2), (1e3, 0.0)):
        still = step.next(X, NOISE, np.zeros_like(X), excess=excess)
        assert np.allclose(step.next(X, NOISE, DRAWN, excess=excess) - still, np.sqrt(left) * DRAWN, atol=1e-4)


def test_the_predicted_picture_is_held_to_the_clip() -> None:
    last = list(Schedule.spaced(cosine(), 10, clip=0.25))[-1]
    assert np.abs(last.next(10 * X, NOISE, DRAWN)).max() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kept": [0.5, 0.9], "steps": [1, 0]}, "fall"),
        ({"kept": [1.0, 0.5], "steps": [1, 0]}, "below 1"),
        ({"kept": [0.9, 0.5], "steps": [0, 1]}, "falling whole numbers from 0 to 1"),
        ({"kept": [0.9, 0.5], "steps": [2, 0]}, "falling whole numbers"),
        ({"kept": [0.9, 0.5], "steps": []}, "falling whole numbers"),
        ({"kept": [0.9, 0.5], "steps": [1], "eta": 2.0}, "eta is 2"),
        ({"kept": [0.9, 0.5], "steps": [1.5, 0.5]}, "falling whole numbers"),
        ({"kept": [0.9, 0.5], "steps": [float("nan")]}, "falling whole numbers"),
        ({"kept": [0.9, 0.5], "steps": [1, 0], "clip": -1.0}, "clip is -1"),
        ({"kept": [0.9, 0.5], "steps": [1, 0], "clip": float("nan")}, "clip is nan"),
    ],
)
def test_what_is_no_schedule_is_refused(fields: dict[str, list[float]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Schedule(**fields)  # type: ignore[arg-type]


def test_more_steps_than_there_are_are_refused() -> None:
    with pytest.raises(InputError, match="from 1 to the 4"):
        Schedule.spaced(cosine(4), 5)
    with pytest.raises(InputError, match=r"2\.5 steps are asked for"):
        Schedule.spaced(cosine(4), 2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one"):
        cosine(0)
