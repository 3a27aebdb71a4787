"""SmoothQuant's ratio with both exponents searched per tensor, each choice validated on samples held out.

s_j = amax|X_j|^a / amax|W_j|^b. With a = 1 every channel has a range of its own: best in front of a depthwise
convolution, whose scales per channel take the factors, and where channels differ by far more than samples do.
`equalize.choose` makes the ranges from a part of the samples and takes the noise on the others, part by part, so that
a strong exponent is taken only where channels keep their ranges.

Source of the ratio: Xiao et al., SmoothQuant, arXiv 2211.10438, eq. 4; of ranges per channel in front of depthwise
convolutions: Nagel et al., arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula

EXPONENTS = ((0.25, 0.25), (0.5, 0.5), (0.5, 0.0), (0.75, 0.25), (1.0, 0.0))  # of activations and of weights
FLOOR = 0.03  # of either range and of divisors: a channel that hardly showed may be larger later
HEADROOM = 1.5
MINIMUM_GAIN_DB = 1.0  # over all parts held out


def scales(amax: Floats, wmax: Floats, exponents: tuple[float, float] = EXPONENTS[-1]) -> Floats:
    """(channels,) divisors in [FLOOR, 1] from the largest magnitudes of each input channel and of its weights.

    >>> scales(np.array([4.0, 1.0]), np.array([1.0, 1.0])).tolist()
    [1.0, 0.25]
    """
    r, w = (np.maximum(v / max(float(v.max()), 1e-30), FLOOR) for v in (amax, wmax))
    s = r ** exponents[0] / w ** exponents[1]
    return np.asarray(np.maximum(s / s.max(), FLOOR))


def candidates(amax: Floats, wmax: Floats) -> list[Floats]:
    """One s per pair in EXPONENTS."""
    return [scales(amax, wmax, pair) for pair in EXPONENTS]


FORMULA = Formula(candidates=candidates, minimum_gain_db=MINIMUM_GAIN_DB, headroom=HEADROOM, held_out=True)
