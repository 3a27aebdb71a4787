"""The mean of the samples' ranges, the order-free form of TensorFlow's and PyTorch's moving average of ranges."""

from __future__ import annotations

from qdq.core.formats import Format
from qdq.measure.calibrators import Calibrator
from qdq.measure.histogram import Histogram


def limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The mean over the samples of the largest magnitude in each: what a moving average tends to, in any order."""
    return float(hist.peaks / hist.samples)


CALIBRATOR = Calibrator(limit=limit, order=4)
