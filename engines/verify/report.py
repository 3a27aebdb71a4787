"""What a comparison says: the metrics of each output, the worst of them, what was missed and what is poor.

sums -> `OutputReport` each -> `Report` with limits (missed: the command fails) and alarms (poor: it warns) -> JSON.
Must not run anything, and holds numbers, never sample data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from engines.core.documents import Document, Measured, Part
from engines.core.files import write_atomic
from engines.verify.volumes import VolumeReport


class Limits(Part, frozen=True, kw_only=True):
    """The least that passes, for every output that has the metric, and the most, of whole volumes; None: not checked.

    Those of volumes hold for every structure; see `engines.verify.volumes.VolumeReport.failures`.
    """

    min_sqnr_db: float | None = None
    min_sqnr_spread_db: float | None = None
    min_cosine: float | None = None
    min_dice: float | None = None
    min_top1: float | None = None
    max_dice_drop: float | None = None
    max_hd95_mm: float | None = None
    max_volume_diff_ml: float | None = None


OF_VOLUMES = tuple(name for name in Limits.__struct_fields__ if name.startswith("max_"))


class Alarms(Part, frozen=True, kw_only=True):
    """Below these an output is called poor.

    Attributes:
        warn_sqnr_db: in dB, of `sqnr_db` and `sqnr_spread_db`.
        warn_top1: fraction of the argmax that agrees, from 0 to 1.
    """

    warn_sqnr_db: float = 20.0
    warn_top1: float = 0.99


class Unit(Part, frozen=True, kw_only=True):
    """In which unit an output's error is told: `scale` of it make one of the output's own."""

    name: str
    scale: float = 1.0

    def shown(self, value: float) -> str:
        """A value of the output, in words."""
        return f"{value * self.scale:.4g} {self.name}"


class OutputReport(Part, frozen=True, kw_only=True):
    """The metrics of one output, defined in `engines.verify.sums`; None where one means nothing for it.

    Attributes:
        name: of the output.
        task: 'classification' and 'segmentation' have classes, 'regression' numbers, 'labels' are equal or not; 'none'
            is not compared.
        class_axis: axis of the classes, from 0.
        because: why it is taken for that.
        elements: compared.
        mismatched: samples for which the candidate gave another shape, which are not compared.
        identical: every element is equal.
        constant: the reference does not vary, over its elements or from sample to sample.
        sqnr_db: signal over noise.
        sqnr_centred_db: with the mean of the signal removed.
        sqnr_spread_db: `spread` over `rms_error`; None for one sample, a constant, or shapes that differ.
        spread: standard deviation of the reference across samples, in the unit of the output.
        cosine: over all samples.
        cosine_centred: with both means removed.
        mean_sample_cosine: mean of each sample's.
        rms_error: in the unit of the output, as the next two.
        max_abs_error: largest.
        mean_abs_error: mean.
        mean_abs: of the reference, in the unit of the output.
        top1: of an argmax, or of labels that are equal.
        dice: by class.
        non_finite: values of either that are not finite.
        first_non_finite: the first sample, from 0, that holds such values, and of which side; "" where none does.
        not_compared: why it is not, or not on every sample; "" where it is.
    """

    name: str
    task: str
    class_axis: int | None
    because: str
    elements: int
    mismatched: int
    identical: bool
    constant: bool
    sqnr_db: Measured | None
    sqnr_centred_db: Measured | None
    sqnr_spread_db: Measured | None
    spread: Measured | None
    cosine: Measured | None
    cosine_centred: Measured | None
    mean_sample_cosine: Measured | None
    rms_error: Measured | None
    max_abs_error: Measured | None
    mean_abs_error: Measured | None
    top1: Measured | None
    dice: dict[int, float]
    non_finite: int
    first_non_finite: str = ""
    not_compared: str = ""
    mean_abs: Measured | None = None

    @property
    def least_db(self) -> float:
        """The lower of SQNR and SQNR against the spread; infinite where the output has neither, NaN if one is."""
        found = [v for v in (self.sqnr_db, self.sqnr_spread_db) if v is not None]
        return math.nan if any(map(math.isnan, found)) else min(found, default=math.inf)


class TensorCost(Part, frozen=True, kw_only=True):
    """What one quantized tensor costs alone.

    Attributes:
        tensor: its name.
        role: 'data' or 'weight'.
        nodes: that read it quantized.
        sqnr_db: of the poorest output if nothing but this tensor were quantized.
    """

    tensor: str
    role: str
    nodes: tuple[str, ...]
    sqnr_db: Measured


class Report(Document, frozen=True, kw_only=True):
    """The metrics of every output, and whether they stay within the limits.

    Attributes:
        outputs: in the order of the model's.
        samples: compared.
        limits: what decides `passed`.
        alarms: what decides `poor`.
        reference: what it is called.
        candidate: what it is called.
        stood_for_engine: the Q/DQ model was run in place of an engine.
        note: what stood for the engine.
        costly: where an output is poor: the quantized tensors that cost it most, the costliest first.
        advice: where an output is poor: what was found and what to try, one sentence each.
        volumes: what whole volumes say; None where none were run.
        units: output -> in which unit its mean error is told.
    """

    FORMAT: ClassVar[str] = "qdq.check/3"
    MAKE: ClassVar[str] = "qdq check"
    COMPUTED: ClassVar[Mapping[str, str]] = {
        "passed": "passed",
        "failures": "failures",
        "poor": "poor",
        "worst_output": "worst_output",
        "sqnr_db": "sqnr_db",
        "top1": "top1",
    }

    outputs: tuple[OutputReport, ...]
    samples: int
    limits: Limits = Limits()
    alarms: Alarms = Alarms()
    reference: str = "reference"
    candidate: str = "candidate"
    stood_for_engine: bool = False
    note: str = ""
    costly: tuple[TensorCost, ...] = ()
    advice: tuple[str, ...] = ()
    volumes: VolumeReport | None = None
    units: dict[str, Unit] = msgspec.field(default_factory=dict)

    @property
    def worst(self) -> OutputReport:
        """See `worst_of`."""
        return worst_of(self.outputs)

    @property
    def worst_output(self) -> str:
        """Name of the worst output."""
        return self.worst.name

    @property
    def sqnr_db(self) -> Measured | None:
        """The least signal to noise ratio of an output; NaN if one is, None without an output of numbers."""
        found = [o.sqnr_db for o in self.outputs if o.sqnr_db is not None]
        return math.nan if any(map(math.isnan, found)) else min(found, default=None)

    @property
    def top1(self) -> Measured | None:
        """The least agreement of an output's classes; None without classes."""
        return min((o.top1 for o in self.outputs if o.top1 is not None), default=None)

    @property
    def failures(self) -> list[str]:
        """One sentence per missed limit, per limit that no output has a value for, and per output with NaN."""
        wrong = [o for o in self.outputs if o.non_finite]
        found = [f"Output {o.name}: {o.non_finite} values are not finite, the first in {self._side(o)}." for o in wrong]
        asked = {name: given for name in Limits.__struct_fields__ if (given := getattr(self.limits, name)) is not None}
        of_volumes = {name: asked.pop(name, None) for name in OF_VOLUMES}
        if self.volumes:
            found += self.volumes.failures(**of_volumes)
        elif given := [name for name, most in of_volumes.items() if most is not None]:
            found.append(f"No whole volume was run, so {', '.join(given)} cannot be checked: give images.")
        for limit, least in asked.items():
            metric = limit.removeprefix("min_")
            values = [(o.name, v) for o in self.outputs for v in _values(o, metric)]
            found += [f"Output {name}: {what} is below {least:g}." for name, (what, v) in values if not v >= least]
            if not values:
                found.append(f"No output has a {metric} to check against {least:g}: {_MISSING[metric]}.")
        return found

    @property
    def poor(self) -> list[str]:
        """One sentence per output below an alarm, or of another shape, the worst first."""
        return [text for _, text in self._poor]

    @property
    def poorest(self) -> OutputReport | None:
        """The first output of `poor`."""
        return next((output for output, _ in self._poor), None)

    @property
    def _poor(self) -> list[tuple[OutputReport, str]]:
        found: list[tuple[OutputReport, str]] = []
        for o in self.outputs:
            said = []
            for value, what in ((o.sqnr_db, "SQNR is"), (o.sqnr_spread_db, "against its spread over samples SQNR is")):
                if value is not None and not o.identical and not value >= self.alarms.warn_sqnr_db:
                    said.append(_below(what, value, self.alarms.warn_sqnr_db))
            if o.top1 is not None and not o.top1 >= self.alarms.warn_top1:
                what = "labels are equal" if o.task == "labels" else "the argmax agrees"
                said.append(f"{what} in {o.top1:.2%}, below {self.alarms.warn_top1:.4g}")
            if o.mismatched:
                said.append(o.not_compared or f"it has another shape in {o.mismatched} samples")
            if said:
                found.append((o, f"Output {o.name}: {'; '.join(dict.fromkeys(said))}."))
        return sorted(found, key=lambda pair: -math.inf if math.isnan(pair[0].least_db) else pair[0].least_db)

    def _side(self, output: OutputReport) -> str:
        """Where an output is not finite, by the names of both sides."""
        sample, _, sides = output.first_non_finite.partition(" of the ")
        named = {"reference": self.reference, "candidate": self.candidate}
        return f"{sample} of the {' and the '.join(named[side] for side in sides.split(' and the '))}"

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def save(self, path: Path | str) -> None:
        """Writes the JSON; complete or absent."""
        write_atomic(path, self.to_json())


