"""The choice between forms of a model by their measured times, where a GPU is here.

Tuned, as predicted -> FP32, FP16, quantized everywhere and the best variants of the search -> built and timed by a
`Bench` -> the fastest that keeps Q/DQ with reason, else the fastest in float -> Tuned, with its `Timings`
What is shipped is calibrated after that: `as_built` times it again. Must not build or time anything itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from engines.core.documents import replace
from qdq.build.cost import CostModel, Price
from qdq.build.measured.bench import LEAST_GAIN, Bench, Run
from qdq.build.measured.forms import AS_BUILT, WORST, TimedForm, Timings, paired
from qdq.core.errors import MissingRuntimeError
from qdq.core.progress import Progress
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.tune.decision import decided
from qdq.tune.give_back import POOR_DB
from qdq.tune.tuned import Tuned
from qdq.tune.variant_builder import Variant, VariantBuilder

LISTED = 4  # variants of the search that are built, beside the two float types and everything quantized
FLOATS = ("fp16", "fp32")


def measured(
    found: Tuned,
    builder: VariantBuilder,
    judge: CostModel,
    bench: Bench,
    *,
    placement: bool = True,
    keeps: Callable[[Plan], bool] | None = None,
    on_progress: Progress | None = None,
) -> Tuned:
    """What is measured fastest of a search's forms; `found`, with a remark, where nothing could be measured.

    Args:
        found: the outcome by predicted times; of its `listed` variants those to build.
        judge: as of the search: says what is predicted of the forms.
        placement: whether leaving all in float is a choice; else the float forms are for comparison.
        keeps: whether a plan, calibrated, keeps the bound on accuracy; None where there is none. Then of the quantized
            variants those that are not `listed` are for comparison.

    Raises:
        MissingRuntimeError: the recipe asks for measured times, and nothing could be measured.
    """
    variants = _forms(found, builder)
    prices = {name: judge.many([builder.model_of(variant)])[0] for name, variant in variants.items()}
    runs, together = bench.runs({n: partial(builder.model_of, v) for n, v in variants.items()}, on_progress=on_progress)
    forms = tuple(_form(name, runs[name], prices[name], variants[name], builder, found, bench) for name in variants)
    timed = {name: run for name, run in runs.items() if run.timing is not None}
    listed = _listed(found, builder)
    taken = {name for name, v in variants.items() if v in listed or (v == found.everywhere and keeps is None)}
    floats = [name for name in timed if name in taken and not variants[name].quantized]
    quantized = [name for name in timed if name in taken and variants[name].quantized]
    base = _first(floats, timed, lambda name: _plainness(variants[name], builder, floats))
    if placement:
        quantized = [name for name in quantized if not base or timed[name].pays_on(timed[base])]
    order = _ordered(quantized, timed, variants) + ([base] if base and placement else [])

    def kept(name: str) -> bool:
        variant = variants[name]
        if keeps is None or not variant.quantized or variant == found.variant:
            return True
        return keeps(builder.plan_of(variant, ""))

    chosen = next(filter(kept, order), "")
    if not chosen:
        return _nothing(found, forms, bench)
    timings = Timings(least_gain=LEAST_GAIN, together=together, chosen=chosen, unquantized=base, forms=forms)
    best, floating = variants[chosen], variants.get(base, found.floating)
    beyond = [name for name in timed if name not in taken and variants[name].quantized and _faster(name, chosen, timed)]
    reason = _reason(timings, timed, found.operands, [*order[: order.index(chosen)], *beyond])
    why = f"{found.operands} does not pay here: {reason}"
    asked = {floating: found.unquantized_price, found.variant: found.price}
    asked |= {variant: prices[name] for name, variant in variants.items()}
    return replace(
        found,
        variant=best,
        plan=builder.plan_of(best, why),
        price=asked[best],
        unquantized=builder.plan_of(floating, why),
        unquantized_price=asked[floating],
        floating=floating,
        decision=decided(asked, best, floating, accurate=lambda v: True, placement=placement),
        measured=timings,
        reference=timed.get(base),
        remarks=(reason, *timings.left_out),
    )


def as_built(found: Tuned, model: Model, price: Price, bench: Bench) -> tuple[Tuned, bool]:
    """A measured outcome with the calibrated model timed too, and whether quantizing it pays as measured.

    Args:
        found: of `measured`.
        model: by its plan, as it is shipped.
        price: of that.
    """
    timings = found.measured
    assert timings is not None
    beside = {timings.unquantized: found.reference} if found.reference is not None and found.plan.points else {}
    runs, _ = bench.runs({AS_BUILT: lambda: model}, beside=beside)
    built, against, before = runs[AS_BUILT], runs.get(timings.unquantized), timings.form(timings.chosen)
    form = replace(before, name=AS_BUILT, predicted_us=_finite(price.us), **_results(built, price))
    said = [f"the model as built was not timed: {built.why}"] if built.why else []
    gains = against is None or built.pays_on(against)
    if not gains and against is not None and not built.why:
        said.append(f"as built it takes {built.us:.1f} us, {against.us:.1f} in float")
    timings = replace(timings, forms=(*timings.forms, form))
    return replace(found, measured=timings, remarks=(*found.remarks, *said)), gains


def _listed(found: Tuned, builder: VariantBuilder) -> tuple[Variant, ...]:
    """The variants that may be taken; of a search that lists none its choice and the plain float types."""
    plain = [Variant(unquantized_type=kind) for kind in ("", *builder.unquantized_types[1:])]
    return found.listed or (found.variant, *plain, found.floating)


def _forms(found: Tuned, builder: VariantBuilder) -> dict[str, Variant]:
    """Name -> variant, each once; what is least needed comes last."""
    usual, *others = builder.unquantized_types
    types = dict.fromkeys((usual, *others, *FLOATS))
    named = [(kind.upper(), Variant(unquantized_type="" if kind == usual else kind)) for kind in types]
    listed = [v for v in _listed(found, builder) if v.quantized]
    named += [(f"{found.operands}, choice {i}", variant) for i, variant in enumerate(listed, 1)]
    named += [(f"{found.operands} everywhere", found.everywhere), ("float, rewritten", found.floating)]
    forms: dict[Variant, str] = {}
    for name, variant in named:
        forms.setdefault(variant, name)
    return {name: variant for variant, name in forms.items()}


def _form(
    name: str, run: Run, price: Price, variant: Variant, builder: VariantBuilder, found: Tuned, bench: Bench
) -> TimedForm:
    return TimedForm(
        model=builder.model.sha256,
        gpu=bench.card.name,
        target=bench.card.target,
        compiler=bench.compiler,
        version=bench.version,
        name=name,
        operands=found.operands,
        quantized_nodes=len(variant.quantized.intersection(builder.quantizable(variant))),
        unquantized_type=variant.unquantized_type or builder.unquantized_types[0],
        predicted_us=_finite(price.us),
        **_results(run, price),
    )


def _results(run: Run, price: Price) -> dict[str, Any]:
    """The fields of a form that say how it ran."""
    if run.timing is None or run.engine is None:
        return {"measured_us": None, "spread_us": None, "intervals": 0, "why": run.why, "kernels": (), "unpaired": 0}
    kernels, unpaired = paired(run.kernels, run.engine.table, price.kernels)
    return {
        "measured_us": run.timing.median_us,
        "spread_us": run.timing.spread_us,
        "intervals": len(run.timing.us),
        "graph": run.timing.graph,
        "why": "",
        "kernels": kernels[:WORST],
        "unpaired": unpaired,
    }


def _first(names: Sequence[str], timed: Mapping[str, Run], plainness: Callable[[str], Any]) -> str:
    """The fastest; of those that cannot be told from it, the plainest; '' of none."""
    if not names:
        return ""
    fastest = min(names, key=lambda name: timed[name].us)
    return min((name for name in names if timed[name].ties(timed[fastest])), key=plainness)


def _ordered(names: Sequence[str], timed: Mapping[str, Run], variants: Mapping[str, Variant]) -> list[str]:
    """The fastest first; of those that cannot be told from it, that with the fewest quantized nodes."""
    left, found = list(names), list[str]()
    while left:
        found.append(_first(left, timed, lambda name: len(variants[name].quantized)))
        left.remove(found[-1])
    return found


def _plainness(variant: Variant, builder: VariantBuilder, floats: Sequence[str]) -> tuple[bool, bool, int]:
    """What comes first of float forms as fast: outputs that are not poor, the usual type, few rewrites."""
    exact = builder.rounding_db(Variant(unquantized_type=variant.unquantized_type)) if len(floats) > 1 else None
    return exact is not None and exact < POOR_DB, bool(variant.unquantized_type), len(variant.rewrites)


def _reason(timings: Timings, timed: Mapping[str, Run], operands: str, inaccurate: Sequence[str]) -> str:
    """Why a form was taken, by its time and those of the others."""
    base, chosen = timings.unquantized, timings.chosen
    head, need = timings.label, f"{timings.least_gain:.0%} and the spread"
    lost = f"; {', '.join(inaccurate)} cost more accuracy than the bound allows" if inaccurate else ""
    quantized = [form.name for form in timings.forms if form.name in timed and form.quantized_nodes]
    best = chosen if chosen != base else min(quantized, key=lambda name: timed[name].us, default="")
    if not base or not best:
        return f"{head}: {chosen} takes {timed[chosen]}, and nothing {operands if base else 'in float'} ran{lost}"
    gain = 1 - timed[best].us / timed[base].us
    times = f"{best} takes {timed[best]}, {base} {timed[base]}"
    what = f"gains {gain:.1%}" if gain >= 0 else f"loses {-gain:.1%}"
    enough = timed[best].pays_on(timed[base])
    verdict = "so nothing is quantized" if not enough else "but nothing is quantized"
    if chosen != base:
        verdict = "so it is taken" if enough else "and it is taken all the same, as was asked"
    return f"{head}: {times}; it {what}, where {need} are needed, {verdict}{lost}"


def _faster(name: str, other: str, timed: Mapping[str, Run]) -> bool:
    return timed[name].us < timed[other].us


def _nothing(found: Tuned, forms: Sequence[TimedForm], bench: Bench) -> Tuned:
    """The predicted choice, with what could not be measured.

    Raises:
        MissingRuntimeError: the recipe asks for measured times.
    """
    first = next((form for form in forms if form.why), forms[0])
    said = (
        f"no form that may be taken could be measured on {bench.card.name}: {first.name}: {first.why or 'it may not'}"
    )
    if bench.recipe.judge == "measured":
        raise MissingRuntimeError(f"{said}. Let times be predicted (--judge predicted).")
    return replace(found, remarks=(f"times are predicted, though a GPU is here: {said}",))


def _finite(us: float) -> float | None:
    return us if math.isfinite(us) else None
