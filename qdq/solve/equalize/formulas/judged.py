"""SmoothQuant's ratios, cautious and as published, each tensor's judged on samples that its range was not taken from.

A tensor may also keep its channels as they are, with a wider range than was measured: where few vectors were seen (the
means of whole images before a classifier), the largest to come is larger. Xiao et al., arXiv 2211.10438, eq. 4.
"""

from __future__ import annotations

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula, smooth, smoothquant

MINIMUM_GAIN_DB = 1.0


def scales(amax: Floats, wmax: Floats) -> Floats:
    """(channels,) divisors in (0, 1] from the largest magnitudes by input channel: the cautious ones.

    >>> import numpy as np
    >>> scales(np.array([16.0, 1.0]), np.array([1.0, 1.0])).tolist()
    [1.0, 0.5]
    """
    return smoothquant.scales(amax, wmax)


def candidates(amax: Floats, wmax: Floats) -> list[Floats]:
    """The cautious divisors, then the published ones by exponent."""
    return [scales(amax, wmax), *smooth.candidates(amax, wmax)]


FORMULA = Formula(candidates=candidates, minimum_gain_db=MINIMUM_GAIN_DB, judged=True)
