"""What a comparison scores: a metric, its unit, and labels beside the samples. Must not run a model."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from engines.core.documents import Part, replace
from engines.verify.report import Unit
from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import METRICS
from qdq.model.model import Model

NEXT, MASKED = "next", "masked"  # labels that the tokens of an input themselves are
TOKENS = "input_ids"  # what a language model calls the words that it reads


class Masking(Part, frozen=True, kw_only=True):
    """How tokens are masked for a masked language model.

    Attributes:
        token: id that stands for a masked token.
        special: ids that are never masked, such as those of begin, end and padding.
        share: of the tokens of a sequence that are masked at once; None masks one at a time.

    Raises:
        InputError: an id below 0, or a share that is none.
    """

    token: int
    special: tuple[int, ...] = ()
    share: float | None = None

    def __post_init__(self) -> None:
        """Validate."""
        if (least := min((self.token, *self.special))) < 0:
            raise InputError(
                f"A token is {least}: --mask-token and --special-tokens are ids of the tokenizer, 0 or more."
            )
        if self.share is not None and not 0 < self.share < 1:
            raise InputError(f"The share of tokens masked at once is {self.share:g}: it must be between 0 and 1.")


class Task(Part, frozen=True, kw_only=True):
    """What is measured of an output.

    Attributes:
        metric: a name in `METRICS`.
        labels: the array of the evaluation samples that holds the truth; 'next' or 'next:INPUT' for the tokens that
            follow those of an integer input; 'masked' or 'masked:INPUT' for its tokens where they are masked; '' to
            compare with the float model.
        output: name of the output; '' for the first, or for each where the metric is told of each and there are no
            labels.
        unit: of a metric that has one, for reports.
        per: of such a metric: how much of the output makes one unit.
        class_axis: axis of the classes; None is what the end of the graph tells, else a guess that is stated.
        units: of outputs that are scored beside each other; those in none have `unit` and `per`.
        masking: of a metric of masked tokens; None for any other.

    Raises:
        InputError: an unknown metric, a unit that is not above zero, or tokens masked without need or not at all.
    """

    metric: str = "cosine"
    labels: str = ""
    output: str = ""
    unit: str = ""
    per: float = 1.0
    class_axis: int | None = None
    units: dict[str, Unit] = msgspec.field(default_factory=dict)
    masking: Masking | None = None

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
        if METRICS[self.metric].needs_labels and not METRICS[self.metric].masks and not self.labels:
            msgspec.structs.force_setattr(self, "labels", NEXT)
        self._check_masking()

    def _check_masking(self) -> None:
        """A metric of masked tokens has its labels, its mask token and a share that it can be told at."""
        kind, set_field = METRICS[self.metric], msgspec.structs.force_setattr
        if not kind.masks:
            if self.masking is not None or self.kind == MASKED:
                having = ", ".join(name for name, found in METRICS.items() if found.masks)
                raise InputError(f"Tokens are masked for the metrics {having}, but the metric is {self.metric}.")
            return
        if not self.labels:
            set_field(self, "labels", MASKED)
        if self.kind != MASKED:
            raise InputError(
                f"{self.metric} masks the tokens of an input, which are its labels: leave out --labels or give "
                "masked:INPUT. For samples that hold masked tokens and their labels use top1 or perplexity."
            )
        if self.masking is None:
            raise InputError(
                f"{self.metric} needs --mask-token, the id of the tokenizer's mask, and --special-tokens, the ids that "
                "are never masked, such as those of begin and end."
            )
        if kind.one_at_a_time and self.masking.share is not None:
            raise InputError(f"{self.metric} masks one token at a time: leave out --mask-share.")
        if self.masking.share is None and kind.usual_share is not None:
            set_field(self, "masking", replace(self.masking, share=kind.usual_share))

    @property
    def kind(self) -> str:
        """NEXT, MASKED, or '' for labels that no tokens are."""
        first = self.labels.partition(":")[0]
        return first if first in (NEXT, MASKED) else ""

    @property
    def array(self) -> str:
        """The name of the label array; '' without one."""
        return "" if self.kind else self.labels

    @property
    def at_once(self) -> str:
        """How many tokens of a sequence are masked at a time, in words."""
        return (
            "one of a sequence" if self.masking is None or self.masking.share is None else f"{self.masking.share:.0%}"
        )

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
        """The input whose tokens are the labels: `input_ids`, or the only one of integers; '' where none are.

        Raises:
            InputError: no such input, or several to choose from.
        """
        if not self.kind:
            return ""
        name = self.labels.partition(":")[2]
        tokens = [i.name for i in model.inputs if np.dtype(i.dtype).kind in "iu"]
        if name:
            return choose(name, tokens, "integer input")
        if TOKENS in tokens:  # beside a mask, types or positions
            return TOKENS
        if len(tokens) != 1:
            raise InputError(
                f"The {self.kind} token is of the only integer input, but the model has {len(tokens)}"
                f"{': ' + ', '.join(tokens) if tokens else ''}. Give --labels {self.kind}:INPUT"
                + (", or the name of an array of labels in the evaluation samples." if self.kind == NEXT else ".")
            )
        return tokens[0]
