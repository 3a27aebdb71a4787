"""The running sums of one output, from which its metrics are made. Must not keep samples: memory does not grow.

Over all elements of all samples, r the reference and c the candidate, in float64; a mean is taken off by summing
differences to the first sample, which loses no digits where values are large and vary little:

    sqnr_db          10 log10(sum r^2 / sum (r - c)^2)               infinite where both are equal
    sqnr_centred_db  10 log10(sum (r - mean r)^2 / sum (r - c)^2)    the mean of all elements is no signal
    sqnr_spread_db   20 log10(spread / rms error)                    only what differs from sample to sample is
    spread           root of the mean over positions of the variance (n - 1) across samples
    cosine           sum r c / sqrt(sum r^2 sum c^2)                 1 where both are zero, 0 where one is
    cosine_centred   the same of r - mean r and c - mean c: Pearson's correlation
    top1             fraction of positions with the same class; of labels, of elements that are equal
    dice_k           2 |r is k and c is k| / (|r is k| + |c is k|)   of the argmax, of labels, or of masks above 0.5
                     where every reference value lies in [0, 1], else above 0
"""

from __future__ import annotations

import math

import numpy as np

from engines.verify.meaning import MOST_CLASSES, Meaning
from engines.verify.report import OutputReport


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, -inf without signal or with infinite noise; NaN stays NaN.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    ratio = signal / noise  # NaN where both are infinite
    return 10 * math.log10(ratio) if not ratio <= 0 else -math.inf


