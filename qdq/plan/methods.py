"""The methods that settings name, and what settings must know of them: which settings each of them reads.

A method is a file in the folder of the stage that uses it, found by its name: nothing here knows one of them, and their
stages, which come later, are not imported.
"""

from __future__ import annotations

from typing import Protocol

from qdq.core.members import Members


class Calibrator(Protocol):
    """Of `qdq.measure.calibrators.Calibrator`."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that it reads, which mean nothing to others."""


class Rounding(Protocol):
    """Of `qdq.solve.rounding.Rounding`."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that it reads, which mean nothing to others."""

    @property
    def needs_moments(self) -> bool:
        """Whether it looks at the second moments of the inputs."""

    @property
    def for_blocks(self) -> bool:
        """Whether it is the rounding nearest where there are no blocks."""


class Formula(Protocol):
    """Of `qdq.solve.equalize.formulas.Formula`."""

    @property
    def for_data(self) -> bool:
        """Whether it is meant for data that are quantized, not for weight-only blocks alone."""

    @property
    def by_weights(self) -> object:
        """How it balances weight-only blocks without second moments; None where it does not."""


CALIBRATORS: Members[Calibrator] = Members("qdq.measure.calibrators", "CALIBRATOR")
ROUNDINGS: Members[Rounding] = Members("qdq.solve.rounding", "ROUNDING")
FORMULAS: Members[Formula] = Members("qdq.solve.equalize.formulas", "FORMULA")
