"""What the search found: the variant, its price, and the steps to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from engines.core.documents import Document
from qdq.build.cost import Price
from qdq.plan.plan import Plan
from qdq.tune.variant import Variant


class TuningOutcome(Document, frozen=True, kw_only=True):
    """What a report says of the search; a time is None where nothing compiles.

    Attributes:
        gpus: that times are predicted for.
        predicted_us: microseconds of what was chosen.
        unquantized_us: of the model with nothing quantized or rewritten.
        untuned_us: of everything quantized that the rules want.
        operands: what quantized nodes hold and read.
        quantized_nodes: how many.
        rewrites: rewrite -> nodes.
        variants: how many were compiled.
        complete: False if the time limit ended the search.
        steps: what was kept, one line each.
    """

    FORMAT: ClassVar[str] = "qdq.tuning/2"
    MAKE: ClassVar[str] = "qdq tune --json"

    gpus: tuple[str, ...]
    predicted_us: float | None
    unquantized_us: float | None
    untuned_us: float | None
    operands: str
    quantized_nodes: int
    rewrites: dict[str, tuple[str, ...]]
    variants: int
    complete: bool
    steps: tuple[str, ...]

    @property
    def times(self) -> str:
        """The predicted times, for a person."""
        found = (self.predicted_us, self.unquantized_us, self.untuned_us)
        chosen, plain, most = ("nothing compiles" if us is None else f"{us:.1f}" for us in found)
        return f"{chosen} us; {plain} without quantization, {most} with {self.operands} wherever it is possible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The outcome; `operands`, `complete` and `steps` as in `TuningOutcome`.

    Attributes:
        plan: of the variant, with its rewrites; every node left in float for the price's sake says so.
        unquantized: the plan of the fastest variant known with nothing quantized.
        unquantized_us: what it is predicted to take.
        price: of the variant.
        plain: predicted microseconds of the model in its float type, nothing quantized or rewritten.
        untuned: of everything quantized that the rules want, weight scales hoisted if that is better.
        tried: how many variants were compiled.
    """

    variant: Variant
    plan: Plan
    unquantized: Plan
    unquantized_us: float
    operands: str
    price: Price
    plain: float
    untuned: float
    tried: int
    complete: bool
    steps: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One sentence for a person."""
        count, rewrites = len(self.plan.quantized_nodes), ", ".join(sorted({r.name for r in self.plan.rewrites}))
        idle = "does not pay anywhere" if math.isfinite(self.untuned) else "wherever it is possible does not compile"
        quantized = f"{count} nodes in {self.operands}" if count else f"{self.operands} {idle}"
        return f"{quantized}; rewrites: {rewrites or 'none'}; {self.tried} variants compiled" + (
            "" if self.complete else ", until the time limit"
        )

    def outcome(self, gpus: Sequence[str]) -> TuningOutcome:
        """What a report says of it, with times predicted for these GPUs."""
        predicted, plain, untuned = (t if math.isfinite(t) else None for t in (self.price.us, self.plain, self.untuned))
        return TuningOutcome(
            gpus=tuple(gpus),
            predicted_us=predicted,
            unquantized_us=plain,
            untuned_us=untuned,
            operands=self.operands,
            quantized_nodes=len(self.plan.quantized_nodes),
            rewrites={r.name: r.nodes for r in self.plan.rewrites},
            variants=self.tried,
            complete=self.complete,
            steps=self.steps,
        )
