"""Names of array types, and an order of rows that several stages cut into parts."""

from __future__ import annotations

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
