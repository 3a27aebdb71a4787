"""What the search found: the variant, its price, and the steps to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qdq.build.cost import Price
from qdq.plan.plan import Plan
from qdq.tune.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The outcome.

    Attributes:
        variant: the best.
        plan: of the variant, with its rewrites; every node left in float for the price's sake says so.
        unquantized: the plan of the fastest variant known with nothing quantized.
        unquantized_us: what it is predicted to take.
        operands: what quantized nodes would hold and read, as `Plan.operands` says it.
        price: of the variant.
        plain: predicted microseconds of the model in its float type, nothing quantized or rewritten.
        untuned: of everything quantized that the rules want, weight scales hoisted if that is better.
        tried: how many variants were compiled.
        complete: False if the time limit ended the search.
        steps: what was kept, one line each.
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
        quantized = f"{count} nodes in {self.operands}" if count else f"{self.operands} does not pay anywhere"
        return f"{quantized}; rewrites: {rewrites or 'none'}; {self.tried} variants compiled" + (
            "" if self.complete else ", until the time limit"
        )

    @property
    def times(self) -> str:
        """The predicted times, for a person."""
        most = f"{self.untuned:.1f} with {self.operands} wherever it is possible"
        return f"{self.price.us:.1f} us; {self.plain:.1f} without quantization, {most}"

    def to_mapping(self) -> dict[str, object]:
        """What a report says, as plain values; a time is None where nothing compiles."""
        times = {"predicted_us": self.price.us, "unquantized_us": self.plain, "untuned_us": self.untuned}
        return {
            **{key: us if math.isfinite(us) else None for key, us in times.items()},
            "quantized_nodes": len(self.plan.quantized_nodes),
            "rewrites": {r.name: list(r.nodes) for r in self.plan.rewrites},
            "variants": self.tried,
            "complete": self.complete,
            "steps": list(self.steps),
        }
