"""Round each weight to the nearest code; the objective is the weight error itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats, Singles
from qdq.core.qtensor import block_amax
from qdq.solve.hessian import Hessian
from qdq.solve.rounding import Dtype, Rounding, View

Values = npt.NDArray[np.floating]


def snap(x: Values, low: int, high: int, float_codes: Dtype = None, out: Values | None = None) -> npt.NDArray[Any]:
    """The nearest values that codes have, ties to even.

    `x` is in units of the scale; `out` may be `x` itself.

    >>> snap(np.array([0.2, 2.6, 9.0]), -6, 6, FORMATS["nvfp4"].dtype).tolist()
    [0.0, 3.0, 6.0]
    """
    if float_codes is None:
        return np.clip(np.rint(x, out=out), low, high, out=out)
    found = np.clip(x, low, high, out=out)
    if out is None:
        return found.astype(float_codes).astype(x.dtype)
    out[...] = found.astype(float_codes)
    return out


def round_rows(
    W: Floats, scale: Floats, hessian: Hessian | None, *, low: int, high: int, float_codes: Dtype = None
) -> Floats:
    """Nearest codes, ties to even, as `RoundRows`; the Hessian is unused.

    >>> round_rows(np.array([[0.9, -3.0]]), np.array([[1.0]]), None, low=-2, high=2).tolist()
    [[1.0, -2.0]]
    """
    return snap(W / scale, low, high, float_codes)


def block_scales(view: View, H: Floats | None, *, low: int, high: int, float_codes: Dtype = None) -> Singles:
    """Scales that clip nothing, as `BlockScales`: the largest magnitude of each block over the largest code."""
    return np.asarray(block_amax(view) / np.float32(high))


ROUNDING = Rounding(block_scales=block_scales)
