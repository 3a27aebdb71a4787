"""The Q/DQ model that is shipped, as `deploy` and `compare` build it. Must not compile the result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import msgspec
import numpy as np

from calib_data import Samples
from qdq.assemble.finish import Finished, finish
from qdq.assemble.quantize import Quantized, quantize
from qdq.assemble.tables import Tables
from qdq.build.cost import Price
from qdq.build.engine import Provenance
from qdq.build.measured.bench import Bench
from qdq.build.pricing.tensorrt_pricer import AnyPricer
from qdq.build.recipe import Recipe
from qdq.core.arrays import Singles
from qdq.core.disk.cache import remembered
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams
from qdq.deploy.costs.weights import weight_errors
from qdq.measure.inference.kept import seen
from qdq.measure.table import CalibrationTable
from qdq.model.as_bytes import identity, packed, unpacked
from qdq.model.external import is_external, tensor_bytes
from qdq.model.model import Model
from qdq.model.nodes import all_tensors
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.tune.find_plan import difference, find_plan
from qdq.tune.measured.times import as_built
from qdq.tune.tuned import Tuned


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """What is told of a solution: `activations`, `divisors`, `tokens` and `notes` as of `Solution`; `beyond` by name.

    Attributes:
        weight_db: as of `weight_errors`.
    """

    activations: Mapping[str, QParams]
    divisors: Mapping[str, Singles]
    tokens: frozenset[str]
    beyond: frozenset[str]
    notes: tuple[str, ...]
    weight_db: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a Q/DQ model was made of, and by which plan, table and scales; as of `Quantized`."""

    prepared: Model
    plan: Plan
    table: CalibrationTable
    solution: Scales


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedModel:
    """A Q/DQ model as it is compiled, how its plan was found and its price (None without tuning), and what to say."""

    made: Made
    finished: Finished
    tuned: Tuned | None = None
    notes: tuple[str, ...] = ()
    price: Price | None = None


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
    shipped = by(tuned.plan)
    built, judged = pricer(shipped.finished.model), "predicted"
    gains = built.gains_on(tuned.unquantized_price)
    if bench is not None and tuned.measured is not None:
        judged = "measured"
        tuned, gains = as_built(tuned, shipped.finished.model, built, bench)
    notes = [f"tuned: {tuned.summary}", difference(tuned, built)]
    if recipe.tune == "placement" and shipped.made.plan.points and not gains:
        shipped = by(tuned.unquantized)
        tuned = tuned.left_in_float(built)
        built = pricer(shipped.finished.model)
        notes.append(f"that plan, as built, is not {judged} faster than float, so the model is left in float")
    notes += tuned.said(pricer.told)
    return replace(shipped, tuned=tuned, notes=tuple(filter(None, notes)), price=built)


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
    return ShippedModel(made=told_of(made), finished=done)


def told_of(made: Quantized) -> Made:
    """What is told of a Q/DQ model, without its codes."""
    solution = made.solution
    scales = Scales(
        activations=solution.activations,
        divisors=solution.divisors,
        tokens=solution.tokens,
        beyond=frozenset(solution.beyond),
        notes=solution.notes,
        weight_db=weight_errors(made),
    )
    return Made(prepared=made.prepared, plan=made.plan, table=made.table, solution=scales)


def _packed(shipped: ShippedModel) -> dict[str, bytes] | None:
    """For the cache of earlier work; None of a model whose weights lie in files of this run."""
    model, scales = packed(shipped.finished.model), shipped.made.solution
    if model is None:
        return None
    arrays = {f"scale {name}": params.scale for name, params in scales.activations.items()}
    arrays |= {f"divisor {name}": divisor for name, divisor in scales.divisors.items()}
    said = {
        "tokens": sorted(scales.tokens),
        "beyond": sorted(scales.beyond),
        "notes": scales.notes,
        "weight_db": dict(scales.weight_db),
        "finish": shipped.finished.notes,
        "activations": {
            name: {f.name: getattr(params, f.name) for f in fields(params) if f.name != "scale"}
            for name, params in scales.activations.items()
        },
        "divisors": list(scales.divisors),
        "arrays": {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()},
    }
    return {**model, "plan": shipped.made.plan.to_json().encode(), "said": msgspec.msgpack.encode(said)}


def _unpacked(parts: dict[str, bytes], prepared: Model, table: CalibrationTable) -> ShippedModel:
    said, plan = msgspec.msgpack.decode(parts["said"]), Plan.from_json(parts["plan"])
    arrays = {name: np.frombuffer(data, dtype).reshape(shape) for name, (dtype, shape, data) in said["arrays"].items()}
    scales = Scales(
        activations={n: QParams(scale=arrays[f"scale {n}"], **held) for n, held in said["activations"].items()},
        divisors={name: arrays[f"divisor {name}"] for name in said["divisors"]},
        tokens=frozenset(said["tokens"]),
        beyond=frozenset(said["beyond"]),
        notes=tuple(said["notes"]),
        weight_db=said["weight_db"],
    )
    made = Made(prepared=plan.form(prepared), plan=plan, table=table, solution=scales)
    return ShippedModel(made=made, finished=Finished(model=unpacked(parts, prepared), notes=tuple(said["finish"])))


def _sha256(table: CalibrationTable) -> str:
    return hashlib.sha256(table.to_json().encode()).hexdigest()


def file_bytes(model: Model) -> int:
    """Size of a model's file and its external data."""
    return int(model.proto.ByteSize()) + sum(tensor_bytes(t) for t in all_tensors(model.proto) if is_external(t))


def provenance(made: Made) -> Provenance:
    """What the manifest of an engine says of the Q/DQ model it was compiled from."""
    return Provenance(
        model=made.prepared.sha256,
        samples=made.table.samples_sha256 or None,
        plan=made.plan.sha256,
        table=_sha256(made.table),
        settings=made.plan.settings,
    )
