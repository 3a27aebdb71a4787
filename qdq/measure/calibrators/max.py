"""The whole range: the largest magnitude seen."""

from __future__ import annotations

from qdq.core.formats import Format
from qdq.measure.calibrators import Calibrator
from qdq.measure.histogram import Histogram


def limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The largest magnitude seen."""
    return hist.amax


CALIBRATOR = Calibrator(limit=limit, order=3)
