"""Reference against candidate on samples: what quantization, or an engine, costs in accuracy.

Two Polygraphy runners -> Comparator streams one sample at a time -> exact sums per output -> `Report` with limits.
Must not keep outputs: memory does not grow with the number of samples. Reports hold numbers, never sample data.

Metrics per output, over all elements of all samples, r the reference and c the candidate, in float64:

    sqnr_db = 10 log10(sum r^2 / sum (r - c)^2)      inf where both are equal
    cosine  = sum r c / sqrt(sum r^2 sum c^2)        1 where both are zero, 0 where one is
    top1    = fraction of positions where the argmax along the class axis is the same (of elements, for integer outputs)
    dice_k  = 2 |r is k and c is k| / (|r is k| + |c is k|)   of the argmax, float outputs of rank >= 4 with classes;
              with one channel, of "above the threshold": 0.5 where every reference value lies in [0, 1], else 0;
              so too for each channel (at 0.5, without top1) where values lie in [0, 1] and do not sum to 1
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx

from engines.core import onnx_runtime as ort
from engines.core.documents import Document, Measured, Part
from engines.core.errors import EngineError, import_runtime
from engines.core.files import write_atomic

STOOD_FOR_ENGINE = "the Q/DQ model in ONNX Runtime stood for the engine: no GPU here"
MAX_DICE_CLASSES = 256  # more channels than this are features, not classes


class Limits(Part, frozen=True, kw_only=True):
    """The least that passes, for every output that has the metric; None: not checked."""

    min_sqnr_db: float | None = None
    min_cosine: float | None = None
    min_dice: float | None = None
    min_top1: float | None = None


class OutputReport(Part, frozen=True, kw_only=True):
    """The metrics of one output. `top1` is None and `dice` empty where the output has no classes."""

    name: str
    sqnr_db: Measured
    cosine: Measured
    mean_sample_cosine: Measured
    max_abs_error: Measured
    mean_abs_error: Measured
    top1: Measured | None
    dice: dict[int, float]
    non_finite: int


class Report(Document, frozen=True, kw_only=True):
    """The metrics of every output, and whether they stay within the limits.

    `sqnr_db` sums signal and noise over all outputs. `note` says what stood for the engine.
    """

    FORMAT: ClassVar[str] = "qdq.check/2"
    MAKE: ClassVar[str] = "qdq check"
    COMPUTED: ClassVar[Mapping[str, str]] = {"passed": "passed", "failures": "failures"}

    outputs: tuple[OutputReport, ...]
    sqnr_db: Measured
    samples: int
    limits: Limits = Limits()
    reference: str = "reference"
    candidate: str = "candidate"
    stood_for_engine: bool = False
    note: str = ""

    @property
    def failures(self) -> list[str]:
        """One sentence per missed limit, per limit that no output has a value for, and per output with NaN."""
        wrong = [(o.name, o.non_finite) for o in self.outputs if o.non_finite]
        found = [f"Output {name}: {n} values of the candidate or the reference are not finite." for name, n in wrong]
        for metric in ("sqnr_db", "cosine", "dice", "top1"):
            least = getattr(self.limits, f"min_{metric}")
            if least is None:
                continue
            values = [(o.name, v) for o in self.outputs for v in _values(o, metric)]
            found += [f"Output {name}: {what} is below {least:g}." for name, (what, v) in values if not v >= least]
            if not values:
                found.append(f"No output has a {metric} to check against {least:g}: none has classes.")
        return found

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def save(self, path: Path | str) -> None:
        """Writes the JSON; complete or absent."""
        write_atomic(path, self.to_json())


def _values(output: OutputReport, metric: str) -> list[tuple[str, float]]:
    """The values of one metric of an output, each with words for it."""
    if metric == "dice":
        return [(f"dice {v:.4f} of class {k}", v) for k, v in output.dice.items()]
    value = getattr(output, metric)
    return [] if value is None else [(f"{metric} {value:.4f}", value)]


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, -inf without signal.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _cosine(product: float, a: float, b: float) -> float:
    """Cosine from the three sums; 1 where both vectors are zero, 0 where one is; NaN stays NaN."""
    if math.isnan(product + a + b):
        return math.nan
    return product / math.sqrt(a * b) if a > 0 and b > 0 else float(a == b)


class Sums:
    """Running sums of one output; `add` sample by sample, `report` at the end. Order changes only float64 rounding."""

    def __init__(self, class_axis: int | None) -> None:
        """Empty sums; `class_axis` as in `compare`."""
        self.class_axis = class_axis
        self.signal = self.noise = self.power = self.product = self.error = self.largest = self.cosines = 0.0
        self.elements = self.samples = self.non_finite = self.positions = self.agreed = 0
        # threshold (None: argmax) -> (3, classes): of both, of the reference, of the candidate
        self.counts: dict[float | None, np.ndarray] = {}
        self.low, self.high, self.off_one = math.inf, -math.inf, 0.0

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Adds one sample: two arrays of one shape, of any numeric type."""
        is_float = not (np.issubdtype(reference.dtype, np.integer) or reference.dtype == np.bool_)
        r, c = reference.astype(np.float64), candidate.astype(np.float64)
        self.non_finite += int(np.count_nonzero(~(np.isfinite(r) & np.isfinite(c))))
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(r - c)
            signal, power, product = float((r * r).sum()), float((c * c).sum()), float((r * c).sum())
            self.noise += float((difference * difference).sum())
        self.signal, self.power, self.product = self.signal + signal, self.power + power, self.product + product
        self.cosines += _cosine(product, signal, power) if math.isfinite(signal + power + product) else math.nan
        self.error += float(difference.sum())
        if r.size:
            self.largest = float(np.maximum(self.largest, difference.max()))  # NaN stays NaN
        self.elements, self.samples = self.elements + r.size, self.samples + 1
        if is_float:
            self._add_classes(r, c)
        else:
            self.positions, self.agreed = self.positions + r.size, self.agreed + int((r == c).sum())

    def _add_classes(self, r: np.ndarray, c: np.ndarray) -> None:
        """Counts argmax agreement and class overlap."""
        axis = self.class_axis if self.class_axis is not None else (-1 if r.ndim == 3 else 1)
        if r.ndim < 2 or not -r.ndim <= axis < r.ndim or not r.size:
            return
        classes = r.shape[axis]
        segments = r.ndim >= 4 and classes <= MAX_DICE_CLASSES
        if segments:
            self.low, self.high = min(self.low, float(r.min())), max(self.high, float(r.max()))
            self.off_one = max(self.off_one, float(np.abs(r.sum(axis) - 1).max()))
            others = tuple(i for i in range(r.ndim) if i != axis % r.ndim)
            for threshold in (0.0, 0.5):
                if (threshold == 0.0 and classes > 1) or (threshold == 0.5 and not self._probabilities):
                    continue  # `report` would not use it
                on_r, on_c = r > threshold, c > threshold
                self._count(threshold, np.stack([x.sum(others) for x in (on_r & on_c, on_r, on_c)]))
        if classes > 1:
            top_r, top_c = r.argmax(axis), c.argmax(axis)
            self.positions, self.agreed = self.positions + top_r.size, self.agreed + int((top_r == top_c).sum())
            if segments:
                rows = (top_r[top_r == top_c], top_r, top_c)
                self._count(None, np.stack([np.bincount(x.ravel(), minlength=classes) for x in rows]))

    @property
    def _probabilities(self) -> bool:
        """Whether every reference value so far lies in [0, 1]."""
        return self.low >= 0 and self.high <= 1

    def _count(self, threshold: float | None, counts: np.ndarray) -> None:
        self.counts[threshold] = self.counts.get(threshold, 0) + counts

    def report(self, name: str) -> OutputReport:
        """The metrics of everything added."""
        independent = self._probabilities and self.off_one > 0.01  # sigmoid channels: no argmax among them
        threshold = None if None in self.counts and not independent else 0.5 if self._probabilities else 0.0
        both, of_r, of_c = self.counts.get(threshold, np.zeros((3, 0)))
        first = 1 if len(both) == 1 else 0  # of one channel, "above" is class 1
        has_top1 = self.positions and not (None in self.counts and independent)
        return OutputReport(
            name=name,
            sqnr_db=decibels(self.signal, self.noise),
            cosine=_cosine(self.product, self.signal, self.power),
            mean_sample_cosine=self.cosines / max(self.samples, 1),
            max_abs_error=self.largest,
            mean_abs_error=self.error / max(self.elements, 1),
            top1=self.agreed / self.positions if has_top1 else None,
            dice={k + first: float(2 * both[k] / n) for k, n in enumerate(of_r + of_c) if n},
            non_finite=self.non_finite,
        )