class Sums:
    """Running sums of one output; `add` sample by sample, `report` at the end. Order changes only float64 rounding."""

    def __init__(self, meaning: Meaning) -> None:
        """Empty sums of an output with that meaning."""
        self.meaning = meaning
        self.samples = self.mismatched = self.elements = self.non_finite = self.equal = 0
        self.first_non_finite: tuple[int, bool, bool] | None = None  # sample, in the reference, in the candidate
        self._classes = _Classes(meaning)
        self._spread = _Spread()
        self.signal = self.noise = self._power = self._product = self._error = self._largest = self._cosines = (
            self._size
        ) = 0.0
        self._origin = math.nan  # what the centred sums are relative to: the mean of the first sample
        self._centred = np.zeros(5)  # of r, c, r^2, c^2 and r c, each less the origin

    def add(self, reference: np.ndarray, candidate: np.ndarray, items: int | None = None) -> None:
        """Adds one sample: two arrays of one type. Those of different shapes are counted, and nothing else.

        `items` is the length of the leading axis where that runs over samples of its own.
        """
        if reference.shape != candidate.shape:
            self.mismatched += 1
            return
        self.samples, self.elements = self.samples + 1, self.elements + reference.size
        if self.meaning.task == "labels":
            self.equal += int(np.count_nonzero(reference == candidate))
            self._classes.add(reference, candidate)
            return
        if reference.dtype.kind == "V":  # bfloat16 and the like, which NumPy cannot rank
            reference, candidate = reference.astype(np.float32), candidate.astype(np.float32)
        self._classes.add(reference, candidate)
        if reference.size:
            with np.errstate(invalid="ignore", over="ignore"):
                self._add(reference, candidate, items)
        else:
            self._cosines += 1.0

    def _add(self, reference: np.ndarray, candidate: np.ndarray, items: int | None) -> None:
        """The sums of a sample that is not empty, block by block: float64 copies of it all would take much memory."""
        if math.isnan(self._origin):
            first = float(reference.mean(dtype=np.float64))
            self._origin = first if math.isfinite(first) else 0.0
        rows, others = (a.reshape(items or 1, -1) for a in (reference, candidate))
        self._spread.begin(reference.shape if items is None else reference.shape[1:], rows)
        signal = power = product = 0.0
        step = max(1, BLOCK // len(rows))
        for start in range(0, rows.shape[1], step):
            part = slice(start, start + step)
            self._spread.add(rows[:, part].astype(np.float64), part)
            r, c = (a[:, part].astype(np.float64).ravel() for a in (rows, others))
            difference = np.abs(r - c)
            odd = ~np.isfinite(r), ~np.isfinite(c)
            if count := int(np.count_nonzero(odd[0] | odd[1])):
                self.non_finite += count
                index, *sides = self.first_non_finite or (self.samples + self.mismatched - 1, False, False)
                if index == self.samples + self.mismatched - 1:
                    self.first_non_finite = index, sides[0] or bool(odd[0].any()), sides[1] or bool(odd[1].any())
            self.equal += int(np.count_nonzero(difference == 0))
            self.noise += float((difference * difference).sum())
            self._error += float(difference.sum())
            self._size += float(np.abs(r).sum())
            self._largest = float(np.maximum(self._largest, difference.max()))  # NaN stays NaN
            signal, power, product = (
                signal + float((r * r).sum()),
                power + float((c * c).sum()),
                product + float((r * c).sum()),
            )
            x, y = r - self._origin, c - self._origin
            self._centred += [x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
        self.signal, self._power, self._product = self.signal + signal, self._power + power, self._product + product
        self._cosines += _cosine(product, signal, power) if math.isfinite(signal + power + product) else math.nan

    def report(self, name: str, *, not_compared: str = "") -> OutputReport:
        """The metrics of everything added; `not_compared` says why something was not."""
        meaning, labels = self.meaning, self.meaning.task == "labels"
        top1, dice = self._classes.agreement()
        numeric = self.elements > 0 and not labels
        varies = self._spread.value if numeric else None
        x, y, xx, yy, xy = map(float, self._centred)
        count = max(self.elements, 1)
        around = [max(v, 0.0) for v in (xx - x * x / count, yy - y * y / count)]
        if math.isnan(xx + yy):
            around = [math.nan, math.nan]
        flat = numeric and around[0] <= _LEAST * self.signal  # every element has one value
        rms = math.sqrt(self.noise / count) if self.noise >= 0 else math.nan
        compared = numeric and not (math.isnan(self.noise) or flat)
        return OutputReport(
            name=name,
            task=meaning.task,
            class_axis=meaning.axis,
            because=meaning.why,
            elements=self.elements,
            mismatched=self.mismatched,
            identical=self.elements > 0 and self.equal == self.elements,
            constant=bool(flat or varies == 0),
            sqnr_db=decibels(self.signal, self.noise) if numeric else None,
            sqnr_centred_db=decibels(around[0], self.noise) if compared else None,
            sqnr_spread_db=decibels(varies * varies, rms * rms) if varies and math.isfinite(varies) else None,
            spread=varies,
            cosine=_cosine(self._product, self.signal, self._power) if numeric else None,
            cosine_centred=_cosine(xy - x * y / count, *around) if compared else None,
            mean_sample_cosine=self._cosines / max(self.samples, 1) if numeric else None,
            rms_error=rms if numeric else None,
            max_abs_error=self._largest if numeric else None,
            mean_abs_error=self._error / count if numeric else None,
            mean_abs=self._size / count if numeric else None,
            top1=self.equal / count if labels and self.elements else top1,
            dice=dice,
            non_finite=self.non_finite,
            first_non_finite=self._first_non_finite,
            not_compared=not_compared,
        )

    @property
    def _first_non_finite(self) -> str:
        """Where the first values are that are not finite, in words."""
        if self.first_non_finite is None:
            return ""
        sample, in_reference, in_candidate = self.first_non_finite
        sides = [side for side, there in (("reference", in_reference), ("candidate", in_candidate)) if there]
        return f"sample {sample} of the {' and the '.join(sides)}"


BLOCK = 1 << 18  # elements at a time: their float64 copies stay in a processor's cache
_LEAST = 1e-28  # of the energy: what float64 leaves of a difference of equal numbers, squared


class _Spread:
    """The variance across samples at each position, of arrays of one shape; memory of two of them in float64."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] | None = None
        self._origin, self._sum = np.zeros(0), np.zeros(0)
        self._squares, self._count, self._fits = 0.0, 0, True

    def begin(self, shape: tuple[int, ...], rows: np.ndarray) -> None:
        """The next sample has these rows, each of that shape; another shape ends the sums."""
        if self._shape is None:
            self._shape, self._origin, self._sum = shape, rows[0].astype(np.float64), np.zeros(rows.shape[1])
        self._fits = self._fits and shape == self._shape
        if not self._fits:
            self._origin, self._sum = np.zeros(0), np.zeros(0)
        self._count += len(rows)

    def add(self, block: np.ndarray, part: slice) -> None:
        """Adds float64 values of some positions of each row; takes their place."""
        if self._fits:
            block -= self._origin[part]
            self._sum[part] += block.sum(0)
            self._squares += float((block * block).sum())

    @property
    def value(self) -> float | None:
        """The standard deviation; None for one sample, or where shapes differ."""
        if not self._fits or self._count < 2:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            left = self._squares - float((self._sum * self._sum).sum()) / self._count
        if left <= _LEAST * self._squares:
            return 0.0
        return math.sqrt(left / (self._count - 1) / self._sum.size)


class _Classes:
    """Agreement of classes, and overlap per class; counts only."""

    def __init__(self, meaning: Meaning) -> None:
        self._meaning = meaning
        self._positions = self._agreed = 0
        # threshold (None: argmax) -> (3, classes): of both, of the reference, of the candidate
        self._counts: dict[float | None, np.ndarray] = {}
        self._low, self._high, self._off_one = math.inf, -math.inf, 0.0

    def add(self, r: np.ndarray, c: np.ndarray) -> None:
        """Counts one sample."""
        meaning = self._meaning
        if meaning.task == "labels":
            self._labels(r, c)
            return
        axis = meaning.axis
        if axis is None or axis >= r.ndim or not r.size:
            return
        classes = r.shape[axis]
        segments = meaning.task == "segmentation"
        if segments and meaning.masks is not False:
            self._low, self._high = min(self._low, float(r.min())), max(self._high, float(r.max()))
            self._off_one = max(self._off_one, float(np.abs(r.sum(axis, dtype=np.float64) - 1).max()))
            others = tuple(i for i in range(r.ndim) if i != axis)
            for threshold in (0.0, 0.5):
                on_r, on_c = r > threshold, c > threshold
                self._count(threshold, np.stack([x.sum(others) for x in (on_r & on_c, on_r, on_c)]))
        if classes > 1 and not meaning.masks:
            top_r, top_c = r.argmax(axis), c.argmax(axis)
            same = top_r == top_c
            self._positions, self._agreed = self._positions + top_r.size, self._agreed + int(same.sum())
            if segments:
                rows = (top_r[same], top_r, top_c)
                self._count(None, np.stack([np.bincount(x.ravel(), minlength=classes) for x in rows]))

    def _labels(self, r: np.ndarray, c: np.ndarray) -> None:
        """The overlap of labels at positions, of integers that can be classes."""
        if (
            r.ndim < 3
            or r.dtype.kind not in "iubf"
            or not r.size
            or not (np.isfinite(r).all() and np.isfinite(c).all())
        ):
            return
        low, high = min(int(r.min()), int(c.min())), max(int(r.max()), int(c.max()))
        if low < 0 or high >= MOST_CLASSES:
            return
        rows = (r[r == c], r, c)
        counts = np.stack([np.bincount(x.ravel().astype(np.int64), minlength=MOST_CLASSES) for x in rows])
        self._count(None, counts)

    def _count(self, threshold: float | None, counts: np.ndarray) -> None:
        known = self._counts.get(threshold, np.zeros((3, 0)))
        most = max(known.shape[1], counts.shape[1])
        padded = [np.pad(a, ((0, 0), (0, most - a.shape[1]))) for a in (known, counts)]
        self._counts[threshold] = padded[0] + padded[1]

    def agreement(self) -> tuple[float | None, dict[int, float]]:
        """`top1`, None without classes that exclude each other; and the Dice of each class that is anywhere."""
        within = self._low >= 0 and self._high <= 1  # probabilities
        masks = self._meaning.masks
        if masks is None:
            masks = None not in self._counts or (within and self._off_one > 0.01)
        threshold = (0.5 if within else 0.0) if masks else None
        both, of_r, of_c = self._counts.get(threshold, np.zeros((3, 0)))
        first = 1 if len(both) == 1 else 0  # of one channel, "above" is class 1
        dice = {k + first: float(2 * both[k] / n) for k, n in enumerate(of_r + of_c) if n}
        one_of = self._positions and not (self._meaning.task == "segmentation" and masks)
        return self._agreed / self._positions if one_of else None, dice


def _cosine(product: float, a: float, b: float) -> float:
    """Cosine from the three sums; 1 where both vectors are zero, 0 where one is; NaN stays NaN."""
    if math.isnan(product + a + b):
        return math.nan
    return product / math.sqrt(a * b) if a > 0 and b > 0 else float(a == b)
