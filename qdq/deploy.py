"""The main job in the order of its stages, and the steps that several verbs share.

    load_float -> plan -> collect -> solve -> insert             `quantize`: values in, values out
    Q/DQ model -> engine -> audit, check against the float model  `deploy`: writes OUT, complete or not at all
Must not print, decide exit codes or hold the arithmetic of a stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calib_data import DataError, InputSpec, Samples
from calib_data.sources import PythonFunction
from engines import ort, rtx, trt
from engines.audit import audit
from engines.compare import Limits, Report, compare
from engines.compiler import ShapeRange
from engines.doctor import gpus
from engines.errors import BuildError, import_runtime, write_atomic
from engines.layers import LayerTable
from qdq import placement
from qdq.autocalib import solve_auto
from qdq.bias import corrected
from qdq.build import OnProgress, compile_engine, runs_here, save_engine, shape_ranges
from qdq.calibrate import CalibrationTable, collect
from qdq.crossfit import resolved
from qdq.errors import InputError, ModelError
from qdq.external import is_external, tensor_bytes
from qdq.files import folder_beside, move_all
from qdq.finish import Finished, finish
from qdq.formats import require_targets
from qdq.graph import Model, is_quantized, load, save
from qdq.insert import insert
from qdq.judge import Judge, Split, ranked
from qdq.plan import Plan
from qdq.prepare import prepare
from qdq.pricing import Pricer, difference, find_plan, gpus_of
from qdq.recipe import Recipe
from qdq.report import DeployReport
from qdq.scheme import Settings
from qdq.solve import Solution, solve
from qdq.spool import kept
from qdq.surgery import rewritten
from qdq.tap import registered

Sample = Mapping[str, np.ndarray]
JUDGED = 8  # calibration samples that a tuned plan is measured on, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """Every value on the way from a float model to its Q/DQ model."""

    prepared: Model
    plan: Plan
    table: CalibrationTable
    solution: Solution
    model: Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What `deploy` left in `folder`, and how it turned out."""

    folder: Path
    files: tuple[str, ...]
    report: DeployReport


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
    on_progress: OnProgress | None = None,
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


def accuracy(prepared: Model, samples: Samples, settings: Settings) -> Callable[[Plan], float]:
    """What `tune` measures a plan by: quantized with all samples, the outputs' SQNR in dB on a few of them.

    Biases are not corrected, which takes long; that is done to the final model where it gains.
    """
    settings = replace(settings, bias_correction="off")
    held: Split | None = None

    def measure(plan: Plan) -> float:
        nonlocal settings, held
        made = quantize(prepared, samples, settings=settings, plan=plan)
        settings = replace(settings, equalize=made.plan.settings.equalize)  # 'auto' is settled by the first plan
        held = held or Split(samples=samples, fit=(), held=frozenset(ranked(samples)[:JUDGED]))
        return Judge(prepared, held).sqnr_db(made.model)

    return measure


