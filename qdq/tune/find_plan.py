"""A tuned plan: quick ranges, the search, and the accuracy that an error bound is verified by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypedDict

from calib_data import Samples
from qdq.assemble.held_out import ranked
from qdq.build.cost import Price
from qdq.build.measured.bench import Bench
from qdq.build.pricing.tensorrt_pricer import AnyPricer, TensorRtPricer
from qdq.core.disk.cache import remembered
from qdq.core.progress import Progress
from qdq.measure.inference.inputs import as_samples
from qdq.measure.inference.kept import seen
from qdq.measure.inference.samples import Sample
from qdq.model.as_bytes import identity
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.tune.exact.search import tune_exactly
from qdq.tune.measured.accuracy import Accuracy
from qdq.tune.measured.times import LISTED, measured
from qdq.tune.prices import SECONDS, Budget
from qdq.tune.search import RESERVE_DB, tune
from qdq.tune.tuned import Tuned
from qdq.tune.variant_builder import VariantBuilder

FEW = 2  # samples that give the quick ranges and the accuracy of variants
EITHER = ("fp16", "fp32")  # of what is not quantized if nobody says, the usual one first


class Wanted(TypedDict):
    """What both kinds of search take; as of `tune`."""

    placement: bool
    min_sqnr_db: float
    measure: Callable[[Plan], float] | None
    budget: Budget
    listed: int
    on_progress: Progress | None


def find_plan(
    prepared: Model,
    pricer: AnyPricer,
    *,
    samples: Iterable[Sample] | None,
    bench: Bench | None = None,
    on_progress: Progress | None = None,
) -> Tuned:
    """The plan with the least predicted time; of those that tie, a more exact one.

    Args:
        pricer: of the recipe (`pricer_of`), whose settings, float type and limits of the search count, and with
            samples, where placement is tuned, `min_sqnr_db`.
        samples: re-iterable; a few are used for quick ranges (independent of order); an accuracy bound is verified
            on all. None assumes that every activation is asymmetric, the most expensive case.
        bench: a GPU whose measured times decide between the best of what was found; None: predicted ones do.

    Raises:
        BuildError: no way to write the model compiles.
    """
    checked = None if samples is None else as_samples(samples, prepared)
    if bench is not None:  # what a GPU shows is never kept
        return _found(prepared, pricer, checked, bench, on_progress)
    return remembered(
        "tuned",
        lambda: (*identity(prepared), *_decided_by(pricer), *seen(checked)),
        lambda: _found(prepared, pricer, checked, None, on_progress),
        pack=lambda tuned: None if tuned.ended == SECONDS else {"tuned": tuned.packed()},
        unpack=lambda parts: Tuned.unpacked(parts["tuned"]),
    )


def _decided_by(pricer: AnyPricer) -> tuple[object, ...]:
    """What a search depends on, but for the model and the samples."""
    recipe = pricer.recipe
    own = (recipe.unquantized_type, recipe.tune, recipe.tune_compiles, recipe.time_limit_s, recipe.targets)
    bound, shapes = recipe.limits.get("min_sqnr_db"), sorted((n, repr(s)) for n, s in pricer.shapes.items())
    return (recipe.settings.to_mapping(), recipe.backend, *own, bound, shapes, *pricer.gpus)


def _found(
    prepared: Model, pricer: AnyPricer, samples: Samples | None, bench: Bench | None, on_progress: Progress | None
) -> Tuned:
    recipe = pricer.recipe
    few = None if samples is None else _few(samples)
    unquantized_types = EITHER if recipe.unquantized_type == "auto" else (recipe.unquantized_type,)
    builder = VariantBuilder(model=prepared, settings=recipe.settings, unquantized_types=unquantized_types, samples=few)
    measure = None
    if samples is not None:
        measure = Accuracy(prepared, samples, recipe.settings, unquantized_type=recipe.unquantized_type)
    wanted: Wanted = {
        "placement": recipe.tune == "placement",
        "min_sqnr_db": recipe.limits.get("min_sqnr_db", -math.inf),
        "measure": measure,
        "budget": Budget(compiles=recipe.tune_compiles, seconds=recipe.time_limit_s),
        "listed": LISTED if bench else 0,
        "on_progress": on_progress,
    }
    with pricer.parallel():
        if isinstance(pricer, TensorRtPricer):
            found = tune_exactly(builder, pricer, **wanted, switches=measure.switches if measure else None)
        else:
            found = tune(builder, pricer, **wanted)
    if bench is not None:
        bound_db, placement = wanted["min_sqnr_db"], wanted["placement"]
        bounded = placement and bound_db > -math.inf
        keeps = (lambda plan: measure(plan) >= bound_db + RESERVE_DB) if measure and bounded else None
        found = measured(found, builder, pricer, bench, placement=placement, keeps=keeps, on_progress=on_progress)
    if math.isinf(found.price.us) and found.measured is None:
        raise pricer.refusal(prepared)
    return found


def difference(found: Tuned, built: Price) -> str:
    """What it costs that other kernels were built than were tuned, in a sentence; "" where it costs less than a tie."""
    if not found.price.gains_on(built):
        return ""
    wanted, got = (Counter(k.signature for k in price.kernels) for price in (found.price, built))
    lost, new = list((wanted - got).elements()), list((got - wanted).elements())
    first = f"; the first: {(new or lost)[0]}" if new or lost else ""
    return (
        f"as built the model is predicted to take {built.us:.1f} us, {built.us - found.price.us:.1f} more than when it "
        f"was tuned: {len(new)} of {len(built.kernels)} kernels are others{first}"
    )


def _few(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """A choice of samples, and an order of them, that the order of all does not matter for."""
    chosen = ranked(samples)[:FEW]
    by_index = {index: sample for index, sample in enumerate(samples) if index in chosen}
    return tuple(by_index[index] for index in chosen)
