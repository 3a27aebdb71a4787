"""What `deploy` reports: report.json for machines, and short tables for people.

Audit + Report + sizes -> `DeployReport` -> JSON, or rows of (what, value) that the command line prints.
Must not print, measure anything or hold sample data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from msgspec import field

from engines.backends.layers import LayerTable
from engines.core.documents import Document, Part
from engines.verify.audit import Audit
from engines.verify.report import OutputReport, Report
from qdq.build.measured.forms import Timings
from qdq.deploy.report.details import Details
from qdq.plan.plan import Plan, grain
from qdq.tune.sensitivity.mixed.front import Allocation
from qdq.tune.tuned import TuningOutcome

SHOWN = 12  # rows of a long list that the terminal shows; the JSON has all


class Row(NamedTuple):
    """One line of a table of two columns."""

    what: str
    value: str


class EngineSizes(Part, frozen=True, kw_only=True):
    """What an engine costs, as its compiler says; `bytes_moved` is None with dynamic shapes."""

    kernels: int
    bytes_moved: int | None
    weight_bytes: int
    activation_bytes: int
    engine_bytes: int

    @classmethod
    def of(cls, table: LayerTable) -> EngineSizes:
        """The sizes of a layer table."""
        return cls(**{name: getattr(table, name) for name in cls.__struct_fields__})


class DeployReport(Document, frozen=True, kw_only=True):
    """What an engine is worth: how close it is to the float model, and what it saves.

    Attributes:
        evaluated_on: which samples `check` used.
        overlap: how many of the samples that were checked on are calibration samples too, where others were given.
        notes: one sentence each: what a reader must know to judge the figures.
        model_file: name of the model that was compiled: by its scheme, or by its float type if nothing is quantized.
        float_file_bytes: size of the float model with its external data.
        int8_file_bytes: size of the Q/DQ model with its external data.
        fp16_file_bytes: size of the float model in FP16; None where that was not made.
        float_engine: the float model compiled for the same targets; None where it does not compile.
        fp16_engine: the same of the float model in FP16.
        min_int8_share: least fraction of the multiply-adds that must run in INT8; None: not checked.
        max_size_mib: most that the weights in the engine may take, in MiB; None: not checked.
        label_dice: Dice of each class against true labels, for 'float model' and 'shipped model'; only in the demo.
        tuning: how the plan was chosen by compiled results; None where it was not.
        elsewhere: what is said of the other compiler where nothing was tuned.
        allocation: the search for a plan of several precisions that it comes from; None where there was none.
        check: outputs of the engine, or of the Q/DQ model in its place, against the float model.
        as_compiled: the same of the Q/DQ model rounded where the engine's kernels write their results; None where no
            engine was compiled.
        audit: what each weighted node asked for and got; None where no engine was built.
        compiler: the title of whose engine the model is for.
        chosen_because: why that one; "" where the user said so.
        targets: of the engine.
        not_built: why there is no engine, and how it is built; "" where there is one.
        quantized_nodes: of the plan.
        details: node by node, tensor by tensor and kernel by kernel.
    """

    FORMAT: ClassVar[str] = "qdq.report/6"
    MAKE: ClassVar[str] = "qdq deploy"
    COMPUTED: ClassVar[Mapping[str, str]] = {"passed": "passed", "failures": "failures"}

    evaluated_on: str
    overlap: int = 0
    notes: tuple[str, ...] = ()
    model_file: str
    float_file_bytes: int
    int8_file_bytes: int
    fp16_file_bytes: int | None = None
    float_engine: EngineSizes | None
    fp16_engine: EngineSizes | None = None
    label_dice: dict[str, dict[int, float]] = field(default_factory=dict)
    tuning: TuningOutcome | None = None
    elsewhere: str = ""
    allocation: Allocation | None = None
    min_int8_share: float | None = None
    max_size_mib: float | None = None
    check: Report
    as_compiled: Report | None = None
    audit: Audit | None
    compiler: str
    chosen_because: str = ""
    targets: tuple[str, ...]
    not_built: str = ""
    quantized_nodes: int
    details: Details | None = None

    @property
    def title(self) -> str:
        """Whose engine for which targets, and why that compiler."""
        why = f" ({self.chosen_because})" if self.chosen_because else ""
        return f"for {', '.join(self.targets)} by {self.compiler}{why}"

    @property
    def passed(self) -> bool:
        """Whether every limit was kept."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """One sentence per missed limit."""
        return [*self.check.failures, *share_failures(self.audit, self.min_int8_share), *self._too_large()]

    def _too_large(self) -> list[str]:
        """A sentence if the weights in the engine take more than they may, or if that cannot be told."""
        if self.max_size_mib is None or (self.audit and self.audit.weight_bytes <= self.max_size_mib * 2**20):
            return []
        if self.audit is None:
            return [f"max_size_mib is {self.max_size_mib:g}, which cannot be checked: no engine was built."]
        took = f"The weights in the engine take {self.audit.weight_bytes / 2**20:.3f} MiB"
        return [f"{took}: max_size_mib is {self.max_size_mib:g}."]

    def rows(self) -> list[Row]:
        """The short table."""
        rows = [*self._sizes(), *self._compiled(), *self._predicted(), *check_rows(self.check)]
        if self.as_compiled:
            rows.append(Row(f"{_measure(self.as_compiled.worst)}, rounded as compiled", headline(self.as_compiled)))
        return [*rows, *self._labels(), Row("compared on", f"{self.check.samples} {self.evaluated_on}")]

    @property
    def slower(self) -> bool:
        """Whether it is predicted slower than the fastest float form, by more than a tie."""
        return self.tuning is not None and self.tuning.decision.slower

    def brief(self) -> list[Row]:
        """The rows for a second form of a model, beside the short table of the first."""
        worst = self.check.worst
        close = Row(f"{_measure(worst)} against the float model", headline(self.check))
        return [*self._sizes(), *self._predicted(), close, *self._labels()]

    def _sizes(self) -> list[Row]:
        file = Row(f"model file, {self.model_file}", _against(self.int8_file_bytes, self.float_file_bytes))
        if self.audit is None:
            return [file]
        before = self.float_engine.weight_bytes if self.float_engine else None
        return [file, Row("weights in the engine", _against(self.audit.weight_bytes, before))]

    def _compiled(self) -> list[Row]:
        """What the engine does; where there is none, what the plan asks for, and how it is built."""
        before, now = self.float_engine, self.audit
        if now is None:
            return [Row("engine", self.not_built), Row("nodes quantized, as planned", str(self.quantized_nodes))]
        return [
            Row("multiply-adds, as compiled", _types(now)),
            Row("bytes moved per inference", _against(now.bytes_moved, before.bytes_moved if before else None)),
            Row("kernels", f"{now.kernels}" + (f" (FP32: {before.kernels})" if before else "")),
        ]

    def _predicted(self) -> list[Row]:
        if not self.tuning:
            times = self.details.times if self.details else ()
            return [Row(*row) for row in (*times, ("", self.elsewhere)) if row[1]]
        others = [Row("", line) for line in (*self.tuning.gains, self.tuning.elsewhere) if line]
        return [*measured_rows(self.tuning.measured), Row(self.tuning.label, self.tuning.gain), *others]

    def _labels(self) -> list[Row]:
        names = {"float model": "the float model", "shipped model": self.model_file}
        return [Row(f"Dice of {names[k]} against the atlas", _per_class(dice)) for k, dice in self.label_dice.items()]


def measured_rows(timings: Timings | None) -> list[Row]:
    """What was measured of a choice, and its worst predicted kernels; none where times were predicted only."""
    if timings is None:
        return []
    rows = [Row(timings.label, timings.gain)]
    for number, kernel in enumerate(timings.shipped.kernels):
        what = "kernels whose prediction is furthest off" if not number else ""
        times = f"predicted {kernel.predicted_us:.1f}, measured {kernel.measured_us:.1f} us"
        rows.append(Row(what, f"{times}: {kernel.kernel[:80]}"))
    return rows


def check_rows(report: Report) -> list[Row]:
    """The outputs of a comparison, the worst first, with what each is taken for and classes where there are any."""
    several = len(report.outputs) > 1
    ordered = sorted(report.outputs, key=lambda o: (o is not report.worst, _rank(o)))
    rows = []
    none = [o for o in ordered if o.task == "none"]
    ordered = [o for o in ordered if o.task != "none"]
    for output in ordered[:SHOWN]:
        of = f" of {output.name}" if several else ""
        worst = ", the worst output" if several and output is report.worst else ""
        rows.append(Row(f"{_measure(output)}{of} against the float model{worst}", _figures(output)))
        if (unit := report.units.get(output.name)) and output.mean_abs_error is not None:
            mean = "" if output.mean_abs is None else f", of a mean of {unit.shown(output.mean_abs)}"
            rows.append(Row(f"mean absolute error{of}", f"{unit.shown(output.mean_abs_error)}{mean}"))
        if output.dice:
            rows.append(Row(f"Dice{of} against the float model", _per_class(output.dice)))
        axis = "" if output.class_axis is None else f", classes on axis {output.class_axis}"
        kind = "numbers" if output.task == "regression" else output.task
        rows.append(Row(f"taken{of} for", f"{kind}{axis}: {output.because}"))
    more = len(ordered) - SHOWN
    if more > 0:
        rows.append(Row("other outputs", f"{more} more, all better; the JSON has them"))
    return [*rows, *(Row("not compared", f"{o.name}: {o.not_compared}") for o in none)]


def headline(report: Report) -> str:
    """The worst output in a few words."""
    of = f" in the worst output, {report.worst_output}" if len(report.outputs) > 1 else ""
    return ("all identical" if of and report.worst.identical else f"{_decibels(report.worst)}{of}").strip()


def warning_lines(report: Report) -> list[str]:
    """Sentences for people: what is poor, what costs most, what to try; none where nothing is poor."""
    worst = report.poorest
    if worst is None:
        return []
    poor = report.poor if len(report.poor) <= SHOWN else [*report.poor[:SHOWN], f"{len(report.poor) - SHOWN} more."]
    rows = [f"{row.tensor} ({row.role} of {_some(row.nodes)}) leaves {row.sqnr_db:.1f} dB" for row in report.costly]
    costs = [f"What costs output {worst.name} most, each quantized alone: {'; '.join(rows)}."] if rows else []
    return [*poor, *costs, *report.advice]


def _rank(output: OutputReport) -> float:
    return -math.inf if math.isnan(output.least_db) else output.least_db


def _measure(output: OutputReport) -> str:
    return "labels" if output.task == "labels" else "SQNR"


def _decibels(output: OutputReport) -> str:
    """SQNR in words; a ratio without noise is no number."""
    if not output.elements:
        return "not compared" if output.not_compared else "empty"
    if output.identical:
        return "identical, and constant" if output.constant else "identical"
    if output.sqnr_db is None:
        return "" if output.top1 is None else f"{output.top1:.2%} are equal"
    if math.isnan(output.sqnr_db):
        return f"{output.non_finite} values are not finite"
    return "no signal: it should be 0" if output.sqnr_db == -math.inf else f"{output.sqnr_db:.1f} dB"


def _figures(output: OutputReport) -> str:
    """What a row says of an output."""
    said = [_decibels(output)]
    if output.sqnr_db is not None and not (output.identical or math.isnan(output.sqnr_db)) and output.elements:
        if output.constant:
            said[0] += " (the output is constant)"
        else:
            parts = (
                ("mean removed", output.sqnr_centred_db),
                ("against the spread over samples", output.sqnr_spread_db),
            )
            known = ", ".join(f"{what} {db:.1f}" for what, db in parts if db is not None)
            said[0] += f" ({known})" if known else ""
        centred = "" if output.cosine_centred is None else f" (mean removed {output.cosine_centred:.6f})"
        said.append(f"cosine {output.cosine:.6f}{centred}")
        spread = f", spread {output.spread:.3g}" if output.spread else ""
        said.append(f"error {output.rms_error:.3g} RMS{spread}, largest {output.max_abs_error:.3g}")
    if output.top1 is not None and output.task != "labels":
        said.append(f"argmax agrees {output.top1:.2%}")
    if output.mismatched:
        why = f": {output.not_compared}" if output.not_compared else ""
        said.append(f"another shape in {output.mismatched} samples, which are not compared{why}")
    return ", ".join(said)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def audit_rows(audit: Audit) -> list[Row]:
    """The totals of an audit."""
    return [
        Row("engine", f"{audit.backend} {audit.version} for {', '.join(audit.targets)}, {size(audit.engine_bytes)}"),
        Row("multiply-adds, as compiled", _types(audit)),
        Row("kernels", str(audit.kernels)),
        Row("bytes moved per inference", size(audit.bytes_moved)),
        Row("weights in the engine", size(audit.weight_bytes)),
        Row("activation memory", size(audit.activation_bytes)),
        *(
            Row(f"table of {t.node}", f"{t.stored}, {size(t.nbytes) if t.nbytes else 'size unknown'}")
            for t in audit.tables
        ),
    ]


def share_failures(audit: Audit | None, least: float | None) -> list[str]:
    """A sentence if less of the multiply-adds runs in INT8 than is asked for, or if that cannot be told."""
    if audit is None:
        return [f"min_int8_share is {least:g}, which cannot be checked: no engine was built."] if least else []
    uncounted = sum(not node.counted and node.consumed != "int8" for node in audit.nodes)
    if least is None or (audit.int8_share >= least and not (uncounted and least)):
        return []
    if audit.int8_share >= least:
        return [f"min_int8_share is {least:g}, which cannot be checked: {uncounted} nodes have unknown multiply-adds."]
    return [f"{audit.int8_share:.4f} of the multiply-adds run in INT8 as compiled: min_int8_share is {least:g}."]


def audit_lines(audit: Audit | None) -> list[str]:
    """One sentence per node that did not get what it asked for, is suspect, or of which something is unknown.

    None without an engine. How many are counted for one turn alone is in the rows.
    """
    if audit is None:
        return []
    lines = [
        f"{n.node} ({n.op_type}) asked for {n.requested} and runs in {n.consumed}: {n.cause}" for n in audit.missed
    ]
    lines += [
        f"{t.node} (Gather) reads a table of {t.requested} codes, which the engine holds as {t.stored}"
        for t in audit.tables
        if t.missed
    ]
    lines += [f"{n.node} ({n.op_type}) is suspect: {n.cause}" for n in audit.suspect]
    unknown = [n for n in audit.unknown if n.macs is None or n.consumed == "unknown"]
    lines += [f"{n.node} ({n.op_type}) is not fully known: {n.cause}" for n in unknown]
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more; --json lists all"]


def plan_rows(plan: Plan) -> list[Row]:
    """How many nodes a plan quantizes, and why the others stay in float."""
    reasons: dict[str, list[str]] = {}
    for skip in plan.skips:
        reasons.setdefault(skip.reason, []).append(skip.op_type)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return [
        Row(f"nodes in {plan.operands}", str(len(plan.quantized_nodes))),
        *(Row(f"table in {p.spec.format.upper()}", f"{p.tensor}, {grain(p.spec)}") for p in plan.tables),
        *(Row(f"in float: {', '.join(sorted(set(ops))[:4])}", f"{len(ops)}: {why}") for why, ops in ordered[:SHOWN]),
    ]


def shares(audit: Audit) -> dict[str, float]:
    """The types that kernels multiply in, each with its fraction of the multiply-adds, the largest first."""
    kinds = {node.consumed: audit.share(node.consumed) for node in audit.nodes}
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def size(nbytes: int | None) -> str:
    """Bytes for people.

    >>> size(1536), size(None)
    ('1.5 KiB', 'unknown (dynamic shapes)')
    """
    if nbytes is None:
        return "unknown (dynamic shapes)"
    power = min(int(math.log2(max(nbytes, 1)) // 10), 4)
    return f"{nbytes} B" if power == 0 else f"{nbytes / 1024**power:.1f} {('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def count(number: int) -> str:
    """A large number for people.

    >>> count(1_230_000)
    '1.23 M'
    """
    for unit, text in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {text}"
    return str(number)


def _types(audit: Audit) -> str:
    uncounted = sum(node.macs is None for node in audit.nodes)
    if uncounted and uncounted == len(audit.nodes):
        return "unknown"
    parts = ", ".join(f"{share:.1%} in {kind}" for kind, share in shares(audit).items())
    more = f" and those of {uncounted} nodes that are unknown" if uncounted else ""
    once = sum(node.macs is not None and node.turns is None for node in audit.nodes)
    more += f"; {once} nodes count for one turn of a loop whose number of turns is not known" if once else ""
    return f"{parts or 'none'}, of {count(audit.macs)}{more}"


def _against(now: int | None, before: int | None) -> str:
    """A size and what part it is of the float model's."""
    if now is None or not before:
        return size(now)
    return f"{size(now)}, {now / before:.2f} of the float model ({size(before)})"


def _per_class(dice: Mapping[int, float]) -> str:
    if len(dice) > SHOWN:
        return f"worst of {len(dice)} classes {min(dice.values()):.4f}"
    return ", ".join(f"class {k} {v:.4f}" for k, v in dice.items())
