"""NVIDIA's calibration: the range whose quantized histogram diverges least from the one that was seen."""

from __future__ import annotations

import numpy as np

from qdq.core.formats import Format
from qdq.measure.calibrators import Calibrator
from qdq.measure.histogram import BINS, Histogram

START = 128  # first candidate bin of the search (NVIDIA's calibrator starts there too)


def limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The magnitude that minimises KL(P || Q), NVIDIA's calibration search, over every bin edge from START on.

    P is the histogram of |x| cut at the candidate with the tail's mass in its last bin; Q is the cut histogram merged
    into 2^(bits-1) levels (2^bits when no value is negative) and spread evenly over each level's non-empty bins. The
    last of equal minima wins.

    Source: Migacz, 8-bit Inference with TensorRT, GTC 2017, slides 38-40.
    """
    folded = (hist.counts[BINS:] + hist.counts[:BINS][::-1]).astype(np.float64)
    folded[0] = folded[1]  # exact zeros and near-zeros would dominate P without telling anything about the range
    top = int(np.ceil(hist.amax / np.ldexp(1.0, hist.exponent or 0)))
    levels = 2 ** (fmt.bits if hist.low == 0 else fmt.bits - 1)
    start = max(START, levels)
    if top <= start or folded[:top].sum() == 0:
        return hist.amax
    best, kept = np.inf, top
    filled = folded > 0
    total = folded.sum()
    for edge in range(start, top + 1):
        reference = folded[:edge].copy()
        cut = reference.copy()
        reference[-1] += total - cut.sum()
        level = np.minimum(np.arange(edge) * levels // edge, levels - 1)
        mass = np.bincount(level, weights=cut, minlength=levels)
        members = np.bincount(level, weights=filled[:edge].astype(np.float64), minlength=levels)
        spread = np.where(filled[:edge], (mass / np.maximum(members, 1))[level], 0.0)
        if spread.sum() == 0:
            continue
        p, q = reference / total, spread / spread.sum()
        where = p > 0
        # An empty bin of Q under a filled bin of P has infinite divergence; smoothed as in the reference code.
        divergence = float(np.sum(p[where] * np.log(p[where] / np.maximum(q[where], 1e-12))))
        if divergence <= best:
            best, kept = divergence, edge
    return min(kept * float(np.ldexp(1.0, hist.exponent or 0)), hist.amax)


CALIBRATOR = Calibrator(limit=limit, order=2)
