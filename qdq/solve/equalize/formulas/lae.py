"""FPTQ's logarithmic activation equalization: s_j = max|X_j| / log2(2 + max|X_j|), Li et al., arXiv 2308.15987.

Large channels are compressed to the logarithm of their range, small ones nearly to one size; the weights play no part.
FPTQ applies it to tensors whose largest magnitude lies between v0 and v1.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula

FLOOR = 1e-4  # of the largest divisor: a channel that was zero in calibration keeps a finite weight


def scales(amax: Floats, wmax: Floats) -> Floats:
    """(channels,) divisors in [FLOOR, 1] from the largest magnitude of each input channel, the largest of them 1.

    >>> scales(np.array([14.0, 2.0]), np.array([1.0, 1.0])).round(4).tolist()
    [1.0, 0.2857]
    """
    s = amax / np.log2(2 + amax)
    largest = float(s.max())
    return np.maximum(s / largest, FLOOR) if largest > 0 else np.ones_like(s)


# FPTQ's rule chooses the tensors; one that would lose by it is left alone all the same.
FORMULA = Formula(candidates=lambda amax, wmax: [scales(amax, wmax)])
