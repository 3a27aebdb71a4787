"""What roundings know of a weight's inputs: H, and what follows from it once for all rows of the weight.

second moments of the inputs -> `Hessian`: H, H damped, and GPTQ's Cholesky factor -> every slice of rows is rounded by
them. H = X X^T over calibration inputs is half the Hessian of a row's output error, hence the name, which is the
field's. It must not know weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats

DAMPING = 0.01  # of the mean diagonal, as in the code of GPTQ's paper
COPIES = 5  # of H that live at a time while the factor is computed, H among them: numpy inverts in two more


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """How GPTQ passes errors on.

    Attributes:
        order: (columns,) in which columns are rounded.
        upper: (columns, columns) upper Cholesky factor of the inverse of the damped H, in that order: row j tells how
            the error of column j is spread over the later columns.
    """

    order: npt.NDArray[np.intp]
    upper: Floats


@dataclass(frozen=True)
class Hessian:
    """Second moments of a weight's inputs, symmetric and positive semidefinite.

    Attributes:
        H: (columns, columns) float64.
        damping: the share of the mean diagonal that is added to the diagonal.
        act_order: GPTQ takes the columns by falling diagonal, else in the order they lie in.
    """

    H: Floats
    damping: float = DAMPING
    act_order: bool = True

    @cached_property
    def known(self) -> bool:
        """Whether it says anything."""
        return bool(self.H.any())

    @cached_property
    def damped(self) -> Floats:
        """H with a share of its mean diagonal added to the diagonal."""
        return _damp(self.H.copy(), self.damping)

    @cached_property
    def factor(self) -> Factor:
        """The order of the columns and the factor of the inverse, arXiv 2210.17323, algorithm 1."""
        order = np.argsort(-np.diag(self.H), kind="stable") if self.act_order else np.arange(self.H.shape[0])
        inverse = np.linalg.inv(_damp(self.H[np.ix_(order, order)], self.damping))
        even = inverse + inverse.T
        del inverse
        even /= 2
        return Factor(order=order, upper=np.linalg.cholesky(even).T)


def _damp(H: Floats, damping: float) -> Floats:
    """Damp a matrix in its place."""
    diagonal = np.diag(H)
    np.fill_diagonal(H, diagonal + damping * np.mean(diagonal))
    return H
