"""Calibrators: how much of the range that was seen is kept. One file each; the file name is the option's value.

Each file defines `CALIBRATOR`. It must not know graphs, files or runtimes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qdq.core.formats import Format
from qdq.core.members import Members
from qdq.measure.histogram import Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrator:
    """One way to choose a range.

    Attributes:
        limit: (histogram, format, percentile) -> the largest magnitude to keep, at most the largest one seen. The
            histogram holds a value other than 0. The same histogram gives the same limit.
        order: in which `auto` tries them: of those that do equally well it takes the first.
        least_error: the limit is that of least squared error, so the ends of a shifted range, and the symmetric range
            of values that are never negative, are to be searched for by the squared error too.
        spare: the share of the tensor's energy that the squared error may reach for the sake of a range wider than was
            seen, beyond `limit`; 0 for none.
        settings: the settings that it reads, which mean nothing to calibrators that do not name them.
    """

    limit: Callable[[Histogram, Format, float], float]
    order: int = 9
    least_error: bool = False
    spare: float = 0.0
    settings: tuple[str, ...] = ()


CALIBRATORS: Members[Calibrator] = Members(__name__, "CALIBRATOR")
