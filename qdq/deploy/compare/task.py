"""What a comparison scores: a metric, its unit, and labels beside the samples. Must not run a model."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from engines.core.documents import Part
from engines.verify.report import Unit
from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import METRICS
from qdq.model.model import Model

NEXT = "next"
TOKENS = "input_ids"  # what a language model calls the words that it reads


class Task(Part, frozen=True, kw_only=True):
    """What is measured of an output.

    Attributes:
        metric: a name in `METRICS`.
        labels: the array of the evaluation samples that holds the truth; 'next' or 'next:INPUT' for the tokens that
            follow those of an integer input; '' to compare with the float model.
        output: name of the output; '' for the first, or for each where the metric is told of each and there are no
            labels.
        unit: of a metric that has one, for reports.
        per: of such a metric: how much of the output makes one unit.
        class_axis: axis of the classes; None is what the end of the graph tells, else a guess that is stated.
        units: of outputs that are scored beside each other; those in none have `unit` and `per`.

    Raises:
        InputError: an unknown metric, a unit that is not above zero, or perplexity without labels.
    """

    metric: str = "cosine"
    labels: str = ""
    output: str = ""
    unit: str = ""
    per: float = 1.0
    class_axis: int | None = None
    units: dict[str, Unit] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate; perplexity is of the next token unless there are labels."""
        choose(self.metric, tuple(METRICS), "metric")
        if not (math.isfinite(self.per) and self.per > 0):
            raise InputError(
                f"per is {self.per!r}: it must be a number above 0, such as 0.00159362 Hartree in a kcal/mol."
            )
        if not METRICS[self.metric].has_unit and (self.unit or self.units or self.per != 1.0):
            having = " and ".join(name for name, found in METRICS.items() if found.has_unit)
            raise InputError(f"--unit and --per belong to the metric {having}, but the metric is {self.metric}.")
        if METRICS[self.metric].needs_labels and not self.labels:
            msgspec.structs.force_setattr(self, "labels", NEXT)

    @property
    def array(self) -> str:
        """The name of the label array; '' without one."""
        return "" if self.labels.partition(":")[0] == NEXT else self.labels

    @property
    def of_each(self) -> bool:
        """Whether every output is scored, the worst of which counts."""
        return bool(METRICS[self.metric].of_each) and not self.output and not self.labels

    def unit_of(self, output: str) -> Unit:
        """In which unit the value of an output is told."""
        return self.units.get(output) or Unit(name=self.unit, scale=1 / self.per)

    @property
    def title(self) -> str:
        """For the head of a column."""
        against = "" if self.labels else " to float"
        return f"{self.metric}{against}{', ' + self.unit if self.unit and not self.units else ''}"

    def source(self, model: Model) -> str:
        """The input whose next tokens are the labels: `input_ids`, or the only one of integers; '' where none are.

        Raises:
            InputError: no such input, or several to choose from.
        """
        kind, _, name = self.labels.partition(":")
        if kind != NEXT:
            return ""
        tokens = [i.name for i in model.inputs if np.dtype(i.dtype).kind in "iu"]
        if name:
            return choose(name, tokens, "integer input")
        if TOKENS in tokens:  # beside a mask, types or positions
            return TOKENS
        if len(tokens) != 1:
            raise InputError(
                f"The next token is of the only integer input, but the model has {len(tokens)}"
                f"{': ' + ', '.join(tokens) if tokens else ''}. Give --labels next:INPUT, or the name of an array of "
                "labels in the evaluation samples."
            )
        return tokens[0]
