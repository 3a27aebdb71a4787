"""Coordinate descent on codes and block scales, from where GPTQ ends: each step lowers the layer's output error.

QuantEase, Behdin et al., arXiv 2309.01885: with H the second moment of the inputs and E = W - Q the error, the best
change of column j alone is (E H)_j / H_jj, rounded; columns are visited in turn until none changes. Between sweeps the
scale of every block moves to its least squares value for the codes it has.

H is damped as in GPTQ: few samples say nothing of many directions, in which the weight error itself must stay small.
Letters as in `qdq.solve.rounding.gptq`: W (rows, columns), H (columns, columns), objective per row E H E^T.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats
from qdq.solve.hessian import Hessian
from qdq.solve.rounding import Dtype, Refinement, Rounding, gptq, nearest

SWEEPS = 12  # most codes are settled after four


def round_rows(
    W: Floats, scale: Floats, hessian: Hessian | None, *, low: int, high: int, float_codes: Dtype = None
) -> Floats:
    """Codes that no change of one weight improves; no row is worse than with GPTQ, whose arguments these are."""
    codes = gptq.round_rows(W, scale, hessian, low=low, high=high, float_codes=float_codes)
    if hessian is None or not hessian.known:
        return codes
    return settle(W, codes, scale, hessian, low, high, float_codes)


def settle(
    W: Floats, codes: Floats, scale: Floats, hessian: Hessian, low: int, high: int, float_codes: Dtype = None
) -> Floats:
    """Codes that no change of one weight improves, found from others; no row gets worse."""
    start, codes, H = codes, codes.copy(), hessian.H
    step = np.broadcast_to(scale, W.shape)
    for _ in range(SWEEPS):
        if not _sweep(W, codes, step, hessian.damped, low, high, float_codes):
            break
    better = gptq.loss(W - codes * step, H) < gptq.loss(W - start * step, H)
    return np.where(better[:, None], codes, start)


def refine(W: Floats, codes: Floats, scales: Floats, hessian: Hessian, low: int, high: int) -> tuple[Floats, Floats]:
    """Better codes, and (rows, blocks) scales that go with them, positive as those to start from."""
    codes, scales = codes.copy(), scales.copy()
    block = W.shape[1] // scales.shape[1]
    for _ in range(SWEEPS):
        _refit(W, codes, scales, hessian.damped)
        if not _sweep(W, codes, np.repeat(scales, block, axis=1), hessian.damped, low, high, None):
            break
    return codes, scales


def _sweep(W: Floats, codes: Floats, step: Floats, H: Floats, low: int, high: int, float_codes: Dtype) -> bool:
    """Visit every column once; whether a code changed. Other columns than a block's own learn of it block by block."""
    pull = ((W - codes * step) @ H).T.copy()  # (columns, rows), as the three below: one column is read at a time
    held, steps = codes.T.copy(), step.T.copy()
    changed = False
    for start in range(0, H.shape[0], gptq.BLOCK):
        part = slice(start, min(start + gptq.BLOCK, H.shape[0]))
        near, square = pull[part].copy(), H[part, part]
        moves = np.zeros_like(near)
        for i, j in enumerate(range(part.start, part.stop)):
            if H[j, j] <= 0:
                continue
            wanted = nearest.snap(held[j] + near[i] / (H[j, j] * steps[j]), low, high, float_codes)
            moves[i] = (wanted - held[j]) * steps[j]
            if moves[i].any():
                near[i + 1 :] -= np.outer(square[i + 1 :, i], moves[i])
                held[j] = np.where(moves[i] != 0, wanted, held[j])  # else the sign of 0 would depend on other rows
        if moves.any():
            changed = True
            pull -= H[:, part] @ moves
    codes[...] = held.T
    return changed


def _refit(W: Floats, codes: Floats, scales: Floats, H: Floats) -> None:
    """Move each block's scale to its least squares value given all other blocks, in turn."""
    blocks = scales.shape[1]
    block = W.shape[1] // blocks
    error = W - codes * np.repeat(scales, block, axis=1)
    for b in range(blocks):
        part = slice(b * block, (b + 1) * block)
        q = codes[:, part]
        energy = np.einsum("ij,ij->i", q @ H[part, part], q)
        along = np.einsum("ij,ij->i", error @ H[:, part], q)
        found = scales[:, b] + np.divide(along, energy, out=np.zeros_like(along), where=energy > 0)
        found = np.where(found > 0, found, scales[:, b])
        error[:, part] -= q * (found - scales[:, b])[:, None]
        scales[:, b] = found


ROUNDING = Rounding(
    block_scales=gptq.block_scales,
    round_rows=round_rows,
    # GPTQ's codes need not be settled first
    refinement=Refinement(start=gptq.round_rows, refine=refine, settle=settle),
    needs_moments=True,
    settings=("damping", "act_order"),
)
