"""The last passes over a Q/DQ model before it is compiled: the float type of its other nodes, and the plan's rewrites.

Q/DQ model -> `precision.convert` -> the rewrites of the quantized stage that the plan names -> the model to build.
It must not decide anything: `tune` did.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qdq.assemble.precision.convert import convert
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.passes.rewrites import rewritten
from qdq.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The model to build, and what was done to it, one sentence each."""

    model: Model
    notes: tuple[str, ...]


def float_type_of(plan: Plan, asked: str) -> str:
    """The float type of what a plan leaves unquantized: 'fp16', 'bf16' or 'fp32'; `asked` may be 'auto'."""
    return asked if asked != "auto" else plan.unquantized_type or "fp16"


def finish(model: Model, plan: Plan, *, unquantized_type: str, table: CalibrationTable | None) -> Finished:
    """Give everything unquantized its float type, and do what the plan says is to be done to the Q/DQ model.

    The model has Q/DQ by that plan and float32 tensors. `unquantized_type` is 'fp16', 'bf16', 'fp32', or 'auto' for the
    plan's; tensors that could overflow by the calibrated ranges of the table stay FP32.
    """
    converted = convert(
        model,
        unquantized_type=float_type_of(plan, unquantized_type),
        split_biases=bool(plan.settings.profile.shift),
        table=table,
        one_scale=frozenset(n for r in plan.rewrites if r.name in ("hoist", "norm_scale") for n in r.nodes),
    )
    rules = Counter(skip.rule for skip in converted.kept)
    why = {
        "shift": "to keep shifted inputs exact",
        "cancelled": "whose bias cancels most of their product",
        "neighbours": "because their neighbours compute in FP32",
    }
    said = ", ".join(f"{count} {why.get(rule, f'by rule {rule!r}')}" for rule, count in sorted(rules.items()))
    notes = [f"{len(converted.kept)} nodes stay FP32: {said}"] if converted.kept else []
    if table is not None and (odd := sorted(table.not_finite)):
        notes.append(f"{len(odd)} tensors of the float model hold infinities or NaN on the samples, {odd[0]!r} for one")
    return Finished(model=rewritten(converted.model, plan.rewrites, stage="quantized"), notes=tuple(notes))
