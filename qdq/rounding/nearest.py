"""Round each weight to the nearest code; the objective is the weight error itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def round_rows(
    W: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
    H: npt.NDArray[np.float64] | None,
    *,
    low: int,
    high: int,
) -> npt.NDArray[np.float64]:
    """Nearest codes, ties to even.

    Args:
        W: (rows, columns) float64.
        scale: (rows, 1) float64, positive.
        H: unused.
        low: smallest code.
        high: largest code.

    Returns:
        (rows, columns) float64, integers in [low, high].

    >>> round_rows(np.array([[0.9, -3.0]]), np.array([[1.0]]), None, low=-2, high=2).tolist()
    [[1.0, -2.0]]
    """
    return np.clip(np.rint(W / scale), low, high)
