"""The calibration table: a histogram per quantized tensor, the largest magnitude of every tensor, and which samples.

calibrate, shards -> CalibrationTable -> merged -> table.json -> solve.
It is a file that merges exactly, of counts, magnitudes and hashes: no sample data. This module must not run a model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from engines.core.documents import Document, Part
from qdq.core.errors import InputError, StaleFileError
from qdq.core.files import read_document, write_text
from qdq.measure.histogram import BINS, Histogram, exponent_of
from qdq.model.model import Model
from qdq.plan.plan import Plan

Count = Annotated[int, msgspec.Meta(ge=0)]
DIGITS = 1200  # a sum of float64 magnitudes has at most 650 before the fraction bar, and 324 behind it
Amax = Annotated[float, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class TensorCounts(Part, frozen=True, kw_only=True):
    """One tensor in the file: its range, and the counts of its histogram from the first bin that is not empty.

    Attributes:
        tensor: its name in the prepared model.
        low: smallest value, or 0.
        high: largest value, or 0.
        exponent: of the width of a bin, a power of two; None where all values are 0.
        samples: that the tensor was seen in; 0 of one in a body that no run reached.
        peaks: sum of the largest magnitude of each sample, an exact fraction.
        first_bin: of `counts`, counted from zero, negative below it.
        counts: values in each bin.
    """

    tensor: str
    low: float
    high: float
    exponent: int | None
    samples: Count
    peaks: Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(/0*[1-9][0-9]*)?$", max_length=DIGITS)]
    first_bin: int
    counts: tuple[Count, ...]


class TableFile(Document, frozen=True, kw_only=True):
    """table.json; the attributes are those of `CalibrationTable`."""

    FORMAT: ClassVar[str] = "qdq.table/3"
    MAKE: ClassVar[str] = "qdq calibrate MODEL --data DATA -o table.json"

    model_sha256: str
    samples_sha256: str
    count: Count
    samples: tuple[Sha256, ...] = ()
    ranges: dict[str, Amax]
    not_finite: tuple[str, ...] = ()
    tensors: tuple[TensorCounts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTable:
    """The histograms of a plan's activation points, and the magnitude of every float tensor, over some samples.

    Invariants: depends on the multiset of samples alone, not on their order, batching or split; so does its file.

    Attributes:
        model_sha256: of the user's model.
        samples_sha256: of all samples, see `samples_digest`; "" where unknown.
        count: how many samples.
        tensors: tensor name -> histogram.
        samples: the SHA-256 of each sample, sorted; () where unknown.
        ranges: tensor name -> the largest magnitude of its finite values, of every float tensor that the float model
            reads or computes, in bodies too; empty where only histograms were made.
        not_finite: tensors that held an infinity or NaN.
    """

    model_sha256: str
    samples_sha256: str
    count: int
    tensors: Mapping[str, Histogram]
    ranges: Mapping[str, float] = field(default_factory=dict)
    not_finite: frozenset[str] = frozenset()
    samples: tuple[str, ...] = ()

    @classmethod
    def empty(cls, model: Model) -> CalibrationTable:
        """The table of no sample."""
        return cls(model_sha256=model.sha256, samples_sha256="", count=0, tensors={})

    @property
    def repeated(self) -> int:
        """How many samples are in the table more than once."""
        return len(self.samples) - len(set(self.samples))

    def to_json(self) -> str:
        """The table as JSON, one tensor a line; the same table gives the same text."""
        head = {
            "schema": TableFile.FORMAT,
            "model_sha256": self.model_sha256,
            "samples_sha256": self.samples_sha256,
            "count": self.count,
            "samples": list(self.samples),
            "not_finite": sorted(self.not_finite),
        }
        ranges = [f"{json.dumps(name, ensure_ascii=False)}: {self.ranges[name]!r}" for name in sorted(self.ranges)]
        lines = [json.dumps(_entry(name, self.tensors[name]), ensure_ascii=False) for name in sorted(self.tensors)]
        head_text, joined = json.dumps(head, indent=1)[:-2], ",\n".join
        return f'{head_text},\n "ranges": {{\n{joined(ranges)}\n}},\n "tensors": [\n{joined(lines)}\n]}}\n'

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write table.json; it appears whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """Read a table.

        Raises:
            InputError: missing, not JSON, another format version, or an entry that makes no sense.
        """
        return cls.from_file(read_document(path, TableFile, "table"), str(path))

    @classmethod
    def from_file(cls, file: TableFile, where: str) -> CalibrationTable:
        """The table that a file holds; `where` is its name, for messages.

        Raises:
            InputError: figures of an entry that contradict each other.
        """
        try:
            tensors = {entry.tensor: _histogram(entry, file.count) for entry in file.tensors}
            if odd := [name for name, amax in file.ranges.items() if amax == np.inf]:
                raise ValueError(f"the largest magnitude of {odd[0]!r} is infinite")
            _check_whole(file, tensors)
        except (ValueError, ArithmeticError) as error:
            raise InputError(f"Cannot use the table {where}: {error}. Make it again with `qdq calibrate`.") from None
        return cls(
            model_sha256=file.model_sha256,
            samples_sha256=file.samples_sha256,
            count=file.count,
            tensors=tensors,
            samples=file.samples,
            ranges=file.ranges,
            not_finite=frozenset(file.not_finite),
        )

    def check(self, model: Model, plan: Plan) -> None:
        """Refuse a table that does not fit.

        Raises:
            StaleFileError: it was made from another model, or lacks a tensor that the plan quantizes.
        """
        if self.model_sha256 != model.sha256:
            raise StaleFileError(
                f"The calibration table was made from another model: it says sha256 {self.model_sha256[:12]}…, this "
                f"model has {model.sha256[:12]}…. Make a table for this model with `qdq calibrate`."
            )
        missing = [p.tensor for p in plan.activations if p.tensor not in self.tensors]
        if missing:
            raise StaleFileError(
                f"The calibration table lacks {len(missing)} tensors that the plan quantizes, {missing[0]!r} for one: "
                "it was made with another plan. Make it again with `qdq calibrate --plan`."
            )


def samples_digest(samples: Iterable[str]) -> str:
    """SHA-256 over the sorted SHA-256 of each sample, as `calib_data.Samples.sha256` has it; "" for none."""
    digests = [bytes.fromhex(sample) for sample in sorted(samples)]
    return hashlib.sha256(b"".join(digests)).hexdigest() if digests else ""


def merged(tables: Sequence[CalibrationTable], names: Sequence[str] = ()) -> CalibrationTable:
    """The table of all samples of some tables: the same as if they had been measured together.

    `names` are what to call each in messages.

    Raises:
        StaleFileError: two of them are of different models or measured different tensors.
    """
    first = tables[0]
    for index, table in enumerate(tables[1:], 1):
        which = f"{names[0]} and {names[index]}" if names else f"Tables 1 and {index + 1}"
        if table.model_sha256 != first.model_sha256:
            raise StaleFileError(
                f"{which} cannot be merged: they were made from different models (sha256 {first.model_sha256[:12]}… "
                f"and {table.model_sha256[:12]}…). Merge tables of one model only."
            )
        if odd := sorted(first.tensors.keys() ^ table.tensors.keys()):
            raise StaleFileError(
                f"{which} cannot be merged: {odd[0]!r} and {len(odd) - 1} more tensors are in one of them only, so "
                "they were made with different plans. Make both with the same plan."
            )
    known = all(len(t.samples) == t.count for t in tables)
    samples = tuple(sorted(s for t in tables for s in t.samples)) if known else ()
    tensors = dict(first.tensors)
    for table in tables[1:]:
        tensors = {name: h.merge(table.tensors[name]) for name, h in tensors.items()}
    return replace(
        first,
        samples_sha256=samples_digest(samples),
        count=sum(t.count for t in tables),
        tensors=tensors,
        samples=samples,
        ranges=widest(t.ranges for t in tables),
        not_finite=frozenset().union(*(t.not_finite for t in tables)),
    )


def widest(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest magnitude of each tensor; one may be missing where a branch was not taken."""
    found: dict[str, float] = {}
    for part in parts:
        for name, amax in part.items():
            found[name] = max(amax, found.get(name, 0.0))
    return found


