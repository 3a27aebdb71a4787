"""The stages as verbs: export, plan, quantize, build, audit, check. Each starts from the files of the one before."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdq.cli import options
from qdq.cli.calibrate import pool_of
from qdq.cli.deploy import finish_with, show_volumes
from qdq.cli.terminal import Bars, note, show_json, show_rows, warn
from qdq.core.errors import InputError, ModelError
from qdq.core.outputs import check_output

if TYPE_CHECKING:
    from qdq.build.recipe import Recipe


@click.command()
@options.any_model_argument
@options.output_option("the ONNX file")
@click.option("--data", cls=options.Listed, names=options.data_forms, help="Compare on samples from {names}.")
@options.max_samples_option
@options.image_options
@options.shape_option
@options.export_options
@click.option("--task", cls=options.Listed, names=options.hf_tasks, help="hf: export it for {names}.")
@click.option("--samples", type=options.PATH, metavar="DIR", help="hf: keep the samples of --text or --data here.")
@click.option(
    "--tolerance",
    type=float,
    help="Allow this difference of an output, as a part of its largest magnitude; default 0.001.",
)
@options.recipe_option
@options.json_option
def export(
    model: Path,
    output: Path,
    data: str | None,
    dynamic: tuple[str, ...],
    opset: int | None,
    samples: Path | None,
    tolerance: float | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Write the ONNX file of a model that is none yet, compared with its source in ONNX Runtime."""
    from qdq.frontend.origin import origin_of

    check_output(output, model, data, given["recipe"], given["text"], *options.files_of(model))
    options.require_folder(model, given["task"])
    asked = options.asked_of(model, given, data=data)
    recipe = options.recipe_of(given)
    if samples and asked.take is None:
        raise InputError(
            f"--samples keeps what a folder's tokenizer or processor makes, and {model} is no `hf:FOLDER`."
        )
    if (origin := origin_of(model)) is None:
        raise InputError(f"{model} is taken for an ONNX file already. Give {options.MODEL.partition(' | ')[2]}.")
    with Bars() as bars:
        bars(0, None, "Export")
        with options.keeping_samples(samples, output) as place:
            wanted = options.wanted_of(recipe, data, dynamic, opset, tolerance, asked=asked, samples=place)
            made = origin.export(output, wanted)
    for text in made.lines:
        note(text)
    if as_json:
        from qdq.cli.answer.documents import ExportAnswer, OutputApart

        errors = {e.name: OutputApart(largest=e.largest, relative=e.relative, sqnr_db=e.sqnr_db) for e in made.errors}
        answer = ExportAnswer(
            model=str(output),
            source=made.source,
            exporter=made.exporter,
            framework=made.framework,
            opset=made.opset,
            inputs=made.inputs,
            outputs=made.outputs,
            dynamic={name: dict(axes) for name, axes in made.dynamic.items()},
            errors=errors,
            samples=made.samples,
            notes=made.notes,
        )
        show_json(answer.to_json())
        return
    click.echo(f"{', '.join(made.inputs)} -> {', '.join(made.outputs)}: {output}")


@click.command()
@options.model_argument
@options.output_option("plan.json", required=False)
@options.settings_options
@options.json_option
def plan(model: Path, output: Path | None, as_json: bool, **given: Any) -> None:
    """Decide which nodes are quantized, and say why every other node is not."""
    from qdq.deploy.report.report import plan_rows
    from qdq.passes.prepare import load_float
    from qdq.plan import placement

    if output:
        check_output(output, model, given["recipe"])
    recipe = options.recipe_of(given)
    prepared = load_float(model)
    made = placement.plan(prepared, recipe.settings)
    if output:
        made.save(output)
    for text in filter(None, (*prepared.notes, made.why_nothing)):
        note(text)
    if as_json:
        show_json(made.to_json())
    else:
        show_rows(f"Plan of {model.name}" + (f" in {output}" if output else ""), plan_rows(made))


