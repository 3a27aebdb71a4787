"""SINQ's column scales: s_j from the weights alone, so that every row and every column has the same deviation.

Müller et al., SINQ, arXiv 2509.22944: W = diag(r) Q diag(c), r and c by turns of dividing the rows and the columns by
their standard deviations, after Sinkhorn. s = 1 / c; r is part of the scales of the rows, or of their blocks. An input
channel whose weights are large no longer sets the scale of the others in its block. Needs no data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula

TURNS = 16
FLOOR = 1e-3  # of the largest divisor: a channel with hardly a weight would take the range of the data


def scales(amax: Floats, wmax: Floats) -> Floats:
    """(channels,) divisors in [FLOOR, 1] from the largest weight that reads each input channel: the first turn.

    >>> scales(np.ones(2), np.array([4.0, 1.0])).tolist()
    [0.25, 1.0]
    """
    return _divisors(wmax)


def balanced(weight: npt.NDArray[np.floating]) -> Floats:
    """(input channels,) divisors in [FLOOR, 1] of an (output, input channels) matrix: those of least imbalance."""
    left = np.asarray(weight, dtype=np.float32)
    columns = np.ones(left.shape[1])
    best, least = columns, np.inf
    for _ in range(TURNS):
        imbalance = imbalance_of(left)
        if imbalance >= least:
            break
        best, least = columns.copy(), imbalance
        rows = _deviations(left, 1)
        left = np.asarray(left / rows[:, None], dtype=np.float32)
        each = _deviations(left, 0)
        left = np.asarray(left / each, dtype=np.float32)
        columns *= each
    return _divisors(best)


def imbalance_of(weight: npt.NDArray[np.floating]) -> float:
    """The largest deviation of a row or column over the smallest; those of zeros only do not count."""
    found = np.concatenate([np.std(weight, axis=axis, dtype=np.float64) for axis in (0, 1)])
    found = found[found > 0]
    return float(found.max() / found.min()) if found.size else 1.0


def _deviations(weight: npt.NDArray[np.floating], axis: int) -> Floats:
    """Standard deviations, 1 where there is none."""
    found = np.std(weight, axis=axis, dtype=np.float64)
    return np.where(found > 0, found, 1.0)


def _divisors(columns: Floats) -> Floats:
    """1 / c, scaled so that the largest is 1; a channel of no size counts as the smallest of the others."""
    alive = columns > 0
    smallest = float(columns[alive].min()) if alive.any() else 1.0
    return np.asarray(np.maximum(smallest / np.where(alive, columns, smallest), FLOOR))


FORMULA = Formula(candidates=lambda amax, wmax: [scales(amax, wmax)], by_weights=balanced)
