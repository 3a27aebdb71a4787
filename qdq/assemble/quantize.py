"""From a float model and samples to its Q/DQ model, in the order of the stages: values in, values out.

load_float -> plan -> `Tables`, collect -> judge -> solve -> insert or reconstruct -> leave out -> `Quantized`.
Must not write files, compile, or hold the arithmetic of a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from engines.core.documents import replace
from qdq.assemble.bias import corrected
from qdq.assemble.choose_calibrator import solve_auto
from qdq.assemble.insert import insert
from qdq.assemble.judge import judged, unshifted
from qdq.assemble.leave_out import UNREACHED, reached, spared
from qdq.assemble.reconstruct import blockwise
from qdq.assemble.tables import measured
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.measure.inference.inputs import as_samples
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import registered
from qdq.measure.table import CalibrationTable
from qdq.model.graphsurgeon import ModelSource
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.passes.steered import noted, steering, values_of
from qdq.plan import placement
from qdq.plan.choice import FLOAT
from qdq.plan.methods import ROUNDINGS
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.solve.solve import Solution, require_room, solve


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """Every value on the way from a float model to its Q/DQ model."""

    prepared: Model
    plan: Plan
    table: CalibrationTable
    solution: Solution
    model: Model


def quantize(
    model: Model | ModelSource,
    samples: Iterable[Sample] | None,
    *,
    settings: Settings | None = None,
    plan: Plan | None = None,
    table: CalibrationTable | None = None,
    custom_ops: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> Quantized:
    """A float model's Q/DQ model, and every value on the way to it.

    Args:
        model: what `load_float` takes or gave.
        samples: {input name: array} each; read several times. None only with a table; see `Solution.notes` then.
        settings: how to quantize; None takes those of the plan, or the defaults.
        plan: in place of a new one; of the settings, only those apply that decide scales and codes.
        table: in place of a new calibration.
        custom_ops: libraries of custom operators that ONNX Runtime needs for the model.

    Raises:
        StaleFileError: the plan or the table was made from another model.
        InputError, ModelError, DataError: see the stages.
    """
    prepared = model if isinstance(model, Model) else load_float(model)
    chosen = plan or placement.plan(prepared, settings or Settings())
    if _reconstructs(settings or chosen.settings):
        blockwise.require()  # before anything takes long
    prepared = chosen.form(prepared)
    chosen.check(prepared)
    checked = None if samples is None else as_samples(samples, prepared)
    if checked is not None:
        require_room(prepared, chosen if settings is None else replace(chosen, settings=settings))
    if table is None:
        if checked is None:
            raise InputError("There is no calibration table and there are no samples to make one from: give samples.")
        with registered(custom_ops):
            table = measured(prepared, chosen, checked, on_progress=on_progress)
    table.check(prepared, chosen)
    chosen = reached(prepared, chosen, table)
    if settings is not None:
        chosen = unshifted(replace(chosen, settings=settings))
    own = any(point.trained for point in chosen.points)  # biases were trained with these codes
    correction = chosen.settings.bias_correction if chosen.quantized_nodes and not own else "off"

    def complete(plan: Plan, solution: Solution) -> tuple[Solution, Model]:
        """What a solution is shipped as."""
        if checked is not None and _reconstructs(plan.settings):
            solution, made = blockwise.reconstructed(prepared, plan, solution, checked, on_progress=on_progress)
        else:
            made = insert(prepared, plan, solution)
        if checked is None or correction == "off":
            return solution, made
        always = correction == "on"
        nodes = [n for n in solution.nodes.values() if n.name not in prepared.inner_nodes]
        made, said = corrected(
            prepared, made, nodes, checked, always=always, factors=solution.factors, on_progress=on_progress
        )
        return replace(solution, notes=(*solution.notes, said)), made

    auto = chosen.settings.calibrator == "auto"
    if auto and checked is None:
        raise InputError("calibrator auto compares models on the samples, and only a table is given: give samples.")

    def build(plan: Plan) -> tuple[Solution, Model]:
        if auto and checked is not None:
            done = partial(complete, plan)
            return solve_auto(prepared, plan, table, samples=checked, complete=done, on_progress=on_progress)
        return complete(plan, solve(prepared, plan, table, samples=checked, on_progress=on_progress))

    asked = chosen.settings
    with registered(custom_ops):
        chosen, choices = judged(prepared, chosen, checked, on_progress=on_progress)
        made = build(chosen)
        if checked is not None:
            chosen, made = spared(prepared, chosen, made, checked, build)
    solution, quantized = made
    if checked is not None and (steered := steering(prepared)):
        quantized = noted(quantized, values_of(checked, steered))
    unseen = [skip.node for skip in chosen.skips if skip.rule == UNREACHED]
    unrun = f"{len(unseen)} nodes stay in float, for no calibration sample runs their bodies"
    idle = [text for text in chosen.settings.idle if text.split()[0] not in asked.open]  # what was not left to `judged`
    said = [*([f"{unrun}: {unseen[0]}"] if unseen else []), *_kept(prepared, chosen, solution), *_unmet(chosen)]
    solution = replace(solution, notes=(*idle, *chosen.settings.doubts, *said, *choices, *solution.notes))
    return Quantized(prepared=prepared, plan=chosen, table=table, solution=solution, model=quantized)


def _reconstructs(settings: Settings) -> bool:
    return ROUNDINGS[settings.settled.rounding].reconstructs


def _unmet(plan: Plan) -> list[str]:
    """What was asked for of tables or attention and found nothing to do, with the reasons."""
    settings, said = plan.settings, []
    for name, what, done in (
        ("embeddings", "no table is stored so", bool(plan.tables)),
        ("attention", "no attention runs so", any(p.rule == "attention" for p in plan.points)),
    ):
        if (asked := getattr(settings, name)) != FLOAT and not done:
            why = list(dict.fromkeys(skip.reason for skip in plan.skips if skip.rule == name))
            said.append(f"{name} {asked}: {what}: {'; '.join(why[:2]) or 'the model has none'}")
    return said


def _kept(model: Model, plan: Plan, solution: Solution) -> list[str]:
    """What became of the quantizers that a model came with."""
    if model.trained is None:
        return []
    mine, all_points = [p for p in plan.points if p.trained], plan.points
    data, weights = (sum(p.role == role for p in mine) for role in ("activation", "weight"))
    found = f"{len(model.trained.tensors)} tensors and {len(model.trained.weights)} weights"
    said = [f"the model came with quantizers of {found}: the scales of {data} and the codes of {weights} are kept"]
    grids = {p.tensor: model.trained.of(p.tensor, p.consumers) for p in mine if p.role == "activation"}
    if moved := [t for t, g in grids.items() if g and g.zero_point and not solution.activations[t].zero_point]:
        said.append(
            f"{len(moved)} of them had a zero point, which cannot be here: a symmetric scale covers the same values: "
            f"{', '.join(moved[:3])}"
        )
    if new := [p.tensor for p in all_points if not p.trained]:
        said.append(f"{len(new)} operands that had none, or none of this form, are calibrated: {', '.join(new[:3])}")
    read = {p.tensor for p in mine}
    if gone := [t for t in model.trained.tensors if t not in read and t in model.names()]:
        said.append(
            f"{len(gone)} of its quantized tensors stay float, for no kernel of {plan.settings.profile.title} reads "
            f"their codes: {', '.join(gone[:3])}"
        )
    return said
