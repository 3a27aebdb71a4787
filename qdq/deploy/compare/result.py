"""What `qdq compare` reports: a row per scheme, report.json for machines, and a table for people.

measured figures -> `SchemeRow` -> `Comparison` -> JSON, or rows of cells that the command line prints.
Must not print, measure anything or hold sample data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from engines.core.documents import Document, Measured, Part
from qdq.deploy.compare.metrics import METRICS
from qdq.deploy.compare.task import Task
from qdq.deploy.report.report import size

SHOWN = 160  # characters of a reason in the table; the JSON has it all


class SchemeRow(Part, frozen=True, kw_only=True):
    """What was measured of one scheme; None where the step before failed, and `problem` says how.

    Attributes:
        scheme: as asked for, or FP32, FP16, BF16 for the float model.
        precision: bits of weights and data of the quantized products, as in W4A8.
        weights_per: what shares a scale in the weights, with the number of weights where there are several kinds.
        data_per: what shares a scale in the activations; '-' where they are float.
        quantized_nodes: number of nodes with a quantized weight.
        model_bytes: of the ONNX file with its external data.
        weight_bytes: of the constants in the engine, as its compiler says.
        kernels: launched per inference.
        shares: type that kernels consume -> fraction of the multiply-adds.
        sqnr_db: signal to noise of the worst output against the float model's; infinite where all are identical.
        sqnr_spread_db: the spread of that output over samples against its error; None where it is not known.
        worst_output: its name.
        value: of the metric; of several outputs that are scored, that of the worst.
        values: output -> value, in the unit of each.
        value_of: the output of `value`.
        predicted_us: mean over the GPUs, by `engines.cost`.
        problem: '' if nothing failed.
        notes: what a reader must know, one sentence each.
    """

    scheme: str
    precision: str = ""
    weights_per: str = ""
    data_per: str = ""
    quantized_nodes: int | None = None
    model_bytes: int | None = None
    weight_bytes: int | None = None
    kernels: int | None = None
    shares: dict[str, float] | None = None
    sqnr_db: Measured | None = None
    sqnr_spread_db: Measured | None = None
    worst_output: str = ""
    value: Measured | None = None
    values: dict[str, Measured] = msgspec.field(default_factory=dict)
    value_of: str = ""
    predicted_us: Measured | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


class Comparison(Document, frozen=True, kw_only=True):
    """All rows, and what they are of.

    Attributes:
        outputs: of the model, in number.
        overlap: evaluation samples that are calibration samples too.
    """

    FORMAT: ClassVar[str] = "qdq.compare/3"
    MAKE: ClassVar[str] = "qdq compare"
    COMPUTED: ClassVar[Mapping[str, str]] = {"higher_is_better": "higher_is_better"}

    model: str
    model_sha256: str
    task: Task
    samples: int
    evaluated_on: str
    targets: tuple[str, ...]
    gpus: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    rows: tuple[SchemeRow, ...]
    outputs: int
    overlap: int = 0
    notes: tuple[str, ...] = ()

    @property
    def higher_is_better(self) -> bool:
        """Of the metric."""
        return bool(METRICS[self.task.metric].higher_is_better)

    def table(self) -> list[tuple[str, ...]]:
        """Rows of cells for the terminal, the head first."""
        gpu = f" on {', '.join(self.gpus)}" if self.gpus else ""
        head = (
            *("scheme", "precision", "weights per", "data per", "nodes", "model", "engine weights"),
            *(
                "multiply-adds in",
                f"SQNR dB{', worst output' if self.outputs > 1 else ''}",
                self.task.title,
                f"predicted us{gpu}",
            ),
        )
        return [head, *(_cells(row, self.task, several=self.outputs > 1) for row in self.rows)]


def value_text(row: SchemeRow, task: Task) -> str:
    """The metric's value; of several outputs the worst one's first, each with its unit."""
    if len(row.values) < 2:
        return "" if row.value is None else _number(row.value)
    ordered = sorted(row.values, key=lambda name: name != row.value_of)
    said = [f"{name} {_number(row.values[name])} {task.unit_of(name).name}".strip() for name in ordered]
    return ", ".join(said)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def _cells(row: SchemeRow, task: Task, *, several: bool) -> tuple[str, ...]:
    """One line of the table."""
    of = f" {row.worst_output}" if several else ""
    return (
        *(row.scheme, row.precision, row.weights_per, row.data_per),
        "" if row.quantized_nodes is None else str(row.quantized_nodes),
        "" if row.model_bytes is None else size(row.model_bytes),
        "" if row.weight_bytes is None else size(row.weight_bytes),
        ", ".join(f"{kind} {share:.0%}" for kind, share in (row.shares or {}).items() if share >= 0.005),
        "identical" if row.sqnr_db == math.inf else "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}{of}",
        value_text(row, task),
        _short(row.problem) if row.problem else "" if row.predicted_us is None else f"{row.predicted_us:.1f}",
    )


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN else f"{flat[: SHOWN - 1]}…"
