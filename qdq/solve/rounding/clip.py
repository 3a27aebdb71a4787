"""Round to nearest with block scales that minimise the squared weight error: outliers are clipped where that pays.

Needs no data. At blocks of 128 normal values gain 1.3 dB over scales that clip nothing.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats, Singles
from qdq.core.qtensor import in_chunks
from qdq.solve.rounding import Dtype, Rounding, View, nearest

# Shares of the largest magnitude that are tried. The first clips nothing, so that no block is worse than with nearest;
# 7/8 lies on the grid: it is exact where the extreme value is negative, for codes go from -8 to 7.
RATIOS = 1 - np.arange(17, dtype=np.float32) / 32


def block_scales(view: View, H: Floats | None, *, low: int, high: int, float_codes: Dtype = None) -> Singles:
    """Scales of least squared weight error over RATIOS, as `BlockScales`; H is unused."""
    return searched(view, None, low=low, high=high, float_codes=float_codes)


def searched(view: View, importance: Singles | None, *, low: int, high: int, float_codes: Dtype = None) -> Singles:
    """Scales of least squared error, weighted by (blocks, block) `importance` of columns; None for equal weights."""
    whole = nearest.block_scales(view, None, low=low, high=high)
    best = whole.copy()

    def work(part: tuple[slice, slice]) -> None:
        x = view[part].astype(np.float32, copy=False)
        scale, chosen = whole[part], best[part]
        least = np.full(scale.shape, np.inf, dtype=np.float32)
        weight = None if importance is None else importance[None, part[1], :, None]
        error = np.empty_like(x)
        for ratio in RATIOS:
            trial = np.where(scale > 0, scale, 1) * ratio
            np.divide(x, trial, out=error)
            nearest.snap(error, low, high, float_codes, out=error)
            error *= trial
            error -= x
            np.square(error, out=error)
            if weight is not None:
                error *= weight
            total = error.sum(axis=2, keepdims=True)
            better = total < least
            least[better] = total[better]
            chosen[better] = trial[better]
        chosen[scale == 0] = 0

    in_chunks(work, view)
    return best


ROUNDING = Rounding(block_scales=block_scales, for_blocks=True)
