"""The methods that settings name, and what settings must know of them: which settings each of them reads.

A method is a file in the folder of the stage that uses it, found by its name: nothing here knows one of them, and their
stages, which come later, are not imported.
"""

from __future__ import annotations

from typing import Protocol

from qdq.core.members import Members


class Calibrator(Protocol):
    """Of `qdq.measure.calibrators.Calibrator`: the settings that it reads, which mean nothing to others."""

    settings: tuple[str, ...]


class Rounding(Protocol):
    """Of `qdq.solve.rounding.Rounding`: its settings, what it looks at, whether it needs blocks to differ, and whether
    its codes are learned further."""

    settings: tuple[str, ...]
    needs_moments: bool
    for_blocks: bool
    reconstructs: bool


class Formula(Protocol):
    """Of `qdq.solve.equalize.formulas.Formula`: whether it is for quantized data, and how it balances weights."""

    for_data: bool
    by_weights: object


CALIBRATORS: Members[Calibrator] = Members("qdq.measure.calibrators", "CALIBRATOR")
ROUNDINGS: Members[Rounding] = Members("qdq.solve.rounding", "ROUNDING")
FORMULAS: Members[Formula] = Members("qdq.solve.equalize.formulas", "FORMULA")
