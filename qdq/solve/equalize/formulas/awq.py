"""AWQ's scaling: s_j = |X_j|^r, r searched, so that weights which meet large inputs are rounded more finely.

Lin et al., AWQ, arXiv 2306.00978, eq. 5; the weights play no part. The authors divide s by sqrt(max s * min s); here
the largest s is 1, so that no divided channel exceeds the range of the tensor; a common factor changes no code. For
weight-only quantization; `weight_only` chooses r by the error at the outputs of all layers that read the tensor.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats
from qdq.solve.equalize.formulas import Formula

STEPS = 20  # r = 0, 1/20, ... 19/20, as in the authors' code
FLOOR = 1e-4


def scales(amax: Floats, wmax: Floats, exponent: float = 0.5) -> Floats:
    """(channels,) divisors in [FLOOR, 1] from the root mean square of each input channel; all 1 at exponent 0.

    >>> scales(np.array([16.0, 1.0]), np.ones(2)).tolist()
    [1.0, 0.25]
    """
    s = np.maximum(amax / max(float(amax.max()), 1e-30), FLOOR) ** exponent
    return np.asarray(s / s.max())


def candidates(amax: Floats, wmax: Floats) -> list[Floats]:
    """One s per exponent; the first changes nothing."""
    return [scales(amax, wmax, r / STEPS) for r in range(STEPS)]


FORMULA = Formula(candidates=candidates, for_data=False)
