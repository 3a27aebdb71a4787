"""GPTQ: round column by column and let the columns not yet rounded make up for the error.

Letters of Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1: W (rows, columns), H = X X^T over calibration inputs,
objective per row (W - Q) H (W - Q)^T. Columns go in the order of falling H diagonal (act-order of the authors' code).
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats, Singles
from qdq.solve.hessian import Factor, Hessian
from qdq.solve.rounding import Dtype, Rounding, View, clip, nearest

BLOCK = 128  # columns whose updates to the later ones are applied at once


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
    W: Floats, scale: Floats, hessian: Hessian | None, *, low: int, high: int, float_codes: Dtype = None
) -> Floats:
    """Codes that keep the layer's output error on the calibration inputs small; no row is worse than nearest.

    As `RoundRows`.
    """
    plain = nearest.round_rows(W, scale, hessian, low=low, high=high, float_codes=float_codes)
    if hessian is None or not hessian.known:
        return plain
    order, H = hessian.factor.order, hessian.H
    codes = np.empty_like(plain)
    ordered = scale if scale.shape[1] == 1 else scale[:, order]
    left = np.ascontiguousarray(W[:, order])
    codes[:, order] = _sweep(left, ordered, hessian.factor, low, high, float_codes)
    better = loss(W - codes * scale, H) < loss(W - plain * scale, H)
    return np.where(better[:, None], codes, plain)


def _sweep(left: Floats, scale: Floats, factor: Factor, low: int, high: int, float_codes: Dtype) -> Floats:
    """Algorithm 1 on columns that are already in order; `left` is overwritten."""
    U, columns = factor.upper, left.shape[1]
    codes = np.empty_like(left)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.empty((left.shape[0], stop - start))
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
