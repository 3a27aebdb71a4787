"""Channel-scale formulas: one file each; the file name is the option's value, and `FORMULA` what the file defines.

x_j W_j = (x_j / s_j) (s_j W_j) for every input channel j; a formula only chooses s. Letters as in SmoothQuant: X
activations, W weights, j the input channel. `qdq.solve.equalize` measures, decides where a formula pays, and applies
it. A formula must not see samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats
from qdq.core.members import Members


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """One way to choose channel scales.

    Attributes:
        candidates: (amax, wmax), largest magnitudes by input channel of activations and weights -> divisors to choose
            from, each (channels,) float64, positive and at most 1.
        minimum_gain_db: the predicted gain below which a tensor is left alone.
        headroom: range of an equalized tensor over its calibrated one: equalized channels all lie near the limit.
        held_out: its candidates are compared on samples that their ranges were not made from.
        for_data: it is meant for data that are quantized; else for weight-only blocks alone.
        by_weights: (output channels, input channels) -> (channels,) divisors for weight-only blocks, from the weights
            alone; None balances those as AWQ does, by the second moments of their inputs.
    """

    candidates: Callable[[Floats, Floats], Sequence[Floats]]
    minimum_gain_db: float = 0.0
    headroom: float = 1.25
    held_out: bool = False
    for_data: bool = True
    by_weights: Callable[[npt.NDArray[np.floating]], Floats] | None = None


FORMULAS: Members[Formula] = Members(__name__, "FORMULA")


def formula(equalize: str) -> Formula | None:
    """The formula of a setting that is settled, None where it names none."""
    return FORMULAS.get(equalize)
