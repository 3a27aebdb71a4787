"""The scale and zero point of an activation tensor: a calibrator's range, symmetric or shifted.

Histogram -> `calibrators` say which magnitude to keep -> `choose` -> QParams.
This module must not know graphs, files or runtimes, nor any calibrator.
"""

from __future__ import annotations

import numpy as np

from qdq.core.formats import FORMATS, Format
from qdq.core.qtensor import QParams, representable
from qdq.measure.calibrators import CALIBRATORS, Calibrator
from qdq.measure.histogram import Histogram

HEADROOMS = (1.0, 1.125, 1.25, 1.375, 1.5, 1.75, 2.0)  # ranges over what was seen, for calibrators with some to spare
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


def covering(low: float, high: float, *, fmt_name: str, dtype: str, shift: bool) -> QParams:
    """Scale and zero point with which codes reach from `low`, at most 0, to `high`; scale 1 where both are 0."""
    fmt = FORMATS[fmt_name]
    if not high > low:
        return _per_tensor(1.0, 0, fmt_name)
    scale, zero_point = asymmetric(low, high, fmt) if shift else (max(-low, high) / fmt.high, 0)
    return _per_tensor(float(representable(scale, dtype)), zero_point, fmt_name)


def _per_tensor(scale: float, zero_point: int, fmt_name: str) -> QParams:
    return QParams(scale=np.asarray(scale, dtype=np.float32), zero_point=zero_point, format=fmt_name)


def choose(hist: Histogram, *, method: str, percentile: float, shift: bool, fmt_name: str, dtype: str) -> QParams:
    """Choose scale and zero point of one activation tensor.

    The calibrator gives the largest magnitude T to keep. Symmetric: scale = T / high. With `shift` the range
    [max(low, -T), min(high, T)] is tried as well, its ends refined if the calibrator is one of least error, and taken
    if it leaves at most SHIFT_GAIN of the squared error. Where the calibrator has codes to spare, the widest range in
    HEADROOMS follows that leaves no more than its share of error.

    Args:
        hist: the tensor's values.
        method: a name in CALIBRATORS.
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
    calibrator = CALIBRATORS[method]
    chosen = _chosen(hist, calibrator, percentile, shift=shift, fmt=fmt, dtype=dtype)
    return _widened(hist, chosen, calibrator.spare, dtype) if calibrator.spare else chosen


def _widened(hist: Histogram, params: QParams, spare: float, dtype: str) -> QParams:
    """The widest range in HEADROOMS whose squared error is within a share of the values' energy, else `params`."""
    fmt = FORMATS[params.format]
    most = spare * float(np.sum(hist.centres**2 * hist.counts))
    for headroom in HEADROOMS:
        low, high = headroom * min(hist.low, 0.0), headroom * max(hist.high, 0.0)
        wide = covering(low, high, fmt_name=fmt.name, dtype=dtype, shift=params.zero_point != 0)
        if squared_error(hist, float(wide.scale), wide.zero_point, fmt) > most:
            break
        params = wide
    return params


def _chosen(
    hist: Histogram, calibrator: Calibrator, percentile: float, *, shift: bool, fmt: Format, dtype: str
) -> QParams:
    """Scale and zero point by the calibrator's limit."""
    limit = calibrator.limit(hist, fmt, percentile)
    symmetric = float(representable(limit / fmt.high, dtype))
    if calibrator.least_error and hist.low == 0:  # the search above was for the shifted grid
        ratios = np.arange(16, 129) / 128
        scales = (r * hist.amax / fmt.high for r in ratios)
        symmetric = float(representable(min(scales, key=lambda s: squared_error(hist, s, 0, fmt)), dtype))
    if shift:
        low, high = max(hist.low, -limit), min(hist.high, limit)
        if calibrator.least_error:
            low, high = _refine(hist, low, high, fmt)
        scale, zero_point = asymmetric(low, high, fmt)
        scale = float(representable(scale, dtype))
        if squared_error(hist, scale, zero_point, fmt) <= SHIFT_GAIN * squared_error(hist, symmetric, 0, fmt):
            return _per_tensor(scale, zero_point, fmt.name)
    return _per_tensor(symmetric, 0, fmt.name)


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
