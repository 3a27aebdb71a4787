"""The main job in the order of its stages.

    float model, samples -> tuned plan -> Q/DQ model, finished           `steps.shipped.written`: no file yet
    that -> an engine, where this machine can build it, or its script    `steps.compiled.compiled`
    files, samples -> how close to the float model                       `steps.judged.judged`
    all -> report, provenance, page, sums -> OUT                         `deploy`: complete or not at all
Must not print, decide exit codes or hold the arithmetic of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from calib_data import Samples
from engines.backends.backend import backend_named, target_name
from engines.core import arithmetic
from engines.core.errors import import_runtime
from engines.core.files import write_atomic
from engines.verify.audit import audit
from engines.verify.covered import INFERENCE, write_sums
from qdq.assemble.finish import float_type_of
from qdq.assemble.precision.convert import convert
from qdq.assemble.tables import Measure, Tables
from qdq.build.branches import with_possible_branches
from qdq.build.cost import Price, PricedGpu
from qdq.build.engine import add_files, require_profiles, shape_ranges
from qdq.build.machine import builds_here, compiler_here, runs_here
from qdq.build.measured.bench import bench_of, priced_here, why_predicted
from qdq.build.pricing.pricer import priced_engine
from qdq.build.pricing.tensorrt_pricer import pricer_of, unpriced
from qdq.build.recipe import Recipe
from qdq.build.script.write import NAME
from qdq.core.errors import InputError
from qdq.core.files import folder_beside, move_all
from qdq.core.progress import Progress
from qdq.deploy.page.folder import FRONT, MEASURED, PAGE, SLICES
from qdq.deploy.page.render import write_page
from qdq.deploy.report.details import details_of
from qdq.deploy.report.report import DeployReport, EngineSizes, size
from qdq.deploy.steps.compiled import compiled
from qdq.deploy.steps.judged import judged
from qdq.deploy.steps.overlap import Evaluated, overlap
from qdq.deploy.steps.shipped import file_bytes, written
from qdq.deploy.trace.host import moment
from qdq.deploy.trace.provenance import NAME as TRACED, DataSet, provenance_of
from qdq.deploy.volumes.evaluate import require_volumes
from qdq.deploy.volumes.inference import inference_of
from qdq.deploy.volumes.slices import Keeper
from qdq.frontend.exported import Exported
from qdq.measure.inference.inputs import as_samples
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import registered
from qdq.measure.table import CalibrationTable
from qdq.model.external import is_large
from qdq.model.model import Model
from qdq.model.storage import load, save
from qdq.model.weight_store import kept
from qdq.passes.prepare import load_float
from qdq.plan.plan import Plan
from qdq.plan.tables import offered
from qdq.tune.exact.elsewhere import elsewhere, untuned
from qdq.tune.sensitivity.mixed.front import Allocation

WORTH_SAYING = 0.05  # of a file: what codes of tables must save for a line
ENDS = ("", ".json", ".manifest.json")  # of the names of an engine and what lies beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What `deploy` left in `folder`, whether anything in it is quantized, and how it turned out."""

    folder: Path
    files: tuple[str, ...]
    quantized: bool
    report: DeployReport

    @property
    def page(self) -> Path:
        """The page for people."""
        return self.folder / PAGE