@click.command()
@options.model_argument
@options.data_options
@options.made_options
@options.output_option("the Q/DQ model")
@options.unquantized_option
@options.custom_ops_option
@options.settings_options
@options.shape_option
@options.workers_option
@options.cluster_option
@options.cache_option
@options.json_option
def quantize(
    model: Path,
    data: str | None,
    random_data: int | None,
    plan_file: Path | None,
    table_file: Path | None,
    output: Path,
    custom_ops: tuple[str, ...],
    workers: int | None,
    cluster: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Write the Q/DQ model. For a large model, resumes from the weights an interrupted run already finished."""
    from qdq.assemble.finish import finish
    from qdq.assemble.quantize import quantize
    from qdq.cli.answer.documents import QuantizeAnswer
    from qdq.measure.table import CalibrationTable
    from qdq.model.storage import save
    from qdq.model.weight_store import kept
    from qdq.passes.prepare import load_float
    from qdq.plan.plan import Plan
    from qdq.solve.spread import spread

    check_output(output, model, data, plan_file, table_file, given["recipe"], *custom_ops)
    pool = pool_of(workers, cluster)
    with Bars() as bars:
        bars(0, None, "Prepare")
        chosen = Plan.load(plan_file) if plan_file else None
        recipe = options.recipe_of_plan(given, chosen, plan_file)
        prepared = load_float(model)
        table = CalibrationTable.load(table_file) if table_file else None
        if table is not None and data is None and random_data is None:
            samples = None
        else:
            samples = options.samples_of(prepared, recipe, data, random_data)
        with kept(output.with_name(f".{output.name}.weights")), spread(pool, model):
            made = quantize(
                prepared,
                samples,
                settings=recipe.settings,
                plan=chosen,
                table=table,
                custom_ops=custom_ops,
                on_progress=bars,
            )
            done = finish(made.model, made.plan, unquantized_type=recipe.unquantized_type, table=made.table)
            save(done.model, output)
    notes = tuple(filter(None, (*prepared.notes, made.plan.why_nothing, *made.solution.notes, *done.notes)))
    count, operands = len(made.plan.quantized_nodes), made.plan.operands
    for text in notes:
        note(text)
    if as_json:
        answer = QuantizeAnswer(model=str(output), quantized_nodes=count, operands=operands, notes=notes)
        show_json(answer.to_json())
        return
    click.echo(f"{count} nodes in {operands}: {output}")


@click.command()
@options.model_argument
@options.output_option("the engine; its layers and manifest go beside it")
@options.compiler_option
@options.compile_options
@click.option(
    "--timing-cache",
    type=options.PATH,
    help="Read and write this cache of kernel timings; only TensorRT times kernels.",
)
@options.recipe_option
@options.cache_option
@options.json_option
def build(model: Path, output: Path, timing_cache: Path | None, as_json: bool, **given: Any) -> None:
    """Compile an engine from an ONNX model, quantized or not.

    A float model that the compiler refuses is written again, beside the engine, in a form that it takes.
    """
    from qdq.build.any_model import compile_any
    from qdq.build.engine import engine_of_another, save_engine, shape_ranges
    from qdq.cli.answer.documents import BuildAnswer
    from qdq.model.storage import load
    from qdq.passes.steered import said

    check_output(output, model, given["recipe"])
    recipe = options.recipe_of(given)
    if timing_cache:
        recipe = recipe.with_tensorrt(timing_cache=str(timing_cache))
    with Bars() as bars:
        loaded = load(model)
        shapes = shape_ranges(loaded, recipe.shapes, None)
        prepared = output.with_name(f"{output.name.removesuffix('.engine')}.prepared.onnx")
        engine, form = compile_any(loaded, prepared, recipe=recipe, shapes=shapes, on_progress=bars)
        compiled = prepared if form else model
        save_engine(engine, output, compiled, recipe=recipe, shapes=shapes)
    notes = [*filter(None, (*recipe.option_notes, engine.table.note))]
    if form:
        why = "" if recipe.held_inputs else f"{model.name} itself does not compile; "
        same = "which computes the same" + (f" where {said(form.held_inputs)}" if form.held_inputs else "")
        notes.insert(0, f"{why}the engine is of {prepared}, {same}.")
    for text in notes:
        note(text)
    warn(warnings := [*filter(None, [engine_of_another(output)])])
    if as_json:
        answer = BuildAnswer(
            engine=str(output),
            compiled=str(compiled),
            kernels=engine.table.kernels,
            targets=engine.table.targets,
            notes=tuple(notes),
            warnings=tuple(warnings),
        )
        show_json(answer.to_json())
        return
    click.echo(f"{engine.table.kernels} kernels for {', '.join(engine.table.targets)}: {output}")


@click.command()
@options.model_argument
@options.compiler_option
@options.compile_options
@click.option(
    "--gpu", cls=options.Listed, names=options.gpu_names, help="Also predict the time of each kernel: {names}."
)
@options.share_option
@options.recipe_option
@options.cache_option
@options.json_option
def audit(model: Path, gpu: str | None, as_json: bool, **given: Any) -> None:
    """Say in which type each node really runs; MODEL is an engine, or a Q/DQ model, which is compiled first."""
    from engines.verify.covered import require_covered
    from qdq.build.any_model import audit_model
    from qdq.build.engine import audit_engine, engine_of_another
    from qdq.build.machine import model_of_another
    from qdq.deploy.report.report import audit_lines, audit_rows, share_failures

    recipe = options.recipe_of(given)
    require_covered(model)
    if gpu:
        if recipe.min_int8_share is not None:
            note("--min-int8-share is not checked with --gpu: leave one of them out.")
        _show_price(model, recipe, gpu, as_json)
        return
    with Bars() as bars:
        result = audit_model(model, recipe, bars) if model.suffix == ".onnx" else audit_engine(model)
    compiled_now = model.suffix == ".onnx"
    warn([model_of_another(model, result.backend, result.version) if compiled_now else engine_of_another(model)])
    if as_json:
        show_json(result.to_json())
    else:
        show_rows(f"Audit of {model.name}", audit_rows(result))
        for line in audit_lines(result):
            note(line)
    finish_with(share_failures(result, recipe.min_int8_share))


def _show_price(model: Path, recipe: Recipe, gpu: str, as_json: bool) -> None:
    from dataclasses import asdict

    from engines.backends.backend import predicting
    from engines.core.errors import import_runtime
    from engines.cost.predict import HEADERS, rows
    from qdq.build.any_model import price
    from qdq.build.machine import model_of_another
    from qdq.cli.answer.documents import PredictAnswer, PredictedKernel

    with Bars() as bars:
        cost = price(model, recipe, gpu, bars)
    compiler = predicting(recipe.backend)
    warn([model_of_another(model, compiler.name, import_runtime(compiler.runtime).__version__)])
    if as_json:
        answer = PredictAnswer(
            gpu=cost.gpu.name,
            predicted_us=cost.total_us,
            family=cost.family,
            error=cost.error,
            notes=cost.notes,
            kernels=tuple(PredictedKernel(**asdict(k)) for k in cost.kernels),
        )
        show_json(answer.to_json())
        return
    show_rows(f"{model.name} on {cost.gpu.name}: predicted {cost.text}", [HEADERS, *rows(cost)])
    for line in cost.notes:
        note(line)


@click.command()
@click.argument("float_model", type=options.PATH, metavar="FLOAT.onnx")
@click.argument("candidate", type=options.PATH, metavar="Q.onnx|ENGINE")
@options.data_options
@options.judging_options
@click.option("-o", "--output", type=options.PATH, help="Write report.json here.")
@click.option(
    "--as-compiled",
    is_flag=True,
    help="Round where the kernels of the engine write their results, not where the file says; needs no GPU. The "
    "layers are those of the engine given or beside the model; without one the model is compiled.",
)
@options.custom_ops_option
@options.shape_option
@options.recipe_option
@options.cache_option
@options.json_option
def check(
    float_model: Path,
    candidate: Path,
    data: str | None,
    random_data: int | None,
    output: Path | None,
    as_compiled: bool,
    custom_ops: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Compare a quantized model, or an engine on a GPU, with the float model; limits decide the exit code.

    A model is computed in the float types of its file: FP16 rounds and overflows as it does in hardware.
    """
    from engines.verify.covered import require_covered
    from qdq.build.engine import engine_backend, engine_of_another, layers_of
    from qdq.deploy.check import evaluate
    from qdq.deploy.costs.find import with_costs
    from qdq.deploy.report.report import check_rows, warning_lines
    from qdq.measure.inference.session import registered
    from qdq.model.storage import load
    from qdq.passes.prepare import load_float

    if output:
        check_output(output, float_model, candidate, data, given["recipe"], *custom_ops)
    recipe = options.recipe_of(given)
    require_covered(candidate)
    reference = load(float_model)
    samples = options.samples_of(reference, recipe, data, random_data)
    backend = None if as_compiled or candidate.suffix == ".onnx" else engine_backend(candidate)
    with Bars() as bars:
        layers = layers_of(candidate, recipe, samples, bars) if as_compiled else None
        model = layers.model if layers else candidate
        report = evaluate(
            float_model,
            model,
            samples,
            limits=recipe.limits,
            alarms=recipe.alarms,
            task=recipe.task,
            class_axis=recipe.class_axis,
            units=recipe.units,
            engine_backend=backend,
            running=recipe.running,
            as_compiled=layers.table if layers else None,
            predicted=bool(layers and layers.predicted),
            custom_ops=custom_ops,
            whole=recipe.whole,
            on_progress=bars,
        )
        if report.poor and backend is None:
            with registered(custom_ops), suppress(ModelError):  # a reference that no plan can be made for
                report = with_costs(report, load_float(float_model), load(model), samples, on_progress=bars)
    warn([layers.of_another if layers else engine_of_another(candidate) if backend else ""])
    if output:
        report.save(output)
    if as_json:
        show_json(report.to_json())
    else:
        show_rows(f"{candidate.name} against {float_model.name}, {report.samples} samples", check_rows(report))
        show_volumes(report)
        if report.note:
            note(report.note)
    finish_with(report.failures, warning_lines(report))
