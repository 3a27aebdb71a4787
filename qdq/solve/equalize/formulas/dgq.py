"""DGQ's percentile smoothing: only outlier channels are divided, down to the range of the largest ordinary one.

s_j = max(amax_j / base, 1), base the range that all but a small share of the channels stay within; Zhang et al., Dual
Grained Quantization, arXiv 2310.04836. The ratios among all other channels stay as they are.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula

SHARE = 0.005  # of the channels are outliers, at least one


def scales(amax: Floats, wmax: Floats) -> Floats:
    """Divisors of the input channels, scaled so that the largest is 1: no divided channel exceeds the tensor's range.

    Args:
        amax: (channels,) float64, largest magnitude of each input channel.
        wmax: unused.

    Returns:
        (channels,) float64.

    >>> scales(np.array([8.0, 2.0, 1.0]), np.ones(3)).tolist()
    [1.0, 0.25, 0.25]
    """
    ordered = np.sort(amax)[::-1]
    base = float(ordered[min(max(int(SHARE * amax.size), 1), amax.size - 1)])
    if base <= 0:
        return np.ones_like(amax)
    s = np.maximum(amax / base, 1.0)
    return np.asarray(s / s.max())


FORMULA = Formula(candidates=lambda amax, wmax: [scales(amax, wmax)])
