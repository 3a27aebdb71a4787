"""Weight roundings: one file each; the file name is the option's value, and `ROUNDING` what the file defines.

Letters as in the papers: W (rows, columns), one row per output channel; H (columns, columns), second moment of inputs.
A view is (outer, blocks, block, inner) as of `qtensor.blocked`: a matrix is looked at in the order it is stored. Rows
do not depend on each other, so that a large weight is rounded in slices of rows.
It must not know plans, nor read samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats, Singles
from qdq.core.members import Members
from qdq.solve.hessian import Hessian

View = npt.NDArray[np.floating]
Dtype = np.dtype[np.generic] | None  # the type whose values codes have; None for integers


class BlockScales(Protocol):
    """Chooses scales of blocks whose codes go from `low` to `high`."""

    def __call__(self, view: View, H: Floats | None, *, low: int, high: int, float_codes: Dtype = None) -> Singles:
        """(outer, blocks, 1, inner) float32 for an (outer, blocks, block, inner) view, zero for a block of zeros."""


class RoundRows(Protocol):
    """Chooses codes for positive scales of (rows, 1) or (rows, columns), each row by itself.

    Where the Hessian is None or all zero nothing is known of the inputs, and codes are the nearest.
    """

    def __call__(
        self, W: Floats, scale: Floats, hessian: Hessian | None, *, low: int, high: int, float_codes: Dtype = None
    ) -> Floats:
        """(rows, columns) integers in [low, high], no worse than nearest ones on what the rounding minimises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """Scales of integer blocks that move with the codes, by functions of (W, codes, scales, hessian, low, high).

    Attributes:
        start: chooses the codes to start from.
        refine: betters codes and (rows, blocks) scales together.
        settle: betters codes, for scales that stay as they are stored.
    """

    start: RoundRows
    refine: Callable[[Floats, Floats, Floats, Hessian, int, int], tuple[Floats, Floats]]
    settle: Callable[[Floats, Floats, Floats, Hessian, int, int], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """One way to round weights.

    Attributes:
        block_scales: chooses the scales of blocks.
        round_rows: chooses the codes once every weight has its scale; None takes the nearest ones.
        refinement: where the scales of blocks move with the codes.
        needs_moments: it looks at the second moments of the inputs.
        for_blocks: what it adds to nearest codes are the scales of blocks: without blocks it is the rounding nearest.
        reconstructs: its codes are learned further, block by block (`qdq.assemble.reconstruct`).
        settings: the settings that it reads, which mean nothing to roundings that do not name them.
    """

    block_scales: BlockScales
    round_rows: RoundRows | None = None
    refinement: Refinement | None = None
    needs_moments: bool = False
    for_blocks: bool = False
    reconstructs: bool = False
    settings: tuple[str, ...] = ()


ROUNDINGS: Members[Rounding] = Members(__name__, "ROUNDING")