def compare(
    reference: Any,
    candidate: Any,
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    limits: Limits | None = None,
    class_axis: int | None = None,
    stood_for_engine: bool = False,
    names: tuple[str, str] = ("reference", "candidate"),
) -> Report:
    """Runs both on every sample and compares their outputs by name.

    Args:
        reference: a Polygraphy runner (of `onnx_runtime` or a backend), an ONNX Runtime session, an ONNX path or model.
        candidate: the same.
        samples: {input name: array}; consumed one at a time.
        limits: what decides `passed`.
        class_axis: axis of the classes; None: the last one of outputs of rank 3 (tokens, boxes), else 1.
        stood_for_engine: the candidate is the Q/DQ model in ONNX Runtime in place of an engine; the report says so.
        names: shown in the report.

    Raises:
        EngineError: no samples, a sample with wrong input names, outputs with other names or shapes, or a failed run.
        MissingRuntimeError: onnxruntime or polygraphy is not installed.
    """
    polygraphy = import_runtime("polygraphy.comparator")
    exceptions = import_runtime("polygraphy.exception")
    log = import_runtime("polygraphy.logger").G_LOGGER
    runners = [_runner(x, name) for x, name in zip((reference, candidate), names, strict=True)]
    sums: dict[str, Sums] = {}

    def checked() -> Iterator[dict[str, np.ndarray]]:
        for sample in samples:  # both runners are active here
            for r in runners:
                ort.check_sample(sample, r.get_input_metadata(use_numpy_dtypes=False))
            yield dict(sample)

    def accumulate(ref: Mapping[str, np.ndarray], cand: Mapping[str, np.ndarray]) -> OrderedDict[str, bool]:
        if set(ref.keys()) != set(cand.keys()):
            raise EngineError(f"The reference has outputs {sorted(ref.keys())}, the candidate {sorted(cand.keys())}.")
        for name, array in ref.items():
            shape, other = array.shape, cand[name]
            if shape != other.shape:
                raise EngineError(f"Output {name} has shape {shape} in the reference and {other.shape} elsewhere.")
            sums.setdefault(name, Sums(class_axis)).add(array, other)
        return OrderedDict((name, True) for name in ref)

    failures: tuple[type[Exception], ...] = (exceptions.PolygraphyException, *ort.failures())
    with log.verbosity(log.CRITICAL + 1):
        try:
            stream = polygraphy.Comparator.run(runners, data_loader=checked(), streaming=True)
            polygraphy.Comparator.compare_accuracy(stream, compare_func=accumulate)
        except failures as error:
            raise EngineError(f"Running {names[0]} and {names[1]} on a sample failed: {error}") from error
    if not sums:
        raise EngineError("There is no sample to compare on: give at least one.")
    return Report(
        outputs=tuple(s.report(name) for name, s in sums.items()),
        sqnr_db=decibels(sum(s.signal for s in sums.values()), sum(s.noise for s in sums.values())),
        samples=next(iter(sums.values())).samples,
        limits=limits or Limits(),
        reference=names[0],
        candidate=names[1],
        stood_for_engine=stood_for_engine,
        note=STOOD_FOR_ENGINE if stood_for_engine else "",
    )


def _runner(source: Any, name: str) -> Any:
    """A Polygraphy runner of a path, a model, a session or a runner, under a name."""
    if isinstance(source, str | Path | onnx.ModelProto) or hasattr(source, "get_inputs"):
        return ort.runner(source, name=name)
    source.name = name
    return source
