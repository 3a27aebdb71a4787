"""Weight roundings: one file each; the file name is the option's value, and `ROUNDING` what the file defines.

Letters as in the papers: W (rows, columns), one row per output channel; H (columns, columns), second moment of inputs.
A view is (outer, blocks, block, inner) as of `qtensor.blocked`: a matrix is looked at in the order it is stored.
It must not know plans, nor read samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qdq.core.members import Members

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
View = npt.NDArray[np.floating]
Kind = np.dtype[np.generic] | None  # the type whose values codes have; None for integers


class BlockScales(Protocol):
    """Chooses (outer, blocks, 1, inner) scales, zero where a block holds zeros only; H may be None."""

    def __call__(self, view: View, H: Floats | None, *, low: int, high: int, kind: Kind = None) -> Singles:
        """The scales of the blocks of a view."""


class RoundRows(Protocol):
    """Chooses codes for scales of (rows, 1) or (rows, columns); nearest ones where H is None or zero."""

    def __call__(
        self,
        W: Floats,
        scale: Floats,
        H: Floats | None,
        *,
        low: int,
        high: int,
        kind: Kind = None,
        damping: float = ...,
        act_order: bool = ...,
    ) -> Floats:
        """(rows, columns) codes in [low, high], no worse than nearest ones on what the rounding minimises."""


class Refine(Protocol):
    """Moves the (rows, blocks) scales of blocks together with the codes."""

    def __call__(
        self, W: Floats, codes: Floats, scales: Floats, H: Floats, *, low: int, high: int, damping: float = ...
    ) -> tuple[Floats, Floats]:
        """Better codes and scales."""


class Settle(Protocol):
    """Betters codes whose scales stay."""

    def __call__(
        self, W: Floats, codes: Floats, scale: Floats, H: Floats, *, low: int, high: int, damping: float = ...
    ) -> Floats:
        """Better codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """Scales of integer blocks that move with the codes: `start`, `refine`, then `settle` for the scales as stored."""

    start: RoundRows
    refine: Refine
    settle: Settle


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """One way to round weights.

    Attributes:
        block_scales: chooses the scales of blocks.
        round_rows: chooses the codes once every weight has its scale; None takes the nearest ones.
        refinement: where the scales of blocks move with the codes.
        needs_moments: it looks at the second moments of the inputs.
        for_blocks: what it adds to nearest codes are the scales of blocks: without blocks it is the rounding nearest.
        settings: the settings that it reads, which mean nothing to roundings that do not name them.
    """

    block_scales: BlockScales
    round_rows: RoundRows | None = None
    refinement: Refinement | None = None
    needs_moments: bool = False
    for_blocks: bool = False
    settings: tuple[str, ...] = ()


ROUNDINGS: Members[Rounding] = Members(__name__, "ROUNDING")
