"""What a few measured engines say of the other predictions for a GPU: one factor for starts, one for all else.

predicted microseconds, those of starts among them, measured ones -> `Factors`
What predictions of a GPU are off by differs most between engines of many short kernels and of few long ones: starts
belong to the driver and the host as much as to the GPU. Must not know where the times come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Spreads of the logarithms before anything is measured: of what both factors share, of each beside that, and of what
# stays between engines of one GPU.
COMMON, EACH, NOISE = 1.0, 0.3, 0.1
ROUNDS, LIMIT = 20, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Measured / predicted time: of starts of kernels and products, and of all else."""

    work: float
    start: float


def factors(predicted_us: Sequence[float], start_us: Sequence[float], measured_us: Sequence[float]) -> Factors:
    """The most likely factors (maximum a posteriori); engines that differ little in their share of starts share one.

    Args:
        predicted_us: of whole engines, each above 0.
        start_us: what of that are starts of kernels and products.
        measured_us: of the same engines, each above 0.

    >>> found = factors([100.0, 100.0], [50.0, 50.0], [120.0, 120.0])
    >>> round(found.work, 2) == round(found.start, 2) == 1.2
    True
    """
    times = np.asarray(predicted_us, float)
    share = np.clip(np.asarray(start_us, float) / times, 0.0, 1.0)
    target = np.log(np.asarray(measured_us, float) / times)
    sure = np.linalg.inv(np.full((2, 2), COMMON**2) + np.eye(2) * EACH**2)
    x = np.zeros(2)
    for _ in range(ROUNDS):
        parts = np.stack([1 - share, share], axis=1) * np.exp(x)
        whole = parts.sum(axis=1)
        slope = parts / whole[:, None]
        matrix = slope.T @ slope / NOISE**2 + sure
        step = np.linalg.solve(matrix, slope.T @ (target - np.log(whole)) / NOISE**2 - sure @ x)
        x = x + np.clip(step, -LIMIT, LIMIT)
    return Factors(work=float(np.exp(x[0])), start=float(np.exp(x[1])))