def _entry(name: str, h: Histogram) -> dict[str, object]:
    used = np.flatnonzero(h.counts) if h.samples else [BINS]  # of a tensor that no run reached, one empty bin
    first, last = int(used[0]), int(used[-1])
    return {
        "tensor": name,
        "low": h.low,
        "high": h.high,
        "exponent": h.exponent,
        "samples": h.samples,
        "peaks": str(h.peaks),
        "first_bin": first - BINS,
        "counts": h.counts[first : last + 1].tolist(),
    }


def _check_whole(file: TableFile, tensors: Mapping[str, Histogram]) -> None:
    """A ValueError where figures of different entries of a table contradict each other."""
    if len(tensors) < len(file.tensors):
        raise ValueError("it has two entries of one tensor")
    for name, found in tensors.items():
        if (amax := file.ranges.get(name, found.amax)) != found.amax:
            raise ValueError(
                f"the largest magnitude of {name!r} is {amax:.6g} in one entry and {found.amax:.6g} in one"
            )
    if file.samples and (len(file.samples) != file.count or samples_digest(file.samples) != file.samples_sha256):
        raise ValueError(f"the hashes of its {file.count} samples are not those of which it holds the hash")


def _histogram(entry: TensorCounts, count: int) -> Histogram:
    """The histogram of an entry of a table of `count` samples; a ValueError where its figures contradict each other."""
    name, counts = repr(entry.tensor), np.zeros(2 * BINS, dtype=np.int64)
    first, size = entry.first_bin + BINS, len(entry.counts)
    if not 0 <= first < first + size <= 2 * BINS:
        raise ValueError(f"bins of {name} lie outside the histogram")
    total = sum(entry.counts)
    if not entry.samples <= total <= np.iinfo(np.int64).max:
        raise ValueError(f"counts of {name} are {total} values in all, of {entry.samples} samples")
    if entry.samples > count:
        raise ValueError(f"{name} is of {entry.samples} samples, and the table of {count}")
    counts[first : first + size] = entry.counts
    low, high = entry.low + 0.0, entry.high + 0.0
    if not -np.inf < low <= 0 <= high < np.inf:
        raise ValueError(f"the range of {name} is no range around zero")
    amax = max(-low, high)
    needed = exponent_of(amax) if amax else None
    if entry.exponent != needed:
        raise ValueError(f"the exponent of {name} is {entry.exponent}; that of its range is {needed}")
    if not total and (amax or entry.peaks != "0"):
        raise ValueError(f"{name} has a range and no values")
    used = np.flatnonzero(counts) - BINS if total else np.zeros(1, np.int64)
    lowest, highest = (int(np.floor(np.ldexp(bound, -(needed or 0)))) for bound in (low, high))
    # Zeros lie in bin 0, below which nothing is where low is 0, and above which nothing is where high is 0.
    if not ((used[0] == lowest if low else used[0] >= 0) and (used[-1] == highest if high else used[-1] <= 0)):
        raise ValueError(f"the range of {name} does not end in its first and last bins that hold values")
    peaks = Fraction(entry.peaks)
    if not Fraction(amax) <= peaks <= entry.samples * Fraction(amax):
        raise ValueError(f"peaks of {name} do not fit its range")
    return Histogram(exponent=needed, counts=counts, low=low, high=high, samples=entry.samples, peaks=peaks)