def _below(what: str, value: float, least: float) -> str:
    """A ratio that is too low, in words where it is no number."""
    if math.isnan(value):
        return "values are not finite"
    return f"{what} {value:.1f} dB, below {least:g}" if math.isfinite(value) else "it should be 0 and is not"


def worst_of(outputs: Sequence[OutputReport]) -> OutputReport:
    """The output with the least signal to noise; where none has one, with the least agreement.

    Identical and empty ones only where there are no others.
    """
    differ = [o for o in outputs if o.elements and not o.identical] or outputs
    numeric = [o for o in differ if o.sqnr_db is not None]
    if not numeric:
        return min(differ, key=lambda o: math.inf if o.top1 is None else o.top1)
    return min(numeric, key=lambda o: tuple(-math.inf if math.isnan(v) else v for v in (o.sqnr_db or 0, o.least_db)))


_MISSING = {
    "sqnr_db": "none has numbers",
    "sqnr_spread_db": "one sample, or none that varies",
    "cosine": "none has numbers",
    "dice": "none is a segmentation, by what ends the graph (--task tells)",
    "top1": "none has classes, by what ends the graph (--task tells)",
}


def _values(output: OutputReport, metric: str) -> list[tuple[str, float]]:
    """The values of one metric of an output, each with words for it."""
    if metric == "dice":
        return [(f"dice {v:.4f} of class {k}", v) for k, v in output.dice.items()]
    value = getattr(output, metric)
    return [] if value is None else [(f"{metric} {value:.4f}", value)]
