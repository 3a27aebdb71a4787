"""SmoothQuant as published, s_j = amax|X_j|^a / amax|W_j|^(1 - a), with a searched per tensor.

Xiao et al., arXiv 2211.10438, eq. 4; a = 0.5 by default there, 0.7 to 0.9 for some language models. Strong exponents
assume that calibration has seen every channel's range; `smoothquant` is the cautious form of the same ratio.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula

EXPONENTS = (0.5, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
FLOOR = 1e-5  # of either range, as in the authors' code


def scales(amax: Floats, wmax: Floats, exponent: float = EXPONENTS[0]) -> Floats:
    """(channels,) divisors in [FLOOR, 1] from the largest magnitudes of each input channel and of its weights.

    >>> scales(np.array([16.0, 1.0]), np.array([1.0, 1.0])).tolist()
    [1.0, 0.25]
    """
    r, w = (np.maximum(v / max(float(v.max()), 1e-30), FLOOR) for v in (amax, wmax))
    s = r**exponent / w ** (1 - exponent)
    return np.asarray(np.maximum(s / s.max(), FLOOR))


def candidates(amax: Floats, wmax: Floats) -> list[Floats]:
    """One s per exponent in EXPONENTS."""
    return [scales(amax, wmax, a) for a in EXPONENTS]


FORMULA = Formula(candidates=candidates)
