"""Round each weight to the nearest code; the objective is the weight error itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qdq.qtensor import in_chunks

Floats = npt.NDArray[np.float32]


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
        scale: (rows, 1) or (rows, columns) float64, positive.
        H: unused.
        low: smallest code.
        high: largest code.

    Returns:
        (rows, columns) float64, integers in [low, high].

    >>> round_rows(np.array([[0.9, -3.0]]), np.array([[1.0]]), None, low=-2, high=2).tolist()
    [[1.0, -2.0]]
    """
    return np.clip(np.rint(W / scale), low, high)


def block_scales(view: Floats, H: npt.NDArray[np.float64] | None, *, low: int, high: int) -> Floats:
    """Scales that clip nothing: the largest magnitude of each block over the largest code.

    Args:
        view: (outer, blocks, block, inner).
        H: unused.
        low: unused.
        high: largest code.

    Returns:
        (outer, blocks, 1, inner) float32, zero where a block holds zeros only.
    """
    scales = np.empty((*view.shape[:2], 1, view.shape[3]), dtype=np.float32)

    def work(part: tuple[slice, slice]) -> None:
        x = view[part].astype(np.float32, copy=False)
        scales[part] = np.maximum(x.max(axis=2, keepdims=True), -x.min(axis=2, keepdims=True)) / np.float32(high)

    in_chunks(work, view)
    return scales
