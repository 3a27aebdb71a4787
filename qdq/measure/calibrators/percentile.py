"""The range that holds a share of the values."""

from __future__ import annotations

import numpy as np

from qdq.core.formats import Format
from qdq.measure.calibrators import Calibrator
from qdq.measure.histogram import BINS, Histogram


def limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The magnitude below which `percentile` percent of the values lie, as the upper edge of its bin."""
    folded = hist.counts[BINS:] + hist.counts[:BINS][::-1]
    reach = np.searchsorted(np.cumsum(folded), percentile / 100 * folded.sum())
    return min(float(np.ldexp(1.0, hist.exponent or 0) * (int(reach) + 1)), hist.amax)


CALIBRATOR = Calibrator(limit=limit, order=1, settings=("percentile",))
