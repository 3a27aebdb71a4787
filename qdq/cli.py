"""The command line: every verb is one stage, and starts from the file of the stage before it.

arguments -> recipe (file, then options) -> functions of qdq, engines and calib_data -> files, a table or JSON.
Modules that load a runtime are imported inside the verbs. Exit codes: 0 done and passed, 1 a limit failed,
2 bad input, 3 a needed runtime is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qdq.errors import InputError
from qdq.terminal import Bars, Verbs, note, show_rows

if TYPE_CHECKING:
    from calib_data import Samples
    from qdq.graph import Model
    from qdq.recipe import Recipe
    from qdq.scheme import Settings

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
RANDOM_NOTE = "Random data: the figures say that the model compiles and runs, nothing about its accuracy."


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""
    return lambda function: reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


_recipe_option = click.option("--recipe", type=PATH, help="YAML file; its keys are the options with underscores.")
_settings_options = _options(
    click.option("--scheme", help="What is quantized to what: int8 (default)."),
    click.option("--calibrator", help="Activation ranges: mse (default), percentile, entropy or max."),
    click.option("--percentile", type=float, help="Of the percentile calibrator, default 99.99."),
    click.option("--rounding", help="Weights: gptq (default) or nearest."),
    click.option("--shift/--no-shift", default=None, help="Shift lopsided activations to use all codes (default on)."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Node names to leave in float; repeatable."),
    _recipe_option,
)
_shape_option = click.option(
    "--shape",
    multiple=True,
    metavar="NAME:MIN:OPT:MAX",
    help="Shapes of a dynamic input, each like 1x1x64x64x64; or NAME:SHAPE. Default: those of the samples.",
)
_compile_options = _options(
    click.option("--target", multiple=True, help="GPU generation, such as sm89 (default) or 8.6; repeatable."),
    click.option("--backend", help="rtx (default, needs no GPU) or trt (needs this machine's GPU)."),
    _shape_option,
)
_data_options = _options(
    click.option("--data", help="Samples: a folder of .npz/.npy, one .npz/.npy file, or module.py:function."),
    click.option("--random-data", type=int, metavar="N", help="N random samples in place of --data."),
)
_limit_options = _options(
    click.option("--min-sqnr-db", type=float, help="Least signal to noise ratio of each output, in dB."),
    click.option("--min-cosine", type=float, help="Least cosine similarity of each output."),
    click.option("--min-dice", type=float, help="Least Dice of each class of each segmentation."),
    click.option("--min-top1", type=float, help="Least agreement of the argmax."),
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to standard output.")
_model_argument = click.argument("model", type=PATH)


def _output_option(what: str, *, required: bool = True) -> Callable[[F], F]:
    return click.option("-o", "--output", type=PATH, required=required, help=f"Where to write {what}.")


def _recipe(given: Mapping[str, Any], base: Mapping[str, object] | None = None) -> Recipe:
    """The recipe of a verb: `base`, then its recipe file, then the options given."""
    from qdq.recipe import Recipe, read_recipe

    options = {k: v for k, v in given.items() if k != "recipe" and v is not None and v != ()}
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    read = read_recipe(given["recipe"]) if given.get("recipe") else {}
    return Recipe.from_mapping({**(base or {}), **read, **options})


def _samples(model: Model, recipe: Recipe, data: str | None, random_data: int | None) -> Samples:
    """The samples that the options name.

    Raises:
        InputError: none, or both kinds.
        DataError: see `calib_data.open_samples`.
    """
    from calib_data import open_samples, random_samples
    from qdq.deploy import input_specs

    if (data is None) == (random_data is None):
        raise InputError(
            "No data: give --data DATA, a folder or file with real inputs of the model. Random data needs an explicit "
            "--random-data N, and calibrates nothing real."
            if data is None
            else "Both --data and --random-data are given: choose one."
        )
    specs = input_specs(model)
    if data is not None:
        return open_samples(data, specs)
    note(RANDOM_NOTE)
    sizes: dict[str | tuple[str, int], int] = {
        (shape.name, axis): size for shape in recipe.shapes for axis, size in enumerate(shape.opt)
    }
    return random_samples(specs, random_data or 0, seed=0, sizes=sizes)


def _check_output(path: Path, *inputs: Path | str | None) -> None:
    """Refuse early what would fail after the work, or would replace a file that is being read.

    Raises:
        InputError: says which.
    """
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "it is a folder" if path.is_dir() else "its folder does not exist or is not writable"
        raise InputError(f"Cannot write {path}: {what}. Choose a file name in a folder that is writable.")
    for other in inputs:
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            raise InputError(
                f"Cannot write {path}: it is an input of this command, which is never changed. Choose another name."
            )


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qdq", message="%(prog)s %(version)s")
def main() -> None:
    """An ONNX model and real samples become a verified INT8 TensorRT engine, without a GPU.

    `qdq demo` shows it; `qdq deploy MODEL --data DATA --out DIR` does it all; the other verbs are its stages.

    Exit codes: 0 done and passed, 1 a limit failed, 2 bad input, 3 a needed runtime is missing.
    """


@main.command()
@_model_argument
@_output_option("plan.json", required=False)
@_settings_options
@_json_option
def plan(model: Path, output: Path | None, as_json: bool, **given: Any) -> None:
    """Decide what is quantized, and say why the rest is not."""
    from qdq import placement
    from qdq.deploy import load_float
    from qdq.report import plan_rows

    if output:
        _check_output(output, model, given["recipe"])
    recipe = _recipe(given)
    made = placement.plan(load_float(model), recipe.settings)
    if output:
        made.save(output)
    if as_json:
        click.echo(made.to_json(), nl=False)
    else:
        show_rows(f"Plan of {model.name}" + (f" in {output}" if output else ""), plan_rows(made))


@main.command()
@_model_argument
@_data_options
@click.option("--plan", "plan_file", type=PATH, help="plan.json in place of a new plan.")
@_output_option("table.json")
@_settings_options
@_shape_option
def calibrate(
    model: Path, data: str | None, random_data: int | None, plan_file: Path | None, output: Path, **given: Any
) -> None:
    """Measure the ranges of the tensors that a plan quantizes."""
    from qdq import placement
    from qdq.calibrate import collect
    from qdq.deploy import load_float
    from qdq.plan import Plan

    _check_output(output, model, data, plan_file, given["recipe"])
    recipe = _recipe(given)
    with Bars() as bars:
        bars(0, None, "Prepare")
        prepared = load_float(model)
        samples = _samples(prepared, recipe, data, random_data)
        chosen = Plan.load(plan_file) if plan_file else placement.plan(prepared, recipe.settings)
        bars(0, None, "Read samples")
        sha256 = samples.sha256()
        table = collect(prepared, chosen, samples, samples_sha256=sha256, on_progress=bars)
    table.save(output)
    click.echo(f"{len(table.tensors)} tensors measured on {table.count} samples: {output}")


@main.command()
@_model_argument
@_data_options
@click.option("--plan", "plan_file", type=PATH, help="plan.json in place of a new plan.")
@click.option("--table", "table_file", type=PATH, help="table.json in place of a new calibration.")
@_output_option("the Q/DQ model")
@_settings_options
@_shape_option
def quantize(
    model: Path,
    data: str | None,
    random_data: int | None,
    plan_file: Path | None,
    table_file: Path | None,
    output: Path,
    **given: Any,
) -> None:
    """Write the Q/DQ model."""
    from qdq import deploy as job
    from qdq.calibrate import CalibrationTable
    from qdq.graph import save
    from qdq.plan import Plan

    _check_output(output, model, data, plan_file, table_file, given["recipe"])
    with Bars() as bars:
        bars(0, None, "Prepare")
        chosen = Plan.load(plan_file) if plan_file else None
        recipe = _recipe(given, base=chosen.settings.to_mapping() if chosen else None)
        if chosen and _places(recipe.settings) != _places(chosen.settings):
            raise InputError(
                f"The plan {plan_file} already says what is quantized, which --scheme, --shift and --exclude cannot "
                "change. Edit the plan, or make another with `qdq plan`."
            )
        prepared = job.load_float(model)
        table = CalibrationTable.load(table_file) if table_file else None
        if table is not None and data is None and random_data is None:
            samples = None
        else:
            samples = _samples(prepared, recipe, data, random_data)
        made = job.quantize(prepared, samples, settings=recipe.settings, plan=chosen, table=table, on_progress=bars)
        save(made.model, output)
    for text in made.solution.notes:
        note(text)
    click.echo(f"{len(made.plan.quantized_nodes)} nodes in INT8: {output}")


def _places(settings: Settings) -> tuple[object, ...]:
    """The settings that decide where quantizers go; the others decide scales and codes."""
    return (settings.scheme, settings.shift, settings.exclude)


@main.command()
@_model_argument
@_output_option("the engine; its layers and manifest go beside it")
@_compile_options
@click.option("--timing-cache", type=PATH, help="Of --backend trt: read if it exists, then written.")
@_recipe_option
def build(model: Path, output: Path, timing_cache: Path | None, **given: Any) -> None:
    """Compile an engine from an ONNX model, quantized or not."""
    from qdq import build as job
    from qdq.graph import load

    _check_output(output, model, given["recipe"])
    recipe = _recipe(given)
    with Bars() as bars:
        shapes = job.shape_ranges(load(model), recipe.shapes, None)
        engine = job.compile_engine(model, recipe=recipe, shapes=shapes, timing_cache=timing_cache, on_progress=bars)
        job.save_engine(engine, output, model, recipe=recipe, shapes=shapes)
    click.echo(f"{engine.table.kernels} kernels for {', '.join(engine.table.targets)}: {output}")


@main.command()
@_model_argument
@_compile_options
@_recipe_option
@_json_option
def audit(model: Path, as_json: bool, **given: Any) -> None:
    """Say what each node really runs in: of a Q/DQ model, which is compiled for it, or of an engine."""
    from qdq import build as job
    from qdq.report import audit_lines, audit_rows

    recipe = _recipe(given)
    with Bars() as bars:
        result = job.audit_model(model, recipe, bars) if model.suffix == ".onnx" else job.audit_engine(model)
    if as_json:
        click.echo(result.to_json(), nl=False)
        return
    show_rows(f"Audit of {model.name}", audit_rows(result))
    for line in audit_lines(result):
        note(line)


@main.command()
@click.argument("float_model", type=PATH, metavar="FLOAT.onnx")
@click.argument("candidate", type=PATH, metavar="Q.onnx|ENGINE")
@_data_options
@_limit_options
@click.option("-o", "--output", type=PATH, help="Where to write report.json.")
@_shape_option
@_recipe_option
@_json_option
def check(
    float_model: Path,
    candidate: Path,
    data: str | None,
    random_data: int | None,
    output: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compare a quantized model, or an engine on a GPU, with the float model; limits decide the exit code."""
    from qdq.build import engine_backend
    from qdq.deploy import evaluate
    from qdq.graph import load
    from qdq.report import check_rows

    if output:
        _check_output(output, float_model, candidate, data, given["recipe"])
    recipe = _recipe(given)
    reference = load(float_model)
    samples = _samples(reference, recipe, data, random_data)
    backend = None if candidate.suffix == ".onnx" else engine_backend(candidate)
    with Bars() as bars:
        report = evaluate(
            float_model, candidate, samples, limits=recipe.limits, engine_backend=backend, on_progress=bars
        )
    if output:
        report.save(output)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        show_rows(f"{candidate.name} against {float_model.name}, {report.samples} samples", check_rows(report))
        if report.note:
            note(report.note)
    _finish(report.failures)


