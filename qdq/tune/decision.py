"""How sure the choice of a search is: a tie, within the error of a prediction, another under another assumption.

prices asked for, the variant chosen, the fastest in float -> `Decision` -> sentences. It must not choose.

What is compared is two forms of one network on one GPU. Most of the error of a predicted time is in both of them alike
and falls out of their ratio, so the difference is held against the expected error of such ratios, which is smaller.
Where that is not known, the error of one time stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from engines.core.documents import Part, replace
from qdq.build.cost import Price, PricedGpu
from qdq.tune.variant_builder import Variant

Verdict = Literal["tie", "within the error", "beyond the error", "error unknown", "nothing to compare"]
MOST_TRIED = 8  # of the fastest variants, for one that keeps the bound
ACCUMULATIONS = {"float16": "FP16", "float32": "FP32"}


class OtherAnswer(Part, frozen=True, kw_only=True):
    """The answer if FP16 products accumulate in the other type than is assumed; of the variants looked at.

    Attributes:
        chosen_us: predicted microseconds of the variant that was chosen.
        unquantized_us: of the fastest with nothing quantized.
        best_us: of the one that would be chosen.
        quantized_nodes: how many that one has.
        changes: it is another one by more than a tie, or INT8 pays under one assumption only.
    """

    chosen_us: float
    unquantized_us: float
    best_us: float
    quantized_nodes: int
    changes: bool


class Decision(Part, frozen=True, kw_only=True):
    """Quantized against float, as predicted.

    Attributes:
        verdict: what the difference is.
        chosen: that some nodes are quantized in what was chosen.
        quantized_us: microseconds of what was chosen if it is quantized, else of the fastest quantized variant that was
            looked at; None if there is none.
        unquantized_us: of the fastest variant with nothing quantized; None if none compiles.
        error: relative error that two of three predicted ratios of two forms of one network keep to; None where it is
            not known.
        time_error: the same of one predicted time.
        other: the answer under the other assumption on FP16 products; None where there is no other.
    """

    verdict: Verdict
    chosen: bool
    quantized_us: float | None
    unquantized_us: float | None
    error: float | None
    time_error: float | None
    other: OtherAnswer | None

    @property
    def slower(self) -> bool:
        """Whether the quantized form is predicted slower than float by more than a tie."""
        known = self.quantized_us is not None and self.unquantized_us is not None
        return known and self.verdict != "tie" and (self.quantized_us or 0.0) > (self.unquantized_us or 0.0)

    def sentences(self, operands: str, gpus: Sequence[PricedGpu]) -> list[str]:
        """What a person must know of it; `operands` as INT8, times predicted for the GPUs."""
        said_of = dict.fromkeys(said for gpu in gpus for said in gpu.notes)  # each once
        notes = [said for said in said_of if not said.startswith("FP16")]  # that is said below
        return [said for said in (self._comparison(operands), *notes, self._assumption(operands, gpus)) if said]

    def left_in_float(self, built: Price, plain: Price) -> Decision:
        """The same where float was taken after all, for what was built with quantized nodes gains nothing on it."""
        other = self.other
        if other is not None:
            other = replace(other, chosen_us=other.unquantized_us, changes=bool(other.quantized_nodes))
        verdict, quantized_us = _verdict(built, plain, self.error), _finite(built.us)
        return replace(self, verdict=verdict, chosen=False, quantized_us=quantized_us, other=other)

    def _comparison(self, operands: str) -> str:
        if self.quantized_us is None or self.unquantized_us is None:
            return ""
        pair = f"({self.quantized_us:.1f} us, {self.unquantized_us:.1f} in float)"
        if self.verdict == "tie":
            left = "quantized all the same, as was asked" if self.chosen else "left in float, which is more exact"
            return f"{operands} is predicted to gain nothing {pair}, so the model is {left}"
        form = operands if self.chosen else f"the fastest form with {operands}"
        known = "" if self.error is None else f"two of three published ratios are predicted within {self.error:.0%}"
        if self.verdict == "within the error":
            return (
                f"whether {form} is faster than float {pair} only a measurement can tell: the difference is within the "
                f"error, for {known}"
            )
        change = self.quantized_us / self.unquantized_us - 1
        head = f"{form} is predicted {abs(change):.0%} {'slower' if change > 0 else 'faster'} than float {pair}"
        if self.verdict == "error unknown":
            return f"{head}; how far off such predictions are is not known"
        return f"{head}, which is more than the error: {known}"

    def _assumption(self, operands: str, gpus: Sequence[PricedGpu]) -> str:
        if self.other is None:
            return ""
        names = [gpu.name for gpu in gpus if gpu.other_accumulation()]
        first = next(gpu for gpu in gpus if gpu.other_accumulation())
        other = next(kind for kind in ACCUMULATIONS if kind != first.accumulation)
        assumed = f"{ACCUMULATIONS[first.accumulation]} on {', '.join(names)}"
        head = f"FP16 products are assumed to accumulate in {assumed}; if in {ACCUMULATIONS[other]}"
        floats = f"{self.other.unquantized_us:.1f} in float"
        if not self.other.changes:
            return f"{head}, the choice is the same (predicted {self.other.chosen_us:.1f} us, {floats})"
        nodes = self.other.quantized_nodes
        some = f"{nodes} node{'s' * (nodes > 1)} in {operands}, predicted {self.other.best_us:.1f} us"
        best = some if nodes else f"nothing in {operands}"
        return (
            f"{head}, another choice is better: {best}; what was chosen is predicted to take "
            f"{self.other.chosen_us:.1f} us, {floats}. A recipe with "
            f"`gpu: [{{like: {first.name}, accumulation: {other}}}]` assumes that"
        )


def decided(
    asked: Mapping[Variant, Price],
    best: Variant,
    floating: Variant,
    *,
    accurate: Callable[[Variant], bool],
    placement: bool,
) -> Decision:
    """How sure it is that `best` beats the other side.

    Args:
        asked: every variant looked at.
        floating: the one that stands for nothing quantized.
        accurate: whether a variant keeps the bound on accuracy.
        placement: whether float was a choice.
    """
    price, plain = asked[best], asked[floating]
    error = price.error if price.ratio_error is None else price.ratio_error
    other = _other_answer(asked, best, accurate, placement=placement) if price.other else None
    fastest = [v for v, p in sorted(asked.items(), key=lambda item: item[1].us) if v.quantized and math.isfinite(p.us)]
    found = best if best.quantized else next(filter(accurate, fastest[:MOST_TRIED]), None)
    quantized = None if found is None else asked[found]
    return Decision(
        verdict=_verdict(quantized, plain, error),
        chosen=bool(best.quantized),
        quantized_us=None if quantized is None else _finite(quantized.us),
        unquantized_us=_finite(plain.us),
        error=error,
        time_error=price.error,
        other=other,
    )


def _verdict(quantized: Price | None, plain: Price, error: float | None) -> Verdict:
    if quantized is None or math.isinf(quantized.us + plain.us):
        return "nothing to compare"
    if quantized.ties(plain):
        return "tie"
    if error is None:
        return "error unknown"
    return "beyond the error" if abs(quantized.us / plain.us - 1) > error else "within the error"


def _other_answer(
    asked: Mapping[Variant, Price], best: Variant, accurate: Callable[[Variant], bool], *, placement: bool
) -> OtherAnswer | None:
    """What would be chosen of the variants looked at under the other assumption; a tie is no reason to quantize."""
    others = {v: p.other for v, p in asked.items() if p.other and math.isfinite(p.other.us)}
    order = sorted(others, key=lambda v: others[v].us)
    floats = [v for v in order if not v.quantized]
    floating = _first(filter(accurate, floats)) or _first(floats)
    if floating is None:
        return None
    found = _first(filter(accurate, [v for v in order if v.quantized][:MOST_TRIED])) or best
    if placement and not others[found].gains_on(others[floating]):
        found = floating
    better = others[found].gains_on(others[best])
    return OtherAnswer(
        chosen_us=others[best].us,
        unquantized_us=others[floating].us,
        best_us=others[found].us,
        quantized_nodes=len(found.quantized),
        changes=better or bool(found.quantized) != bool(best.quantized),
    )


def _first(variants: Iterable[Variant]) -> Variant | None:
    return next(iter(variants), None)


def _finite(us: float) -> float | None:
    return us if math.isfinite(us) else None
