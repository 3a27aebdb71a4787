"""GPTQ: round column by column and let the columns not yet rounded make up for the error.

Letters of Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1: W (rows, columns), H = X X^T over calibration inputs,
objective per row (W - Q) H (W - Q)^T. Columns go in the order of falling H diagonal (act-order of the authors' code).
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats, Singles
from qdq.solve.rounding import Dtype, Rounding, View, clip, nearest

DAMP = 0.01  # of the mean diagonal, as in the paper's code
BLOCK = 128  # columns whose updates to the later ones are applied at once


def damped(H: Floats, damping: float = DAMP) -> Floats:
    """H with a share of its mean diagonal added to the diagonal."""
    found = H.copy()
    np.fill_diagonal(found, np.diag(H) + damping * np.mean(np.diag(H)))
    return found


def loss(E: Floats, H: Floats) -> Floats:
    """Per row E H E^T: the squared output error that a weight error E causes; (rows,) float64."""
    return np.asarray(np.einsum("ij,ij->i", E @ H, E))


def block_scales(view: View, H: Floats | None, *, low: int, high: int, float_codes: Dtype = None) -> Singles:
    """Scales before any weight is rounded (the authors' static groups), so that columns may go in any order.

    As `BlockScales`; the diagonal of H weighs the squared errors, None weighs them alike.
    """
    known = H is not None and H.any()
    importance = np.diag(H).reshape(view.shape[1:3]).astype(np.float32) if H is not None and known else None
    return clip.searched(view, importance, low=low, high=high, float_codes=float_codes)


def round_rows(
    W: Floats,
    scale: Floats,
    H: Floats | None,
    *,
    low: int,
    high: int,
    float_codes: Dtype = None,
    damping: float = DAMP,
    act_order: bool = True,
) -> Floats:
    """Codes that keep the layer's output error on the calibration inputs small; no row is worse than nearest.

    As `RoundRows`; `damping` is the share of H's mean diagonal that is added to the diagonal, `act_order` takes the
    columns by falling H diagonal, else in the order they lie in.
    """
    plain = nearest.round_rows(W, scale, H, low=low, high=high, float_codes=float_codes)
    if H is None or not H.any():
        return plain
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(H.shape[0])
    codes = np.empty_like(plain)
    ordered = scale if scale.shape[1] == 1 else scale[:, order]
    codes[:, order] = _sweep(W[:, order], ordered, damped(H[np.ix_(order, order)], damping), low, high, float_codes)
    better = loss(W - codes * scale, H) < loss(W - plain * scale, H)
    return np.where(better[:, None], codes, plain)


def _sweep(W: Floats, scale: Floats, H: Floats, low: int, high: int, float_codes: Dtype) -> Floats:
    """Algorithm 1 on columns that are already in order, with H damped."""
    columns = H.shape[0]
    # The upper Cholesky factor of the inverse: row j tells how the error of column j is spread over the later columns.
    inverse = np.linalg.inv(H)
    U = np.linalg.cholesky((inverse + inverse.T) / 2).T
    left = W.copy()
    codes = np.empty_like(W)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.empty((W.shape[0], stop - start))
        for j in range(start, stop):
            step = scale[:, j] if scale.shape[1] > 1 else scale[:, 0]
            codes[:, j] = nearest.snap(left[:, j] / step, low, high, float_codes)
            errors[:, j - start] = (left[:, j] - codes[:, j] * step) / U[j, j]
            left[:, j:stop] -= np.outer(errors[:, j - start], U[j, j:stop])
        left[:, stop:] -= errors @ U[start:stop, stop:]
    return codes


ROUNDING = Rounding(
    block_scales=block_scales, round_rows=round_rows, needs_moments=True, settings=("damping", "act_order")
)
