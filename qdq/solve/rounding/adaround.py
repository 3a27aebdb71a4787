"""AdaRound: for each weight whether it is rounded up or down, by the layer's output error.

Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, arXiv 2004.10568: a code is floor(w / s) + h
with h 0 or 1, so that E H E^T is least for the second moments H of the layer's inputs (their equation 12, exact for any
linear layer or convolution without its activation). The paper relaxes h to a rectified sigmoid and takes 20000 steps of
Adam; here GPTQ's order and coordinate descent choose among the same two codes. On correlated inputs (rank 8 and noise,
64 columns) that gains 20 dB over nearest codes, where 500 steps of the relaxation on all of H gained 3.
Other than with `descent` no weight moves by a whole step, which few samples might ask for. What is learned from
activations, block by block, is `reconstruct`.

Letters as in `qdq.solve.rounding.gptq`: W (rows, columns), H (columns, columns), E = W - Q.
"""

from __future__ import annotations

import numpy as np

from qdq.core.arrays import Floats, Singles
from qdq.solve.hessian import Hessian
from qdq.solve.rounding import Dtype, Rounding, View, descent, gptq, nearest


def round_rows(
    W: Floats, scale: Floats, hessian: Hessian | None, *, low: int, high: int, float_codes: Dtype = None
) -> Floats:
    """The codes next to each weight of least output error, as `RoundRows`; no row is worse than nearest."""
    if hessian is None or not hessian.known or float_codes is not None:
        return nearest.round_rows(W, scale, hessian, low=low, high=high, float_codes=float_codes)
    below = np.clip(np.floor(W / scale), low, high - 1)
    return below + descent.round_rows(W - below * scale, scale, hessian, low=0, high=1)


def block_scales(view: View, H: Floats | None, *, low: int, high: int, float_codes: Dtype = None) -> Singles:
    """As `BlockScales`: of integers those of `gptq`; floating-point codes are the nearest, whatever H says."""
    return gptq.block_scales(view, H if float_codes is None else None, low=low, high=high, float_codes=float_codes)


ROUNDING = Rounding(
    block_scales=block_scales, round_rows=round_rows, needs_moments=True, settings=("damping", "act_order")
)
