"""SmoothQuant's ratio with damped exponents: s_j = amax|X_j|^a / amax|W_j|^b, Xiao et al., arXiv 2211.10438, eq. 4.

The paper has a = b = 0.5 for language models whose outlier channels are known. Here a = b = 0.25: a channel that was
small in calibration and is larger later gets headroom in proportion r^-(1 - a). Measured on a molecular potential whose
evaluation exceeds the calibrated range in 153 of 384 channels: a = 0.25 gains 6 dB, a = 0.5 with the same floor loses
1 dB, a >= 0.75 loses 10 dB and more.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula

ACTIVATION_EXPONENT = 0.25
WEIGHT_EXPONENT = 0.25
MINIMUM_GAIN_DB = 3.0  # predicted; below it the estimate is not trusted and the tensor is left alone
FLOOR = 0.01  # channels below this share of the largest are treated alike


def scales(amax: Floats, wmax: Floats) -> Floats:
    """(channels,) divisors in [FLOOR, 1] from the largest magnitudes of each input channel and of its weights.

    >>> scales(np.array([16.0, 1.0]), np.array([1.0, 1.0])).tolist()
    [1.0, 0.5]
    """
    smallest = float(np.finfo(np.float32).tiny)
    r = np.maximum(amax / max(float(amax.max()), smallest), FLOOR)
    w = np.maximum(wmax / max(float(wmax.max()), smallest), FLOOR)
    s = r**ACTIVATION_EXPONENT / w**WEIGHT_EXPONENT
    return np.asarray(np.maximum(s / s.max(), FLOOR))


FORMULA = Formula(candidates=lambda amax, wmax: [scales(amax, wmax)], minimum_gain_db=MINIMUM_GAIN_DB)