def evaluate(
    float_path: Path | str,
    candidate: Path,
    samples: Samples,
    *,
    limits: Mapping[str, float],
    engine_backend: str | None = None,
    custom_ops: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> Report:
    """The candidate's outputs against those of the float model as the user gave it.

    Args:
        float_path: the float model.
        candidate: a Q/DQ model, which stands for its engine; or an engine.
        samples: to compare on.
        limits: keys of `qdq.recipe.LIMITS`.
        engine_backend: 'rtx' or 'trt' where the candidate is an engine.
        custom_ops: libraries of custom operators that ONNX Runtime needs for the models.
        on_progress: told after each sample.
    """
    total = samples.len_or_none()

    def counted() -> Iterator[Sample]:
        for done, sample in enumerate(samples):
            if on_progress:
                on_progress(done, total, "Check")
            yield sample
        if on_progress and total is not None:
            on_progress(total, total, "Check")

    def opened(path: Path | str) -> Any:
        return ort.session(str(path), custom_ops=custom_ops) if custom_ops else str(path)

    report = compare(
        opened(float_path),
        trt.runner(candidate, rtx=engine_backend == "rtx", name="engine") if engine_backend else opened(candidate),
        counted(),
        limits=Limits(**limits),
        stood_for_engine=engine_backend is None,
        names=("float model", "engine" if engine_backend else "Q/DQ model"),
    )
    if report.stood_for_engine and gpus():
        return replace(report, note="the Q/DQ model in ONNX Runtime stood for the engine, which was not run")
    return report


def deploy(
    model_path: Path | str,
    samples: Iterable[Sample] | Callable[[Model], Samples],
    out: Path | str,
    *,
    recipe: Recipe | None = None,
    evaluation: Iterable[Sample] | Callable[[Model], Samples] | None = None,
    labels: Sequence[np.ndarray] = (),
    custom_ops: Sequence[str] = (),
    on_progress: OnProgress | None = None,
    notes: Sequence[str] = (),
) -> Deployed:
    """A float model and samples become a checked engine, with all that led to it, in one folder.

    `out` receives <stem>.<scheme>.onnx, <stem>.engine with its layers (.json) and manifest (.manifest.json), plan.json,
    table.json and report.json: all of them, or after an error none. A missed limit is no error.

    Args:
        model_path: a float ONNX file; it is not changed.
        samples: to calibrate with; or a function that opens them for the model.
        out: a folder, made if need be; files of these names in it are replaced.
        recipe: settings, targets, shapes and limits.
        evaluation: to check on; None takes the calibration samples, and the report says so.
        labels: true classes of the evaluation samples, each shaped like the argmax over axis 1 of the first output;
            the report then says how well both models find them.
        custom_ops: libraries of custom operators that ONNX Runtime needs for the model; the compiler must know them by
            itself.
        on_progress: told about every step.
        notes: to add to the report.

    Raises:
        QdqError, EngineError, DataError: see the stages.
    """
    recipe, out, model_path = recipe or Recipe(), Path(out), Path(model_path)
    tell = on_progress or (lambda done, total, label: None)
    tell(0, None, "Prepare")
    prepared = load_float(model_path)
    calibration, evaluated = (
        None if s is None else s(prepared) if callable(s) else as_samples(s, prepared) for s in (samples, evaluation)
    )
    assert calibration is not None
    shapes = shape_ranges(prepared, recipe.shapes, calibration)
    _require_runtimes(prepared, recipe)
    stem = model_path.name.removesuffix(".onnx")
    weights = out.absolute().with_name(f".{out.absolute().name}.weights")  # of a large model, if a run is killed
    with folder_beside(out) as folder, registered(custom_ops), kept(weights):
        tuned, pricer = None, None
        if recipe.tune != "off" and recipe.backend == "rtx":
            pricer = Pricer(recipe=recipe, shapes=shapes, gpus=gpus_of(recipe))
            measure = accuracy(prepared, calibration, recipe.settings)
            tuned = find_plan(prepared, pricer, samples=calibration, measure=measure, on_progress=tell)
        made, finished = _quantized(prepared, calibration, recipe, tuned.plan if tuned else None, tell)
        built = pricer(finished.model) if pricer else None
        slower = tuned and built and recipe.tune == "placement" and built.us > tuned.unquantized_us and made.plan.points
        if tuned and slower:
            made, finished = _quantized(prepared, calibration, recipe, tuned.unquantized, tell)
        output, engine_path = folder / f"{stem}.{recipe.settings.scheme}.onnx", folder / f"{stem}.engine"
        save(finished.model, output)
        made.plan.save(folder / "plan.json")
        made.table.save(folder / "table.json")
        engine = compile_engine(output, recipe=recipe, shapes=shapes, on_progress=tell)
        save_engine(engine, engine_path, output, recipe=recipe, shapes=shapes, made_from=made)
        float_table, reason = _float_table(prepared, folder, recipe, shapes, tell)
        judged = calibration if evaluated is None else evaluated
        on_engine = recipe.backend if runs_here(engine.table.targets) else None
        check = evaluate(
            model_path,
            engine_path if on_engine else output,
            judged,
            limits=recipe.limits,
            engine_backend=on_engine,
            custom_ops=custom_ops,
            on_progress=tell,
        )
        if evaluated is None:
            notes = [*notes, "Checked on the calibration samples themselves: give --eval for samples not seen before."]
        tuning = [f"tuned: {tuned.summary}", difference(tuned, built)] if tuned and built else []
        if slower:
            tuning.append("so the model is left in float: as it was built it is predicted slower than that")
        if recipe.tune != "off" and not tuned:
            tuning = ["not tuned: predicted times come from TensorRT-RTX's compiler, and --backend trt has another"]
        label_dice = {
            name: _label_dice(path, judged, labels)
            for name, path in (("float model", model_path), ("quantized model", output))
            if labels
        }
        report = DeployReport(
            check=check,
            audit=audit(output, engine.table, shapes=shapes),
            float_table=float_table,
            float_file_bytes=file_bytes(load(model_path)),
            int8_file_bytes=file_bytes(load(output)),
            evaluated_on="calibration samples" if evaluated is None else "evaluation samples",
            notes=tuple(filter(None, [*notes, *tuning, *made.solution.notes, *finished.notes, check.note, reason])),
            label_dice=label_dice,
            tuned=tuned,
            gpus=tuple(gpu.name for gpu in pricer.gpus) if pricer else (),
        )
        write_atomic(folder / "report.json", report.to_json().encode())
        return Deployed(folder=out, files=move_all(folder, out), report=report)


def _quantized(
    prepared: Model, calibration: Samples, recipe: Recipe, plan: Plan | None, tell: OnProgress
) -> tuple[Quantized, Finished]:
    """The model by a plan, and as it is built."""
    made = quantize(prepared, calibration, settings=recipe.settings, plan=plan, on_progress=tell)
    return made, finish(made.model, made.plan, rest=recipe.rest, table=made.table)


def _float_table(
    prepared: Model, folder: Path, recipe: Recipe, shapes: Mapping[str, ShapeRange], tell: OnProgress
) -> tuple[LayerTable | None, str]:
    """The layers of the float model compiled likewise, or None and why it does not compile."""
    place = folder / "float"
    place.mkdir()
    try:
        save(prepared, place / "float.onnx")
        return compile_engine(
            place / "float.onnx", recipe=recipe, shapes=shapes, on_progress=tell, label="Compile FP32"
        ).table, ""
    except BuildError as error:
        return None, f"The float model does not compile, so there are no sizes to compare with: {error}"
    finally:
        shutil.rmtree(place)


def _label_dice(path: Path, samples: Iterable[Sample], labels: Sequence[np.ndarray]) -> dict[int, float]:
    """Dice of each class that the labels hold, over all samples: 2 |both| / (|predicted| + |labelled|)."""
    classes = [int(k) for k in np.unique(np.concatenate([np.unique(label) for label in labels]))]
    both, either = np.zeros(len(classes)), np.zeros(len(classes))
    for outputs, label in zip(ort.run(str(path), samples), labels, strict=True):
        found = next(iter(outputs.values())).argmax(1)
        for row, k in enumerate(classes):
            both[row] += np.sum((found == k) & (label == k))
            either[row] += np.sum(found == k) + np.sum(label == k)
    return {k: float(2 * b / e) for k, b, e in zip(classes, both, either, strict=True)}


def file_bytes(model: Model) -> int:
    """Size of a model's file and its external data."""
    tensors = model.graph.initializer
    return int(model.proto.ByteSize()) + sum(tensor_bytes(t) for t in tensors if is_external(t))


def _require_runtimes(model: Model, recipe: Recipe) -> None:
    """Refuse early what would fail after a long calibration: an unknown target, a missing runtime."""
    for name in ("onnxruntime", "polygraphy", "tensorrt" if recipe.backend == "trt" else "tensorrt_rtx"):
        import_runtime(name)
    if recipe.backend == "rtx":
        require_targets(recipe.settings.formats, rtx.check_targets(model.proto, recipe.targets))