@main.command()
@_model_argument
@_data_options
@click.option("--out", type=PATH, required=True, help="Folder for the results.")
@click.option("--eval", "evaluation", help="Samples to check on, in the forms of --data; default: those of --data.")
@_settings_options
@_compile_options
@_limit_options
@_json_option
def deploy(
    model: Path,
    data: str | None,
    random_data: int | None,
    out: Path,
    evaluation: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Do it all: plan, calibrate, quantize, build, audit and check."""
    from qdq import deploy as job

    recipe = _recipe(given)
    with Bars() as bars:
        done = job.deploy(
            model,
            lambda prepared: _samples(prepared, recipe, data, random_data),
            out,
            recipe=recipe,
            evaluation=(lambda prepared: _samples(prepared, recipe, evaluation, None)) if evaluation else None,
            on_progress=bars,
            notes=[] if random_data is None else [RANDOM_NOTE],
        )
    _show_deployed(done, model.name, as_json)
    _finish(done.report.check.failures)


def _show_deployed(done: Any, name: str, as_json: bool) -> None:
    from qdq.report import audit_lines

    if as_json:
        click.echo(done.report.to_json(), nl=False)
        return
    show_rows(f"{name} for {', '.join(done.report.audit.targets)}", done.report.rows())
    for line in (*audit_lines(done.report.audit), *done.report.notes):
        note(line)
    click.echo(f"Results: {done.folder.resolve()}")


def _finish(failures: list[str]) -> None:
    """Name the limits that failed, and end with 1 if there are any."""
    for failure in failures:
        click.echo(f"Failed: {failure}", err=True)
    if failures:
        click.get_current_context().exit(1)


@main.command()
@click.argument("source", type=PATH, metavar="MODEL|PLAN.json")
@click.argument("node")
@click.option("--engine", type=PATH, help="An engine of this model: also say which kernel runs the node.")
@_settings_options
@_shape_option
@_json_option
def explain(source: Path, node: str, engine: Path | None, as_json: bool, **given: Any) -> None:
    """Say whether and why a node is quantized, by which rule, and what it costs."""
    from qdq.explain import explain as explained

    lines = explained(source, node, _recipe(given), engine=engine)
    click.echo(json.dumps({"node": node, "lines": lines}, indent=1) if as_json else "\n".join(lines))


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Say which runtimes and GPUs are here, and what will and will not work."""
    from dataclasses import asdict

    from engines.doctor import diagnose

    findings = diagnose()
    if as_json:
        click.echo(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        show_rows("This machine", [("ok" if f.ok else "--", f.name, f.detail, f.fix) for f in findings])


@main.command()
@click.option("--out", type=PATH, default=Path("qdq-demo"), show_default=True, help="Folder for the results.")
@_compile_options
@_json_option
def demo(out: Path, as_json: bool, **given: Any) -> None:
    """Deploy the 3-D brain segmentation network and the brain volume that the package ships."""
    from qdq import deploy as job
    from qdq.demo import demo_labels, demo_model, demo_samples

    calibration, evaluation = demo_samples()
    with Bars() as bars:
        done = job.deploy(
            demo_model(),
            calibration,
            out,
            recipe=_recipe(given),
            evaluation=evaluation,
            labels=demo_labels(),
            on_progress=bars,
        )
    _show_deployed(done, "Demo: grey and white matter", as_json)
    _finish(done.report.check.failures)


if __name__ == "__main__":
    main()