def deploy(
    model_path: Path | str,
    samples: Iterable[Sample] | Callable[[Model], Samples],
    out: Path | str,
    *,
    recipe: Recipe | None = None,
    evaluation: Iterable[Sample] | Callable[[Model], Samples] | None = None,
    labels: Sequence[np.ndarray] = (),
    plan: Plan | None = None,
    allocation: Allocation | None = None,
    calibrated: CalibrationTable | None = None,
    measure: Measure | None = None,
    allow_overlap: bool = False,
    with_images: bool = False,
    custom_ops: Sequence[str] = (),
    on_progress: Progress | None = None,
    notes: Sequence[str] = (),
    command: Sequence[str] = (),
    exported: Exported | None = None,
) -> Deployed:
    """A float model and samples become a checked engine, with all that led to it, in one folder.

    `out` receives <stem>.<scheme>.onnx (where nothing is quantized, <stem>.<float type>.onnx), <stem>.engine with its
    layers (.json) and manifest (.manifest.json), plan.json, table.json, report.json and report.html, provenance.json,
    and SHA256SUMS of all: all of them, or after an error none; where forms were timed on a GPU also measured.jsonl, a
    line for each; where a plan of several precisions was searched for, front.json; where samples are images also
    inference.json. A missed limit is no error. Where the recipe's compiler needs a GPU that is not here,
    build_engine.sh stands in for the engine, and builds it where there is one.

    Args:
        model_path: a float ONNX file; it is not changed.
        samples: to calibrate with; or a function that opens them for the model.
        out: a folder, made if need be; files of these names in it are replaced, and those of them that are not made
            now are removed: an engine of another model beside the script that builds this one's.
        evaluation: to check on; None takes the calibration samples, and the report says so.
        labels: true classes of the evaluation samples, each shaped like the argmax over axis 1 of the first output;
            the report then says how well both models find them.
        plan: in place of one that is tuned, or made by the rules.
        allocation: the search that the plan comes from, if it comes from one.
        calibrated: in place of a calibration, with `plan`, or where nothing is tuned.
        measure: calibrates in place of this process.
        allow_overlap: evaluation samples may be calibration samples too; the report says how many are.
        with_images: keep slices of the images in slices.npz and on the page, of whole volumes; else no pixel is kept.
        custom_ops: libraries of custom operators that ONNX Runtime needs for the model; the compiler must know them by
            itself.
        notes: to add to the report.
        command: words of a command line, as of `command_of`, for provenance.json.
        exported: what the model at `model_path` was exported from; its file is then moved into `out` too.

    Raises:
        QdqError, EngineError, DataError: see the stages; `overlap` of the samples.
    """
    recipe, out, model_path = recipe or Recipe(), Path(out), Path(model_path)
    on_progress = on_progress or (lambda done, total, label: None)
    on_progress(0, None, "Prepare")
    prepared = load_float(model_path)
    calibration, evaluated = (
        None if s is None else s(prepared) if callable(s) else as_samples(s, prepared) for s in (samples, evaluation)
    )
    assert calibration is not None
    shapes = shape_ranges(prepared, recipe.shapes, calibration)
    _require_runtimes(prepared, recipe)
    require_profiles(prepared, recipe, shapes, calibration if evaluated is None else evaluated)
    if recipe.whole.asked:
        require_volumes(calibration if evaluated is None else evaluated, recipe.whole)
    elif with_images:
        raise InputError(
            "--with-images shows slices of whole volumes, and none are run: give images and a --window, or leave it "
            "out."
        )
    moment()  # refused now, not after a calibration
    judged_on = None if evaluated is None else overlap(calibration, evaluated, prepared, allowed=allow_overlap)
    prepared = with_possible_branches(
        prepared, chain(calibration, evaluated or ()), recipe=recipe, shapes=shapes, on_progress=on_progress
    )
    stem = model_path.name.removesuffix(".onnx")
    weights = out.absolute().with_name(f".{out.absolute().name}.weights")  # of a large model, if a run is killed
    with folder_beside(out) as folder, registered(custom_ops), kept(weights), bench_of(recipe, shapes) as bench:
        tunes = _tunes(prepared, recipe, plan)
        prices = tunes or not builds_here(recipe)  # what is built here is priced by its own layers
        pricer = pricer_of(priced_here(recipe, bench), shapes) if prices else None
        done = written(
            prepared,
            calibration,
            recipe,
            pricer=pricer if tunes else None,
            bench=bench,
            tables=Tables(model=prepared, samples=calibration, measure=measure),
            plan=plan,
            table=calibrated,
            on_progress=on_progress,
        )
        made, finished = done.made, done.finished
        low = (
            float_type_of(made.plan, recipe.unquantized_type) if arithmetic.holds_low(finished.model.proto) else "fp32"
        )
        kind = made.plan.settings.label if made.plan.quantizes else low
        output, engine_path = folder / f"{stem}.{kind}.onnx", folder / f"{stem}.engine"
        save(finished.model, output)
        made.plan.save(folder / "plan.json")
        made.table.save(folder / "table.json")
        if how := inference_of(recipe, output, evaluated, calibration):
            write_atomic(folder / INFERENCE, how.to_json())
        fp16 = _in_fp16(prepared, made.table, recipe)
        built = compiled(
            output,
            engine_path,
            shipped=done,
            fp32=prepared,
            fp16=fp16,
            in_fp16=not made.plan.quantizes and low == "fp16",
            recipe=recipe,
            shapes=shapes,
            on_progress=on_progress,
        )
        table, pictures = built.table, Keeper() if with_images else None
        found = judged(
            model_path,
            output,
            engine_path if table and runs_here(table.targets) else None,
            prepared=prepared,
            shipped=done,
            table=table,
            samples=calibration if evaluated is None else evaluated,
            labels=labels,
            recipe=recipe,
            custom_ops=custom_ops,
            pictures=pictures,
            on_progress=on_progress,
        )
        price = done.price or (pricer(finished.model) if pricer else None)
        gpus = tuple(gpu.name for gpu in (pricer.told if pricer else ()))
        if price is None and table is not None:
            price, gpus = priced_engine(output, table, recipe=recipe, shapes=shapes)
        outcome = done.tuned.outcome(pricer.told, elsewhere(prepared, pricer)) if done.tuned and pricer else None
        if outcome and outcome.measured:
            write_atomic(folder / MEASURED, outcome.lines)
        said = [
            *prepared.notes,
            why_predicted(recipe),
            *(exported.lines if exported else ()),
            *notes,
            *built.notes,
            *_notes(made.plan, output.name, judged_on),
            _tables_note(made.prepared, made.plan, file_bytes(finished.model), 2 if low in ("fp16", "bf16") else 4),
            "not tuned: the plan was given" if plan and not allocation else "",
            "not tuned: the model's own quantizers are kept" if prepared.trained and recipe.tune != "off" else "",
            f"{'not tuned' if tunes else 'no time is predicted'}: {unpriced(recipe)}" if prices and not pricer else "",
            *(_untuned_notes(price, pricer.told) if price and pricer and not tunes else ()),
            *done.notes,
            *made.solution.notes,
            *finished.notes,
            *found.notes,
            built.reason,
        ]
        report = DeployReport(
            check=found.check,
            as_compiled=found.as_compiled,
            audit=audit(output, table, shapes=recipe.table_shapes(shapes)) if table else None,
            compiler=recipe.profile.title,
            chosen_because=recipe.chosen_because,
            targets=table.targets if table else tuple(map(target_name, recipe.targets)),
            not_built=built.not_built,
            quantized_nodes=len(made.plan.quantized_nodes),
            float_engine=EngineSizes.of(built.fp32_table) if built.fp32_table else None,
            fp16_engine=EngineSizes.of(built.fp16_table) if built.fp16_table else None,
            float_file_bytes=file_bytes(load(model_path)),
            fp16_file_bytes=file_bytes(fp16) if fp16 else None,
            int8_file_bytes=file_bytes(load(output)),
            details=details_of(made, finished.model, found.errors, price=price, gpus=gpus, shapes=shapes),
            model_file=output.name,
            min_int8_share=recipe.min_int8_share,
            max_size_mib=recipe.max_size_mib,
            overlap=judged_on.seen if judged_on else 0,
            evaluated_on="calibration samples" if evaluated is None else "evaluation samples",
            notes=tuple(filter(None, said)),
            label_dice=found.label_dice,
            tuning=outcome,
            elsewhere="" if outcome else untuned(recipe),
            allocation=allocation,
        )
        write_atomic(folder / "report.json", report.to_json())
        if allocation:
            allocation.save(folder / FRONT)
        if table:
            add_files(engine_path)
        if exported:
            for file in filter(Path.exists, (model_path, model_path.with_name(f"{model_path.name}.data"))):
                file.replace(folder / file.name)
        traced = provenance_of(
            folder,
            model=prepared,
            name=model_path.name,
            report=report,
            recipe=recipe,
            calibration=DataSet(samples=made.table.count, sha256=made.table.samples_sha256 or None),
            evaluation=DataSet(samples=judged_on.samples, sha256=judged_on.sha256) if judged_on else None,
            command=command,
            exported=exported,
        )
        write_atomic(folder / TRACED, traced.to_json())
        if pictures is not None:
            pictures.save(folder / SLICES)
        write_page(folder, with_images=with_images)
        write_sums(folder)
        outdated = (*(engine_path.name + end for end in ENDS), NAME, MEASURED, SLICES, INFERENCE, FRONT)
        return Deployed(
            folder=out,
            files=move_all(folder, out, outdated=outdated),
            quantized=bool(made.plan.quantizes),
            report=report,
        )


