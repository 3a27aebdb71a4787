"""A histogram of magnitudes on either side of zero: exact under merging, so independent of order."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats

BINS = 4096  # bins on either side of zero: between 2048 and 4096 of them cover the largest magnitude
HISTOGRAM_BYTES = 2 * BINS * 8
CHUNK = 1 << 16  # values binned at a time: 0.75 MB of buffers

Counts = npt.NDArray[np.int64]


def exponent_of(amax: float) -> int:
    """The smallest e with amax < BINS * 2^e."""
    return int(np.frexp(amax / BINS)[1])


def _count(flat: npt.NDArray[np.floating], exponent: int) -> Counts:
    """(2 * BINS,) int64: how many of the values lie in each bin of width 2^exponent.

    Dividing by a power of two is exact, so each value lands in the same bin in every batch. float64 where the factor or
    a product would leave float32's normal range. Chunk by chunk through buffers that stay in the cache: 2.5 times as
    fast as at once, and without temporaries of the tensor's size.
    """
    single = flat.dtype == np.float32 and -100 < exponent <= 0
    factor = np.ldexp(np.float32(1) if single else np.float64(1), -exponent)
    scaled = np.empty(min(flat.size, CHUNK), dtype=np.float32 if single else np.float64)
    bins = np.empty(scaled.size, dtype=np.int64)
    counts = np.zeros(2 * BINS, dtype=np.int64)
    for start in range(0, flat.size, CHUNK):
        chunk = flat[start : start + CHUNK]
        np.multiply(chunk, factor, out=scaled[: chunk.size])
        np.floor(scaled, out=scaled)
        np.copyto(bins, scaled, casting="unsafe")
        bins += BINS
        counts += np.bincount(bins[: chunk.size], minlength=2 * BINS)
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of values in bins [i, i + 1) * 2^exponent for -BINS <= i < BINS.

    Invariants: `exponent` is the smallest that holds every value seen (None when all were zero), so equal multisets of
    values have equal histograms; counts are exact; `low <= 0 <= high`.

    Attributes:
        exponent: log2 of the bin width.
        counts: (2 * BINS,) int64.
        low: the smallest value seen, at most 0.
        high: the largest value seen, at least 0.
        samples: how many samples the values come from.
        peaks: the sum over the samples of the largest magnitude of each, exact.
    """

    exponent: int | None
    counts: Counts
    low: float
    high: float
    samples: int
    peaks: Fraction

    @classmethod
    def of(cls, values: npt.NDArray[np.floating], samples: int = 1) -> Histogram:
        """Count the values of one array.

        It holds `samples` of them, equally long one after the other in C order; an empty array is no sample.

        Raises:
            ValueError: NaN or infinity.

        >>> h = Histogram.of(np.float32([0.0, 1.0, -2.0]))
        >>> int(h.counts.sum()), h.low, h.high
        (3, -2.0, 1.0)
        """
        flat = np.ascontiguousarray(values).reshape(-1)
        if flat.dtype != np.float64:
            flat = flat.astype(np.float32, copy=False)
        if flat.size == 0:
            none = np.zeros(2 * BINS, dtype=np.int64)
            return cls(exponent=None, counts=none, low=0.0, high=0.0, samples=0, peaks=Fraction())
        rows = flat.reshape(samples, -1)
        lows, highs = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
        low, high = min(float(lows.min()), 0.0) + 0.0, max(float(highs.max()), 0.0) + 0.0  # -0.0 becomes 0.0
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("not finite")
        amax = max(-low, high)
        peaks = sum((Fraction(peak) for peak in np.maximum(-lows, highs).tolist()), Fraction())
        exponent = exponent_of(amax) if amax else None
        counts = _count(flat, exponent or 0)  # zeros lie in bin 0 of any width
        return cls(exponent=exponent, counts=counts, low=low, high=high, samples=samples, peaks=peaks)

    @classmethod
    def nothing(cls) -> Histogram:
        """Of no value: of a tensor in a body that no run reached."""
        counts = np.zeros(2 * BINS, dtype=np.int64)
        return cls(exponent=None, counts=counts, low=0.0, high=0.0, samples=0, peaks=Fraction())

    def coarsened(self, exponent: int | None) -> Counts:
        """The same counts on the grid of a larger exponent: pairs of bins merge, nothing is lost but resolution."""
        if self.exponent is None or exponent is None or exponent == self.exponent:
            return self.counts
        steps = exponent - self.exponent
        target = np.arange(-BINS, BINS, dtype=np.int64) >> min(steps, 62)
        merged = np.zeros_like(self.counts)
        np.add.at(merged, target + BINS, self.counts)
        return merged

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values; exact, commutative and associative."""
        known = [h.exponent for h in (self, other) if h.exponent is not None]
        exponent = max(known) if known else None
        return Histogram(
            exponent=exponent,
            counts=self.coarsened(exponent) + other.coarsened(exponent),
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            samples=self.samples + other.samples,
            peaks=self.peaks + other.peaks,
        )

    @property
    def centres(self) -> Floats:
        """(2 * BINS,) float64: the value that stands for each bin; the bin of zero stands for zero when low is 0."""
        width = np.ldexp(1.0, self.exponent or 0)
        centres = (np.arange(-BINS, BINS) + 0.5) * width
        return np.asarray(np.clip(centres, self.low, self.high), dtype=np.float64)

    @property
    def amax(self) -> float:
        """The largest magnitude seen."""
        return max(-self.low, self.high)
