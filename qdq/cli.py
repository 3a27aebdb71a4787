"""The command line: every verb is one stage, and starts from the file of the stage before it.

arguments -> recipe (file, then options) -> functions of qdq, engines and calib_data -> files, a table or JSON.
Modules that load a runtime are imported inside the verbs. Exit codes: 0 done and passed, 1 a limit failed,
2 bad input, 3 a needed runtime is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdq.cli_calibrate import calibrate
from qdq.cli_compare import compare
from qdq.cli_lint import lint_command
from qdq.cli_tune import tune
from qdq.errors import InputError
from qdq.options import (
    PATH,
    RANDOM_NOTE,
    check_output,
    compile_options,
    custom_ops_option,
    data_options,
    json_option,
    limit_options,
    model_argument,
    output_option,
    recipe_of,
    recipe_option,
    rest_option,
    samples_of,
    settings_options,
    shape_option,
    tune_options,
)
from qdq.terminal import Bars, Verbs, note, show_rows

if TYPE_CHECKING:
    from qdq.recipe import Recipe
    from qdq.scheme import Settings


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qdq", message="%(prog)s %(version)s")
def main() -> None:
    """An ONNX model and real samples become a verified INT8 TensorRT engine, without a GPU.

    `qdq demo` shows it; `qdq deploy MODEL --data DATA --out DIR` does it all; the other verbs are its stages.

    Exit codes: 0 done and passed, 1 a limit failed, 2 bad input, 3 a needed runtime is missing.
    """


@main.command()
@model_argument
@output_option("plan.json", required=False)
@settings_options
@json_option
def plan(model: Path, output: Path | None, as_json: bool, **given: Any) -> None:
    """Decide what is quantized, and say why the rest is not."""
    from qdq import placement
    from qdq.pipeline import load_float
    from qdq.report import plan_rows

    if output:
        check_output(output, model, given["recipe"])
    recipe = recipe_of(given)
    made = placement.plan(load_float(model), recipe.settings)
    if output:
        made.save(output)
    if as_json:
        click.echo(made.to_json(), nl=False)
    else:
        show_rows(f"Plan of {model.name}" + (f" in {output}" if output else ""), plan_rows(made))


main.add_command(calibrate)
main.add_command(compare)
main.add_command(lint_command)
main.add_command(tune)


@main.command()
@model_argument
@data_options
@click.option("--plan", "plan_file", type=PATH, help="plan.json in place of a new plan.")
@click.option("--table", "table_file", type=PATH, help="table.json in place of a new calibration.")
@output_option("the Q/DQ model")
@click.option(
    "--rest",
    help="Float type of what is not quantized: auto (as tuned, else fp16), fp16, bf16, fp32; default: tuned, or fp32.",
)
@custom_ops_option
@settings_options
@shape_option
def quantize(
    model: Path,
    data: str | None,
    random_data: int | None,
    plan_file: Path | None,
    table_file: Path | None,
    output: Path,
    custom_ops: tuple[str, ...],
    **given: Any,
) -> None:
    """Write the Q/DQ model. Of a large model, weights that a killed run finished are taken up."""
    from qdq.calibrate import CalibrationTable
    from qdq.finish import finish
    from qdq.graph import save
    from qdq.pipeline import load_float, quantize
    from qdq.plan import Plan
    from qdq.spool import kept

    check_output(output, model, data, plan_file, table_file, given["recipe"])
    with Bars() as bars:
        bars(0, None, "Prepare")
        chosen = Plan.load(plan_file) if plan_file else None
        rest = "auto" if chosen and chosen.rest else "fp32"
        recipe = recipe_of(given, base={"rest": rest} | (chosen.settings.to_mapping() if chosen else {}))
        if chosen and _places(recipe.settings) != _places(chosen.settings):
            raise InputError(
                f"The plan {plan_file} already says what is quantized, which --scheme, --block, --shift and --exclude "
                "cannot change. Edit the plan, or make another with `qdq plan`."
            )
        prepared = load_float(model)
        table = CalibrationTable.load(table_file) if table_file else None
        if table is not None and data is None and random_data is None:
            samples = None
        else:
            samples = samples_of(prepared, recipe, data, random_data)
        with kept(output.with_name(f".{output.name}.weights")):
            made = quantize(
                prepared,
                samples,
                settings=recipe.settings,
                plan=chosen,
                table=table,
                custom_ops=custom_ops,
                on_progress=bars,
            )
            done = finish(made.model, made.plan, rest=recipe.rest, table=made.table)
            save(done.model, output)
    for text in (*made.solution.notes, *done.notes):
        note(text)
    click.echo(f"{len(made.plan.quantized_nodes)} nodes in {made.plan.operands}: {output}")


def _places(settings: Settings) -> tuple[object, ...]:
    """The settings that decide where quantizers go; the others decide scales and codes."""
    blocks = (settings.block, settings.block_loss_db)
    return (settings.scheme, settings.shift, settings.exclude, settings.overrides, *blocks)


@main.command()
@model_argument
@output_option("the engine; its layers and manifest go beside it")
@compile_options
@click.option("--timing-cache", type=PATH, help="Of --backend trt: read if it exists, then written.")
@recipe_option
def build(model: Path, output: Path, timing_cache: Path | None, **given: Any) -> None:
    """Compile an engine from an ONNX model, quantized or not."""
    from qdq import build as job
    from qdq.graph import load

    check_output(output, model, given["recipe"])
    recipe = recipe_of(given)
    with Bars() as bars:
        shapes = job.shape_ranges(load(model), recipe.shapes, None)
        engine = job.compile_engine(model, recipe=recipe, shapes=shapes, timing_cache=timing_cache, on_progress=bars)
        job.save_engine(engine, output, model, recipe=recipe, shapes=shapes)
    click.echo(f"{engine.table.kernels} kernels for {', '.join(engine.table.targets)}: {output}")


@main.command()
@model_argument
@compile_options
@click.option("--gpu", help="Also predict the time of each kernel: t4, a10, a100, l4, rtx4090 or rtx5090.")
@recipe_option
@json_option
def audit(model: Path, gpu: str | None, as_json: bool, **given: Any) -> None:
    """Say what each node really runs in: of a Q/DQ model, which is compiled for it, or of an engine."""
    from qdq import build as job
    from qdq.report import audit_lines, audit_rows

    recipe = recipe_of(given)
    if gpu:
        _show_price(model, recipe, gpu, as_json)
        return
    with Bars() as bars:
        result = job.audit_model(model, recipe, bars) if model.suffix == ".onnx" else job.audit_engine(model)
    if as_json:
        click.echo(result.to_json(), nl=False)
        return
    show_rows(f"Audit of {model.name}", audit_rows(result))
    for line in audit_lines(result):
        note(line)


def _show_price(model: Path, recipe: Recipe, gpu: str, as_json: bool) -> None:
    from dataclasses import asdict

    from engines.cost import HEADERS, rows
    from qdq.build import price

    with Bars() as bars:
        cost = price(model, recipe, gpu, bars)
    if as_json:
        kernels = [asdict(k) for k in cost.kernels]
        click.echo(json.dumps({"gpu": cost.gpu.name, "predicted_us": cost.total_us, "kernels": kernels}, indent=1))
        return
    show_rows(f"{model.name} on {cost.gpu.name}: {cost.total_us:.1f} us predicted", [HEADERS, *rows(cost)])


@main.command()
@click.argument("float_model", type=PATH, metavar="FLOAT.onnx")
@click.argument("candidate", type=PATH, metavar="Q.onnx|ENGINE")
@data_options
@limit_options
@click.option("-o", "--output", type=PATH, help="Where to write report.json.")
@custom_ops_option
@shape_option
@recipe_option
@json_option
def check(
    float_model: Path,
    candidate: Path,
    data: str | None,
    random_data: int | None,
    output: Path | None,
    custom_ops: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Compare a quantized model, or an engine on a GPU, with the float model; limits decide the exit code."""
    from qdq.build import engine_backend
    from qdq.deploy import evaluate
    from qdq.graph import load
    from qdq.report import check_rows

    if output:
        check_output(output, float_model, candidate, data, given["recipe"])
    recipe = recipe_of(given)
    reference = load(float_model)
    samples = samples_of(reference, recipe, data, random_data)
    backend = None if candidate.suffix == ".onnx" else engine_backend(candidate)
    with Bars() as bars:
        report = evaluate(
            float_model,
            candidate,
            samples,
            limits=recipe.limits,
            engine_backend=backend,
            custom_ops=custom_ops,
            on_progress=bars,
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
@model_argument
@data_options
@click.option("--out", type=PATH, required=True, help="Folder for the results.")
@click.option("--eval", "evaluation", help="Samples to check on, in the forms of --data; default: those of --data.")
@settings_options
@rest_option
@tune_options
@compile_options
@limit_options
@custom_ops_option
@json_option
def deploy(
    model: Path,
    data: str | None,
    random_data: int | None,
    out: Path,
    evaluation: str | None,
    custom_ops: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Do it all: tune, calibrate, quantize, build, audit and check."""
    from qdq import deploy as job

    recipe = recipe_of(given)
    with Bars() as bars:
        done = job.deploy(
            model,
            lambda prepared: samples_of(prepared, recipe, data, random_data),
            out,
            recipe=recipe,
            evaluation=(lambda prepared: samples_of(prepared, recipe, evaluation, None)) if evaluation else None,
            custom_ops=custom_ops,
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
@settings_options
@shape_option
@json_option
def explain(source: Path, node: str, engine: Path | None, as_json: bool, **given: Any) -> None:
    """Say whether and why a node is quantized, by which rule, and what it costs."""
    from qdq.explain import explain as explained

    lines = explained(source, node, recipe_of(given), engine=engine)
    click.echo(json.dumps({"node": node, "lines": lines}, indent=1) if as_json else "\n".join(lines))


@main.command()
@json_option
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
@rest_option
@tune_options
@compile_options
@json_option
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
            recipe=recipe_of(given, base={"tune": "rewrites"}),  # so small a network is no faster in INT8
            evaluation=evaluation,
            labels=demo_labels(),
            on_progress=bars,
        )
    _show_deployed(done, "Demo: grey and white matter", as_json)
    _finish(done.report.check.failures)


if __name__ == "__main__":
    main()
