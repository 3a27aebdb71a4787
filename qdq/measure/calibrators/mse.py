"""The range of least squared error."""

from __future__ import annotations

import numpy as np

from qdq.core.formats import Format
from qdq.measure.calibrators import Calibrator
from qdq.measure.histogram import Histogram
from qdq.measure.ranges import asymmetric, squared_error


def limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The magnitude that minimises the squared error: grid of 1/64, then refined around the best by 1/512."""

    def error(ratio: float) -> float:
        if hist.low < 0 or not hist.high:
            return squared_error(hist, ratio * hist.amax / fmt.high, 0, fmt)
        return squared_error(hist, *asymmetric(0.0, ratio * hist.amax, fmt), fmt)

    coarse = min(np.arange(8, 65) / 64, key=error)
    fine = coarse + np.arange(-7, 8) / 512
    return float(min(fine[(fine > 0.1) & (fine <= 1)], key=error)) * hist.amax


CALIBRATOR = Calibrator(limit=limit, order=0, least_error=True)
