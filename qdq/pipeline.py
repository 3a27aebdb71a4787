"""From a float model and samples to its Q/DQ model, in the order of the stages: values in, values out.

load_float -> plan -> `Tables`, collect -> solve -> insert -> `Quantized`; `accuracy` is what `tune` measures a plan by.
Must not write files, compile, or hold the arithmetic of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from calib_data import DataError, InputSpec, Samples
from calib_data.sources import PythonFunction
from qdq import placement
from qdq.autocalib import solve_auto
from qdq.bias import corrected
from qdq.calibrate import CalibrationTable, Progress, collect
from qdq.crossfit import resolved
from qdq.errors import InputError, ModelError
from qdq.graph import Model, is_quantized, load
from qdq.insert import insert
from qdq.judge import Judge, Split, ranked
from qdq.plan import Plan, Rewrite
from qdq.prepare import prepare
from qdq.scheme import Settings
from qdq.solve import Solution, solve
from qdq.surgery import FLOAT_REWRITES, rewritten
from qdq.tap import Sample, registered

JUDGED = 8  # calibration samples that a tuned plan is measured on, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """Every value on the way from a float model to its Q/DQ model."""

    prepared: Model
    plan: Plan
    table: CalibrationTable
    solution: Solution
    model: Model


def load_float(path: Path | str) -> Model:
    """The model of a file, prepared: what every stage starts from.

    Raises:
        ModelError: the file is no model, or one that is quantized already.
    """
    model = load(path)
    if is_quantized(model):
        raise ModelError(
            f"{path} is quantized already: it holds QuantizeLinear, DequantizeLinear or integer operators. Give the "
            "float model that it was made from."
        )
    return prepare(model)


def input_specs(model: Model) -> tuple[InputSpec, ...]:
    """What a sample of the model must hold.

    Raises:
        ModelError: an input is no tensor of known rank.
        DataError: an input has a type that samples cannot have.
    """
    for info in model.inputs:
        if info.shape is None:
            raise ModelError(
                f"Input {info.name!r} of the model has no known rank, so no sample can be checked against it. "
                "Export the model with a rank for every input; dimensions may be dynamic."
            )
    return tuple(InputSpec(name=i.name, dtype=i.dtype, shape=i.shape or ()) for i in model.inputs)


def as_samples(samples: Iterable[Sample], model: Model) -> Samples:
    """Samples that are checked as they are read, from those of `calib_data` or from any list of dicts.

    Raises:
        DataError: an iterator that can be read only once.
    """
    if isinstance(samples, Samples):
        return samples
    if isinstance(samples, Iterator):
        raise DataError(
            "The samples are an iterator, which can be read only once. Give a list, or calib_data's Samples."
        )
    held = list(samples)
    source = PythonFunction(where="samples in memory", function=lambda: held, count=len(held))
    return Samples(inputs=input_specs(model), source=source, indices=range(len(held)), origin="memory")


def quantize(
    model: Model | Path | str,
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
        model: a path, or what `load_float` gave.
        samples: {input name: array} each; read several times. None only with a table; see `Solution.notes` then.
        settings: how to quantize; None takes those of the plan, or the defaults.
        plan: in place of a new one; of the settings, only those apply that decide scales and codes.
        table: in place of a new calibration.
        custom_ops: libraries of custom operators that ONNX Runtime needs for the model.
        on_progress: told about every step.

    Raises:
        StaleFileError: the plan or the table was made from another model.
        InputError, ModelError, DataError: see the stages.
    """
    prepared = model if isinstance(model, Model) else load_float(model)
    chosen = plan or placement.plan(prepared, settings or Settings())
    prepared = rewritten(prepared, chosen)
    chosen.check(prepared)
    checked = None if samples is None else as_samples(samples, prepared)
    if table is None:
        if checked is None:
            raise InputError("There is no calibration table and there are no samples to make one from: give samples.")
        with registered(custom_ops):
            table = collect(prepared, chosen, checked, on_progress=on_progress)
    table.check(prepared, chosen)
    if settings is not None:
        chosen = replace(chosen, settings=settings)
    correction = chosen.settings.bias_correction if chosen.quantized_nodes else "off"

    def complete(solution: Solution) -> tuple[Solution, Model]:
        """What a solution is shipped as."""
        made = insert(prepared, chosen, solution)
        if checked is None or correction == "off":
            return solution, made
        always = correction == "on"
        made, said = corrected(
            prepared, made, chosen, checked, always=always, factors=solution.factors, on_progress=on_progress
        )
        return replace(solution, notes=(*solution.notes, said)), made

    auto = chosen.settings.calibrator == "auto"
    if auto and checked is None:
        raise InputError("calibrator auto compares models on the samples, and only a table is given: give samples.")
    with registered(custom_ops):
        chosen, equalized = resolved(prepared, chosen, checked, on_progress=on_progress)
        if auto and checked is not None:
            solution, quantized = solve_auto(
                prepared, chosen, table, samples=checked, complete=complete, on_progress=on_progress
            )
        else:
            solution, quantized = complete(solve(prepared, chosen, table, samples=checked, on_progress=on_progress))
    solution = replace(solution, notes=(*chosen.settings.idle, *equalized, *solution.notes))
    return Quantized(prepared=prepared, plan=chosen, table=table, solution=solution, model=quantized)


@dataclass(slots=True, kw_only=True)
class Tables:
    """Calibration tables of one model: a plan whose tensors another has measured after the same rewrites needs no more.

    Attributes:
        model: prepared.
        samples: re-iterable.
    """

    model: Model
    samples: Iterable[Sample]
    _held: list[tuple[tuple[Rewrite, ...], CalibrationTable]] = field(default_factory=list)

    def of(self, plan: Plan, on_progress: Progress | None = None) -> CalibrationTable:
        """The table of a plan's tensors."""
        rewrites = tuple(r for r in plan.rewrites if r.name in FLOAT_REWRITES)
        needed = {p.tensor for p in plan.activations}
        for done, table in self._held:
            if done == rewrites and needed <= table.tensors.keys():
                return replace(table, tensors={name: h for name, h in table.tensors.items() if name in needed})
        table = collect(rewritten(self.model, plan), plan, self.samples, on_progress=on_progress)
        self._held.append((rewrites, table))
        return table


def accuracy(prepared: Model, samples: Iterable[Sample], settings: Settings) -> Callable[[Plan], float]:
    """What `tune` measures a plan by: quantized with all samples, the outputs' SQNR in dB on a few of them.

    Biases are not corrected, which takes long; that is done to the final model where it gains.
    """
    settings = replace(settings, bias_correction="off")
    tables: Tables | None = None
    held: Split | None = None

    def measure(plan: Plan) -> float:
        nonlocal settings, tables, held
        tables = tables or Tables(model=prepared, samples=as_samples(samples, prepared))
        made = quantize(prepared, tables.samples, settings=settings, plan=plan, table=tables.of(plan))
        settings = replace(settings, equalize=made.plan.settings.equalize)  # 'auto' is settled by the first plan
        held = held or Split(samples=tables.samples, fit=(), held=frozenset(ranked(tables.samples)[:JUDGED]))
        return Judge(prepared, held).sqnr_db(made.model)

    return measure
