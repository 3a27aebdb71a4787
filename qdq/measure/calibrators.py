"""Statistics that merge exactly, and the calibrators that choose a range from them.

values -> a Statistic (`Histogram.of`, `ChannelRange.of`, `Moment.of`) -> merge -> choose(method) -> QParams.
Counts are integers on a power-of-two grid that depends only on the largest magnitude, and sums are rational numbers or
integers, so the result is bit-identical for every order, batching and split of the same values. An exponential moving
average of ranges (TensorFlow's and PyTorch's observer) cannot be had so: it weighs samples by when they come. The
calibrator `average` is its order-free form. This module must not know graphs, files or runtimes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qdq.core.formats import FORMATS, Format
from qdq.core.qtensor import QParams, representable
from qdq.measure.histogram import BINS, Histogram

KL_START = 128  # first candidate bin of the entropy search (NVIDIA's calibrator starts there too)
SHIFT_GAIN = 0.8  # shift a tensor only if that leaves at most this share of the squared error (1 dB)


def squared_error(hist: Histogram, scale: float, zero_point: int, fmt: Format) -> float:
    """Sum over the values of (value - dequantized value)^2, each value taken at its bin's centre."""
    used = np.flatnonzero(hist.counts)
    x = hist.centres[used]
    codes = np.clip(np.rint(x / scale) + zero_point, fmt.low, fmt.high)
    return float(np.sum((x - (codes - zero_point) * scale) ** 2 * hist.counts[used]))


def asymmetric(low: float, high: float, fmt: Format) -> tuple[float, int]:
    """Scale and zero point that map [low, high] (which holds 0) onto all codes."""
    scale = max((high - low) / (fmt.high - fmt.low), float(np.finfo(np.float32).tiny))
    return scale, int(np.clip(np.rint(fmt.low - low / scale), fmt.low, fmt.high))


def max_limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The largest magnitude seen."""
    return hist.amax


def average_limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The mean over the samples of the largest magnitude in each: what a moving average tends to, in any order."""
    return float(hist.peaks / hist.samples)


def percentile_limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The magnitude below which `percentile` percent of the values lie, as the upper edge of its bin."""
    folded = hist.counts[BINS:] + hist.counts[:BINS][::-1]
    reach = np.searchsorted(np.cumsum(folded), percentile / 100 * folded.sum())
    return min(float(np.ldexp(1.0, hist.exponent or 0) * (int(reach) + 1)), hist.amax)


def mse_limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The magnitude that minimises the squared error: grid of 1/64, then refined around the best by 1/512."""
    if hist.low < 0 or not hist.high:

        def error(ratio: float) -> float:
            return squared_error(hist, ratio * hist.amax / fmt.high, 0, fmt)
    else:

        def error(ratio: float) -> float:
            return squared_error(hist, *asymmetric(0.0, ratio * hist.amax, fmt), fmt)

    coarse = min(np.arange(8, 65) / 64, key=error)
    fine = coarse + np.arange(-7, 8) / 512
    return float(min(fine[(fine > 0.1) & (fine <= 1)], key=error)) * hist.amax


def entropy_limit(hist: Histogram, fmt: Format, percentile: float) -> float:
    """The magnitude that minimises KL(P || Q), NVIDIA's calibration search, over every bin edge from KL_START on.

    P is the histogram of |x| cut at the candidate with the tail's mass in its last bin; Q is the cut histogram merged
    into 2^(bits-1) levels (2^bits when no value is negative) and spread evenly over each level's non-empty bins. The
    last of equal minima wins.

    Source: Migacz, 8-bit Inference with TensorRT, GTC 2017, slides 38-40.
    """
    folded = (hist.counts[BINS:] + hist.counts[:BINS][::-1]).astype(np.float64)
    folded[0] = folded[1]  # exact zeros and near-zeros would dominate P without telling anything about the range
    top = int(np.ceil(hist.amax / np.ldexp(1.0, hist.exponent or 0)))
    levels = 2 ** (fmt.bits if hist.low == 0 else fmt.bits - 1)
    start = max(KL_START, levels)
    if top <= start or folded[:top].sum() == 0:
        return hist.amax
    best, limit = np.inf, top
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
            best, limit = divergence, edge
    return min(limit * float(np.ldexp(1.0, hist.exponent or 0)), hist.amax)


LIMITS: dict[str, Callable[[Histogram, Format, float], float]] = {
    "max": max_limit,
    "average": average_limit,
    "percentile": percentile_limit,
    "mse": mse_limit,
    "entropy": entropy_limit,
}


def _per_tensor(scale: float, zero_point: int, fmt_name: str) -> QParams:
    return QParams(scale=np.asarray(scale, dtype=np.float32), zero_point=zero_point, format=fmt_name)


def choose(hist: Histogram, *, method: str, percentile: float, shift: bool, fmt_name: str, dtype: str) -> QParams:
    """Choose scale and zero point of one activation tensor.

    The calibrator gives the largest magnitude T to keep. Symmetric: scale = T / high. With `shift` the range
    [max(low, -T), min(high, T)] is tried as well, its ends refined for `mse`, and taken if it leaves at most SHIFT_GAIN
    of the squared error.

    Args:
        hist: the tensor's values.
        method: a key of LIMITS.
        percentile: for `percentile`.
        shift: whether a zero point other than 0 can be realised for this tensor.
        fmt_name: the bit format.
        dtype: the tensor's float type, in which the scale is stored.

    Returns:
        Parameters per tensor. A tensor that was always zero gets scale 1.
    """
    fmt = FORMATS[fmt_name]
    if hist.amax == 0:
        return _per_tensor(1.0, 0, fmt_name)
    limit = LIMITS[method](hist, fmt, percentile)
    symmetric = float(representable(limit / fmt.high, dtype))
    if method == "mse" and hist.low == 0:  # the search above was for the shifted grid
        ratios = np.arange(16, 129) / 128
        symmetric = float(
            representable(
                min((r * hist.amax / fmt.high for r in ratios), key=lambda s: squared_error(hist, s, 0, fmt)), dtype
            )
        )
    if shift:
        low, high = max(hist.low, -limit), min(hist.high, limit)
        if method == "mse":
            low, high = _refine(hist, low, high, fmt)
        scale, zero_point = asymmetric(low, high, fmt)
        scale = float(representable(scale, dtype))
        if squared_error(hist, scale, zero_point, fmt) <= SHIFT_GAIN * squared_error(hist, symmetric, 0, fmt):
            return _per_tensor(scale, zero_point, fmt_name)
    return _per_tensor(symmetric, 0, fmt_name)


def _refine(hist: Histogram, low: float, high: float, fmt: Format) -> tuple[float, float]:
    """Move either end of the range while that lowers the squared error; steps of 1/16, then 1/64 of the width."""

    def error(ends: tuple[float, float]) -> float:
        return squared_error(hist, *asymmetric(*ends, fmt), fmt)

    best, least = (low, high), error((low, high))
    for step in (1 / 16, 1 / 64):
        improved = True
        while improved:
            improved = False
            width = best[1] - best[0]
            for dl, dh in ((step, 0), (-step, 0), (0, step), (0, -step)):
                ends = (min(max(best[0] + dl * width, hist.low), 0.0), max(min(best[1] + dh * width, hist.high), 0.0))
                if ends[1] > ends[0] and (found := error(ends)) < least:
                    best, least, improved = ends, found, True
    return best
