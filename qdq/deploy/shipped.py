"""The Q/DQ model that is shipped, as `deploy` and `compare` build it. Must not compile the result."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from calib_data import Samples
from qdq.assemble.finish import Finished, finish
from qdq.assemble.quantize import Quantized, quantize
from qdq.assemble.tables import Tables
from qdq.build.engine import Provenance
from qdq.build.measured.bench import Bench
from qdq.build.pricing.tensorrt_pricer import AnyPricer
from qdq.build.recipe import Recipe
from qdq.core.progress import Progress
from qdq.model.external import is_external, tensor_bytes
from qdq.model.model import Model
from qdq.model.nodes import all_tensors
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.tune.find_plan import difference, find_plan
from qdq.tune.measured.times import as_built
from qdq.tune.tuned import Tuned


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedModel:
    """A Q/DQ model as it is compiled, how its plan was found (None without tuning), and what to say of that."""

    made: Quantized
    finished: Finished
    tuned: Tuned | None
    notes: tuple[str, ...]


def written(
    prepared: Model,
    calibration: Samples,
    recipe: Recipe,
    *,
    pricer: AnyPricer | None,
    bench: Bench | None = None,
    tables: Tables | None = None,
    on_progress: Progress | None = None,
) -> ShippedModel:
    """The model that a recipe asks for.

    Tuned if a pricer is given. Left in float where what was built is not predicted faster by more than a tie, or with
    a bench not measured faster by what quantizing must gain.

    Args:
        prepared: what `load_float` gave.
        recipe: its settings, float type and tuning count, and where placement is tuned its `min_sqnr_db`.
        bench: as of `find_plan`.
        tables: of these samples, in place of a new calibration where they have what is needed.

    Raises:
        QdqError, EngineError, DataError: see the stages.
    """
    known = tables or Tables(model=prepared, samples=calibration)

    def by(plan: Plan) -> tuple[Quantized, Finished]:
        settings, table = recipe.settings, known.of(plan, on_progress)
        made = quantize(prepared, calibration, settings=settings, plan=plan, table=table, on_progress=on_progress)
        return made, finish(made.model, made.plan, unquantized_type=recipe.unquantized_type, table=made.table)

    if pricer is None:
        made, finished = by(placement.plan(prepared, recipe.settings))
        return ShippedModel(made=made, finished=finished, tuned=None, notes=())
    tuned = find_plan(prepared, pricer, samples=calibration, bench=bench, on_progress=on_progress)
    made, finished = by(tuned.plan)
    built, judged = pricer(finished.model), "predicted"
    gains = built.gains_on(tuned.unquantized_price)
    if bench is not None and tuned.measured is not None:
        judged = "measured"
        tuned, gains = as_built(tuned, finished.model, built, bench)
    notes = [f"tuned: {tuned.summary}", difference(tuned, built)]
    if recipe.tune == "placement" and made.plan.points and not gains:
        made, finished = by(tuned.unquantized)
        tuned = tuned.left_in_float(built)
        notes.append(f"that plan, as built, is not {judged} faster than float, so the model is left in float")
    notes += tuned.said(pricer.told)
    return ShippedModel(made=made, finished=finished, tuned=tuned, notes=tuple(filter(None, notes)))


def file_bytes(model: Model) -> int:
    """Size of a model's file and its external data."""
    return int(model.proto.ByteSize()) + sum(tensor_bytes(t) for t in all_tensors(model.proto) if is_external(t))


def provenance(made: Quantized) -> Provenance:
    """What the manifest of an engine says of the Q/DQ model it was compiled from."""
    return Provenance(
        model=made.prepared.sha256,
        samples=made.table.samples_sha256 or None,
        plan=made.plan.sha256,
        table=hashlib.sha256(made.table.to_json().encode()).hexdigest(),
        settings=made.plan.settings,
    )
