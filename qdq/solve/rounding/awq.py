"""AWQ's clipping: block scales that minimise the error at the layer's output, each block by itself.

Lin et al., AWQ, arXiv 2306.00978: per output channel and block the largest magnitude is lowered while
||x_g (w_g - q(w_g))||^2 falls. The other half of AWQ, scaling the input channels, is `equalize.formulas.awq`. Here the
norm is taken exactly from the second moments of the block's inputs.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats, Singles
from qdq.core.resources import on_all_cores
from qdq.solve.rounding import Dtype, Rounding, View, clip, nearest
from qdq.solve.rounding.clip import RATIOS

ROWS = 1024  # output channels worked on at a time, in each of the threads
SMALL = 16  # rows


def block_loss(error: Singles, moment: Singles) -> Singles:
    """(rows,) float32 e M e^T for the (rows, block) errors of one block, contiguous.

    Sixteen rows at a time: a product that small stays on the calling thread, for the threads are taken by blocks.
    """
    rows, block = error.shape
    whole = rows // SMALL * SMALL
    read = np.empty_like(error)
    np.matmul(error[:whole].reshape(-1, SMALL, block), moment, out=read[:whole].reshape(-1, SMALL, block))
    np.matmul(error[whole:], moment, out=read[whole:])
    return np.asarray(np.einsum("ij,ij->i", read, error))


def block_scales(view: View, H: Floats | None, *, low: int, high: int, float_codes: Dtype = None) -> Singles:
    """Scales of least output error over every other of RATIOS, as `BlockScales`; without H as `clip`."""
    if H is None or not H.any():
        return clip.block_scales(view, None, low=low, high=high, float_codes=float_codes)
    rows, blocks, block, _ = view.shape
    whole = nearest.block_scales(view, None, low=low, high=high)
    best = whole.copy()
    moments = [H[k : k + block, k : k + block].astype(np.float32) for k in range(0, blocks * block, block)]

    def work(b: int) -> None:
        for start in range(0, rows, ROWS):
            part = slice(start, start + ROWS)
            x = np.ascontiguousarray(view[part, b, :, 0], dtype=np.float32)
            scale, chosen = whole[part, b, :, 0], best[part, b, :, 0]
            safe = np.where(scale > 0, scale, 1)
            least = np.full(scale.shape, np.inf, dtype=np.float32)
            error = np.empty_like(x)
            for ratio in RATIOS[::2]:
                trial = safe * ratio
                np.divide(x, trial, out=error)
                nearest.snap(error, low, high, float_codes, out=error)
                error *= trial
                error -= x
                loss = block_loss(error, moments[b])[:, None]
                better = (loss < least) & (scale > 0)
                least[better] = loss[better]
                chosen[better] = trial[better]

    on_all_cores(work, range(blocks))
    return best


ROUNDING = Rounding(block_scales=block_scales, needs_moments=True, for_blocks=True)
