"""Cross-layer equalization: s_j = sqrt(r1_j / r2_j), from weights alone, so that two layers in a row are alike.

r1_j is the range of the weights that make channel j, r2_j of those that read it; divided and multiplied by s_j both
become sqrt(r1_j r2_j). Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
arXiv 1906.04721, eq. 11. For weights with one scale for all channels, and for depthwise chains. `qdq.cross_layer`
applies it to pairs of layers until none changes.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula

FLOOR = 0.01  # of the largest divisor: a channel with hardly a weight would only get a huge bias


def scales(amax: Floats, wmax: Floats) -> Floats:
    """Divisors of the channels between two layers, scaled so that the largest is 1.

    Args:
        amax: (channels,) float64, r1: largest magnitude of the weights that make each channel.
        wmax: (channels,) float64, r2: largest magnitude of the weights that read it.

    Returns:
        (channels,) float64 in [FLOOR, 1]; 1 for a channel that nothing makes or reads.

    >>> scales(np.array([4.0, 1.0]), np.array([1.0, 4.0])).tolist()
    [1.0, 0.25]
    """
    alive = (amax > 0) & (wmax > 0)
    s = np.sqrt(np.divide(amax, wmax, out=np.ones_like(amax), where=alive))
    largest = float(s[alive].max()) if alive.any() else 1.0
    return np.where(alive, np.maximum(s / largest, FLOOR), 1.0)


FORMULA = Formula(candidates=lambda amax, wmax: [scales(amax, wmax)])