def _notes(plan: Plan, name: str, judged_on: Evaluated | None) -> Iterator[str]:
    """What a reader must know of a model called `name`, and of the samples that it was judged on."""
    if not plan.points:
        yield plan.why_nothing
    if not plan.quantizes:
        yield f"The model is called {name}, by its float type."
    if judged_on is None:
        yield "Checked on the calibration samples themselves: give --eval for samples not seen before."
    elif judged_on.seen:
        yield f"{judged_on.seen} of the evaluation samples are calibration samples too, which was allowed."


def _tunes(model: Model, recipe: Recipe, plan: Plan | None) -> bool:
    """Whether compiled results decide what is quantized: not where a plan is given, or the model says it itself."""
    return recipe.tune != "off" and plan is None and model.trained is None


def _tables_note(model: Model, plan: Plan, whole: int, width: int) -> str:
    """What tables of words would save as codes, in floats of so many bytes; "" where that is little of the model."""
    found = offered(model, plan)
    elements = sum(found.values())
    if elements * (width - 1) < whole * WORTH_SAYING:
        return ""
    names = ", ".join(list(found)[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
    return (
        f"{names}: {size(elements * width)} of tables that rows are read from, in float; --embeddings int8 would "
        f"save about {size(elements * (width - 1))} of the engine's weights (predicted)."
    )


def _untuned_notes(price: Price, gpus: Sequence[PricedGpu]) -> Iterator[str]:
    """From what times of a plan are predicted that no search chose, or why none are."""
    if price.refusal:
        yield f"no time is predicted: {price.refusal}"
    else:
        yield from dict.fromkeys(note for gpu in gpus for note in gpu.notes)


def _in_fp16(prepared: Model, table: CalibrationTable, recipe: Recipe) -> Model | None:
    """The float model in FP16, to compare sizes with; None of a large one."""
    if is_large(prepared.graph.initializer):
        return None
    return convert(prepared, split_biases=bool(recipe.profile.shift), table=table).model


def _require_runtimes(model: Model, recipe: Recipe) -> None:
    """Refuse early what would fail after a long calibration: an unknown target, a missing runtime."""
    for name in ("onnxruntime", "polygraphy", compiler_here(recipe).runtime):
        import_runtime(name)
    backend_named(recipe.backend).check_targets(model.proto, recipe.targets)
    recipe.profile.require_formats(recipe.settings.formats, recipe.targets)
    for library in recipe.tensorrt.libraries:
        library.known()
