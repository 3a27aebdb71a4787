"""Measure the ranges of the tensors that a plan quantizes.

Model + Plan + samples -> one Histogram per activation point -> CalibrationTable -> table.json.
Samples come one at a time and none is kept; the table holds counts only, and is bit-identical for every order of the
same samples. This module must not choose scales.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qdq.errors import InputError, StaleFileError
from qdq.files import read_json, write_text
from qdq.graph import Model
from qdq.observers import BINS, Histogram
from qdq.plan import Plan
from qdq.tap import Sample, Tap, counted, length

FORMAT = "qdq.table/1"
Progress = Callable[[int, int | None, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTable:
    """The histograms of a plan's activation points over some samples.

    Attributes:
        model_sha256: of the user's model.
        samples_sha256: of the samples, "" where unknown.
        count: how many samples.
        tensors: tensor name -> histogram.
    """

    model_sha256: str
    samples_sha256: str
    count: int
    tensors: Mapping[str, Histogram]

    def to_json(self) -> str:
        """The table as JSON, one tensor a line; the same table gives the same text."""
        lines = []
        for name in sorted(self.tensors):
            h = self.tensors[name]
            used = np.flatnonzero(h.counts)
            first, last = int(used[0]), int(used[-1])
            entry = {
                "tensor": name,
                "low": h.low,
                "high": h.high,
                "exponent": h.exponent,
                "first_bin": first - BINS,
                "counts": h.counts[first : last + 1].tolist(),
            }
            lines.append(json.dumps(entry, ensure_ascii=False))
        head = {"format": FORMAT, "model_sha256": self.model_sha256, "samples_sha256": self.samples_sha256, "count": self.count}
        return json.dumps(head, indent=1)[:-2] + ',\n "tensors": [\n' + ",\n".join(lines) + "\n]}\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write table.json; it appears whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """Read a table.

        Raises:
            InputError: missing, not JSON, another format version, or an entry that makes no sense.
        """
        content = read_json(path, FORMAT, "table")
        try:
            tensors = {}
            for entry in content["tensors"]:  # type: ignore[attr-defined]
                counts = np.zeros(2 * BINS, dtype=np.int64)
                first = int(entry["first_bin"]) + BINS
                if not 0 <= first < first + len(entry["counts"]) <= 2 * BINS:
                    raise ValueError(f"bins of {entry['tensor']!r}")
                counts[first : first + len(entry["counts"])] = entry["counts"]
                tensors[str(entry["tensor"])] = Histogram(
                    exponent=entry["exponent"], counts=counts, low=float(entry["low"]), high=float(entry["high"])
                )
            return cls(
                model_sha256=str(content["model_sha256"]),
                samples_sha256=str(content["samples_sha256"]),
                count=int(content["count"]),  # type: ignore[call-overload]
                tensors=tensors,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"Cannot use the table {path}: {type(error).__name__} {error} in its entries. Make it again with `qdq calibrate`.") from None

    def check(self, model: Model, plan: Plan) -> None:
        """Refuse a table that does not fit.

        Raises:
            StaleFileError: it was made from another model, or lacks a tensor that the plan quantizes.
        """
        if self.model_sha256 != model.sha256:
            raise StaleFileError(
                f"The calibration table was made from another model: it says sha256 {self.model_sha256[:12]}…, this model has {model.sha256[:12]}…. Make a table for this model with `qdq calibrate`."
            )
        missing = [p.tensor for p in plan.activations if p.tensor not in self.tensors]
        if missing:
            raise StaleFileError(
                f"The calibration table lacks {len(missing)} tensors that the plan quantizes, {missing[0]!r} for one: it was made with another plan. Make it again with `qdq calibrate --plan`."
            )


def collect(
    model: Model,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    samples_sha256: str = "",
    provider: str = "cpu",
    custom_ops: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> CalibrationTable:
    """Run the float model on every sample and count the values of the plan's activation points.

    Args:
        model: the prepared model that the plan was made for.
        plan: names the tensors.
        samples: input name -> array; read once, one at a time; shapes may differ.
        samples_sha256: identifies the samples in the table.
        provider: ONNX Runtime provider, "cpu" or "cuda".
        custom_ops: ONNX Runtime custom operator libraries.
        on_progress: called with (samples done, samples in all or None, text).

    Returns:
        The table, independent of the samples' order.

    Raises:
        InputError: no samples, or a tensor that is empty, NaN or infinite inside the model.
    """
    plan.check(model)
    names = list(dict.fromkeys(p.tensor for p in plan.activations))
    tap = Tap(model, names, provider=provider, custom_ops=custom_ops)
    tensors: dict[str, Histogram] = {}
    total, count = length(samples), 0
    for index, sample in counted(samples):
        for name, values in tap(sample).items():
            try:
                seen = Histogram.of(values)
            except ValueError as error:
                raise InputError(
                    f"Sample {index} makes tensor {name!r} of the float model hold {error}: calibration needs finite values. Check the sample and how it was normalised, or exclude the nodes that read the tensor."
                ) from None
            tensors[name] = seen.merge(tensors[name]) if name in tensors else seen
        count = index + 1
        if on_progress is not None:
            on_progress(count, total, "calibrating")
    return CalibrationTable(model_sha256=model.sha256, samples_sha256=samples_sha256, count=count, tensors=tensors)
