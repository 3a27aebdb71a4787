"""Names of array types, an order of rows that several stages cut into parts, and how alike two orders are."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]


def along_widest(centred: Floats) -> list[int]:
    """The order of rows along the direction in which they vary most; their mean is zero.

    What is cut off at either end is of another kind than the rest, as data seen later are; parts drawn by chance are
    not.
    """
    return [int(i) for i in np.argsort(np.linalg.eigh(centred @ centred.T)[1][:, -1], kind="stable")]


def part(count: int, index: int, parts: int) -> slice:
    """The place of one of some parts, of as equal length as there can be."""
    return slice(round(count * index / parts), round(count * (index + 1) / parts))


def ranks(values: npt.NDArray[np.floating]) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)])


def spearman(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """Pearson's correlation of the ranks; NaN where all of one are equal, or one is not finite."""
    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    x, y = (ranks(v) - (len(v) + 1) / 2 for v in (a, b))
    spread = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / spread if spread else math.nan
