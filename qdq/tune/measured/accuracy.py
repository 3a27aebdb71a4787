"""What a tuned plan is measured by: calibrated as it will be, and judged on samples that had no part in that.

calibration samples -> some held out by hash, the others calibrate a plan -> Q/DQ model, finished -> SQNR of the outputs
It must not see the samples that a report is made on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from calib_data import Samples
from calib_data.sources.function import PythonFunction
from engines.core.documents import replace
from qdq.assemble.finish import finish
from qdq.assemble.held_out import MOST_HELD, HeldOutScore, Split, decibels, ranked
from qdq.assemble.quantize import quantize
from qdq.assemble.tables import Tables
from qdq.measure.inference.inputs import as_samples
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.exact.switches import Switches

# Samples that a plan is measured on where half of them are as many, a quarter where that is more; and as many of those
# that calibrate, of which one may be clipped.
JUDGED = 8
ERRORS = 2.0  # standard errors of the measured noise, which vary from sample to sample by 0.1 to 3 dB
FEWEST = 4  # samples of which some are held out: fewer calibrate and judge


@dataclass(slots=True)
class Accuracy:
    """Measures plans of one prepared model.

    The model is finished as it is compiled, in its float type (`auto`: the plan's) and with the plan's rewrites. Biases
    are not corrected, which takes long; that is done to the final model where it gains.

    Attributes:
        model: prepared.
        samples: of the calibration, re-iterable.
        settings: how plans are quantized; what is 'auto' the first plan settles.
        unquantized_type: of what is not quantized.
    """

    model: Model
    samples: Iterable[Sample]
    settings: Settings
    unquantized_type: str = "auto"
    _tables: Tables | None = None
    _held: Split = field(init=False)
    _seen: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Nothing is read yet."""
        self.settings = replace(self.settings, bias_correction="off")

    def __call__(self, plan: Plan) -> float:
        """The SQNR in dB of a plan's outputs, of samples that were held out or of some that were not: the worse.

        Of several samples that is the ratio of their sums with the noise increased by `ERRORS` standard errors.
        """
        tables = self._fitted()
        made = quantize(self.model, tables.samples, settings=self.settings, plan=plan, table=tables.of(plan))
        self.settings = made.plan.settings
        done = finish(made.model, made.plan, unquantized_type=self.unquantized_type, table=made.table)
        both = replace(self._held, held=self._held.held | self._seen)
        signals, (noises,) = HeldOutScore(self.model, both).energies([done.model])
        if len(signals) != len(both.held):  # no output holds numbers
            return decibels(signals, noises)
        rows = dict(zip(sorted(both.held), zip(signals, noises, strict=True), strict=True))
        parts = [[rows[index] for index in sorted(part)] for part in (self._held.held, self._seen) if part]
        return min(_kept_db(*zip(*part, strict=True)) for part in parts)

    def switches(self, plan: Plan, most: int) -> Switches | None:
        """The noise of parts of a plan, with its calibrated scales, on some samples that judge; see `Switches.of`.

        They are at most so many: held-out ones and ones that calibrate in equal parts, chosen by hash.
        """
        tables = self._fitted()
        plan = replace(plan, settings=self.settings)
        return Switches.of(plan.form(self.model), plan, tables.of(plan), self._judging(most), most=most)

    def _judging(self, most: int) -> Iterator[Sample]:
        """Some of the samples that judge."""
        ranks = {index: rank for rank, index in enumerate(ranked(self._held.samples))}
        held, seen = (sorted(part, key=ranks.__getitem__) for part in (self._held.held, self._seen))
        chosen = [*held[: max(most - len(seen), -(-most // 2))], *seen[: most // 2]]
        return replace(self._held, held=frozenset(chosen)).holding()

    def _fitted(self) -> Tables:
        """Tables of the samples that calibrate."""
        if self._tables is None:
            samples = as_samples(self.samples, self.model)
            order = ranked(samples)
            count = min(MOST_HELD, max(len(order) // 4, min(JUDGED, len(order) // 2)))
            held = frozenset(order[:count] if len(order) >= FEWEST else order)
            self._held = Split(samples=samples, fit=(), held=held)
            self._seen = frozenset(order[count : count + JUDGED] if len(order) >= FEWEST else ())
            fit = _without(samples, held, len(order) - len(held)) if len(order) >= FEWEST else samples
            self._tables = Tables(model=self.model, samples=fit)
        return self._tables


def _kept_db(signals: Sequence[float], noises: Sequence[float]) -> float:
    return decibels(signals, noises) - doubt_db(signals, noises)


def doubt_db(signals: Sequence[float], noises: Sequence[float]) -> float:
    """How many dB of a ratio of sums over samples to leave, for other samples have another: `ERRORS` standard errors.

    The noise over signal r = sum n / sum s has the standard error sqrt(sum (n - r s)^2 / (k (k - 1))) / mean s.
    Source: Cochran, Sampling Techniques (1977), chapter 6. One sample leaves nothing.
    """
    signal, noise = math.fsum(signals), math.fsum(noises)
    if len(signals) < 2 or not 0 < noise < math.inf or signal <= 0:
        return 0.0
    ratio, count = noise / signal, len(signals)
    squares = math.fsum((n - ratio * s) ** 2 for n, s in zip(noises, signals, strict=True))
    error = math.sqrt(squares / (count * (count - 1))) * count / noise
    return 10 * math.log10(1 + ERRORS * error)


def _without(samples: Samples, left_out: Collection[int], count: int) -> Samples:
    """Samples but for some, by index; `count` are left."""

    def read() -> Iterator[Sample]:
        return (sample for index, sample in enumerate(samples) if index not in left_out)

    source = PythonFunction(where=samples.origin, function=read, count=count)
    return replace(samples, source=source, indices=range(count))
