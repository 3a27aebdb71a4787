"""Round each weight to the nearest code; the objective is the weight error itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.core.qtensor import in_chunks
from qdq.solve.rounding import Kind, Rounding, View

Floats = npt.NDArray[np.float32]


def snap(
    x: npt.NDArray[np.floating], low: int, high: int, kind: Kind = None, out: npt.NDArray[np.floating] | None = None
) -> npt.NDArray[Any]:
    """The nearest values that codes have, ties to even.

    Args:
        x: any shape, in units of the scale.
        low: smallest code.
        high: largest code.
        kind: a floating-point type of NumPy whose values codes have; None for integers.
        out: where to, may be x itself.

    >>> snap(np.array([0.2, 2.6, 9.0]), -6, 6, FORMATS["nvfp4"].dtype).tolist()
    [0.0, 3.0, 6.0]
    """
    if kind is None:
        return np.clip(np.rint(x, out=out), low, high, out=out)
    found = np.clip(x, low, high, out=out)
    if out is None:
        return found.astype(kind).astype(x.dtype)
    out[...] = found.astype(kind)
    return out


def round_rows(
    W: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
    H: npt.NDArray[np.float64] | None,
    *,
    low: int,
    high: int,
    kind: Kind = None,
    damping: float = 0.0,
    act_order: bool = True,
) -> npt.NDArray[np.float64]:
    """Nearest codes, ties to even.

    Args:
        W: (rows, columns) float64.
        scale: (rows, 1) or (rows, columns) float64, positive.
        H: unused.
        low: smallest code.
        high: largest code.
        kind: as of `snap`.
        damping: unused.
        act_order: unused.

    Returns:
        (rows, columns) float64, integers in [low, high].

    >>> round_rows(np.array([[0.9, -3.0]]), np.array([[1.0]]), None, low=-2, high=2).tolist()
    [[1.0, -2.0]]
    """
    return snap(W / scale, low, high, kind)


def block_scales(view: View, H: npt.NDArray[np.float64] | None, *, low: int, high: int, kind: Kind = None) -> Floats:
    """Scales that clip nothing: the largest magnitude of each block over the largest code.

    Args:
        view: (outer, blocks, block, inner).
        H: unused.
        low: unused.
        high: largest code.
        kind: unused.

    Returns:
        (outer, blocks, 1, inner) float32, zero where a block holds zeros only.
    """
    scales = np.empty((*view.shape[:2], 1, view.shape[3]), dtype=np.float32)

    def work(part: tuple[slice, slice]) -> None:
        x = view[part].astype(np.float32, copy=False)
        scales[part] = np.maximum(x.max(axis=2, keepdims=True), -x.min(axis=2, keepdims=True)) / np.float32(high)

    in_chunks(work, view)
    return scales


ROUNDING = Rounding(block_scales=block_scales)
