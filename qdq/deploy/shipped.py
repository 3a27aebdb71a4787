"""The Q/DQ model that is shipped, as `deploy` and `compare` build it. Must not compile the result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from calib_data import Samples
from qdq.assemble.finish import finish
from qdq.assemble.quantize import quantize
from qdq.assemble.tables import Tables
from qdq.build.engine import Provenance
from qdq.build.measured.bench import Bench
from qdq.build.pricing.tensorrt_pricer import AnyPricer
from qdq.build.recipe import Recipe
from qdq.core.disk.cache import remembered
from qdq.core.progress import Progress
from qdq.measure.inference.kept import seen
from qdq.measure.table import CalibrationTable
from qdq.model.as_bytes import identity, packed, unpacked
from qdq.model.external import is_external, tensor_bytes
from qdq.model.model import Model
from qdq.model.nodes import all_tensors
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.tune.find_plan import difference, find_plan
from qdq.tune.measured import as_built
from qdq.tune.tuned import Tuned


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedModel:
    """A Q/DQ model as it is compiled, and what it was made of.

    Attributes:
        model: quantized and finished; of a plan that quantizes nothing, the float model.
        float_sha256: of the user's model.
        plan: as it was carried out.
        table: the calibration.
        tokens: tensors that have one scale per token.
        quantize_notes, finish_notes: what a person should know of both stages.
        tuned: how the plan was found, None without tuning.
        notes: what to say of that.
    """

    model: Model
    float_sha256: str
    plan: Plan
    table: CalibrationTable
    tokens: frozenset[str]
    quantize_notes: tuple[str, ...]
    finish_notes: tuple[str, ...]
    tuned: Tuned | None = None
    notes: tuple[str, ...] = ()


def written(
    prepared: Model,
    calibration: Samples,
    recipe: Recipe,
    *,
    pricer: AnyPricer | None,
    bench: Bench | None = None,
    tables: Tables | None = None,
    plan: Plan | None = None,
    table: CalibrationTable | None = None,
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
        plan: in place of a new one, tuned or not.
        table: of that plan, or of the one that is made without tuning, in place of a calibration.

    Raises:
        QdqError, EngineError, DataError: see the stages.
    """
    known = tables or Tables(model=prepared, samples=calibration)

    def by(plan: Plan) -> ShippedModel:
        held = known.of(plan, on_progress) if table is None else table
        return remembered(
            "quantized",
            lambda: (
                *identity(prepared),
                plan.sha256,
                recipe.settings.to_mapping(),
                recipe.unquantized_type,
                _sha256(held),
                *seen(calibration),
            ),
            lambda: _made(prepared, calibration, recipe, plan, held, on_progress),
            pack=_packed,
            unpack=lambda parts: _unpacked(parts, prepared, held),
        )

    if plan is not None or pricer is None:
        return by(plan or placement.plan(prepared, recipe.settings))
    tuned = find_plan(prepared, pricer, samples=calibration, bench=bench, on_progress=on_progress)
    made = by(tuned.plan)
    built, judged = pricer(made.model), "predicted"
    gains = built.gains_on(tuned.unquantized_price)
    if bench is not None and tuned.measured is not None:
        judged = "measured"
        tuned, gains = as_built(tuned, made.model, built, bench)
    notes = [f"tuned: {tuned.summary}", difference(tuned, built)]
    if recipe.tune == "placement" and made.plan.points and not gains:
        made = by(tuned.unquantized)
        tuned = tuned.left_in_float(built)
        notes.append(f"that plan, as built, is not {judged} faster than float, so the model is left in float")
    notes += tuned.said(pricer.told)
    return replace(made, tuned=tuned, notes=tuple(filter(None, notes)))


def _made(
    prepared: Model,
    calibration: Samples,
    recipe: Recipe,
    plan: Plan,
    table: CalibrationTable,
    on_progress: Progress | None,
) -> ShippedModel:
    settings = recipe.settings
    made = quantize(prepared, calibration, settings=settings, plan=plan, table=table, on_progress=on_progress)
    done = finish(made.model, made.plan, unquantized_type=recipe.unquantized_type, table=made.table)
    return ShippedModel(
        model=done.model,
        float_sha256=made.prepared.sha256,
        plan=made.plan,
        table=made.table,
        tokens=made.solution.tokens,
        quantize_notes=made.solution.notes,
        finish_notes=done.notes,
    )


def _packed(made: ShippedModel) -> dict[str, bytes] | None:
    """For the cache of earlier work; None of a model whose weights lie in files of this run."""
    model = packed(made.model)
    if model is None:
        return None
    said = {"tokens": sorted(made.tokens), "quantize": made.quantize_notes, "finish": made.finish_notes}
    return {**model, "plan": made.plan.to_json().encode(), "said": json.dumps(said).encode()}


def _unpacked(parts: dict[str, bytes], prepared: Model, table: CalibrationTable) -> ShippedModel:
    said = json.loads(parts["said"])
    return ShippedModel(
        model=unpacked(parts, prepared),
        float_sha256=prepared.sha256,
        plan=Plan.from_json(parts["plan"]),
        table=table,
        tokens=frozenset(said["tokens"]),
        quantize_notes=tuple(said["quantize"]),
        finish_notes=tuple(said["finish"]),
    )


def _sha256(table: CalibrationTable) -> str:
    return hashlib.sha256(table.to_json().encode()).hexdigest()


def file_bytes(model: Model) -> int:
    """Size of a model's file and its external data."""
    return int(model.proto.ByteSize()) + sum(tensor_bytes(t) for t in all_tensors(model.proto) if is_external(t))


def provenance(made: ShippedModel) -> Provenance:
    """What the manifest of an engine says of the Q/DQ model it was compiled from."""
    return Provenance(
        model=made.float_sha256,
        samples=made.table.samples_sha256 or None,
        plan=made.plan.sha256,
        table=_sha256(made.table),
        settings=made.plan.settings,
    )
