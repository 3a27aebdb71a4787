"""The last passes over a Q/DQ model before it is compiled: the float type of the rest, and rewrites that pay.

Q/DQ model -> variants (as it is typed; with each rewrite of `qdq.surgery`'s quantized stage) -> a judge -> the best.
It must not compile anything itself: the judge does, and what it says is what is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from qdq.calibrate import CalibrationTable
from qdq.graph import Model
from qdq.precision import convert
from qdq.surgery import QUANTIZED_REWRITES

Judge = Callable[[Model], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The model to build, and what was done to it, one sentence each."""

    model: Model
    notes: tuple[str, ...]


def finish(model: Model, *, rest: str, table: CalibrationTable | None, judge: Judge) -> Finished:
    """Choose the float type of everything unquantized, and keep a rewrite only if its compiled result is better.

    Args:
        model: with Q/DQ, all float tensors float32.
        rest: 'fp16', 'bf16' or 'fp32'.
        table: calibrated ranges; tensors that could overflow stay FP32.
        judge: compiles a model and says its price; less is better.

    Returns:
        The best model. With 'fp32' it is the one given.
    """
    if rest == "fp32":
        return Finished(model=model, notes=())
    converted = convert(model, rest=rest, table=table)
    notes = []
    if converted.kept:
        rules = Counter(skip.rule for skip in converted.kept)
        why = ", ".join(f"{count} by rule {rule!r}" for rule, count in sorted(rules.items()))
        notes.append(f"{len(converted.kept)} nodes stay FP32: {why}")
    best, price = converted.model, None
    for name, rewrite in QUANTIZED_REWRITES.items():
        rewritten = rewrite(best)
        if not rewritten.fired:
            continue
        price = judge(best) if price is None else price
        candidate = judge(rewritten.model)
        if candidate < price:
            notes.append(f"rewrite {name!r} on {len(rewritten.fired)} nodes: price {candidate / price:.2f} of before")
            best, price = rewritten.model, candidate
    return Finished(model=best, notes=tuple(notes))
