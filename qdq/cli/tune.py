"""`qdq tune`: the plan that the compiler's result is predicted fastest for, or measured where a GPU is here.

options -> recipe, samples if given -> qdq.tune.find_plan -> plan.json, lines of what was measured, a short table.
`qdq sensitivity`: options -> candidates, samples, perhaps workers -> qdq.tune.sensitivity -> table.json, a table.
What is heavy is imported inside the verbs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdq.cli import options
from qdq.cli.terminal import Bars, note, show_json, show_rows
from qdq.core.outputs import check_output

if TYPE_CHECKING:
    from qdq.build.recipe import Recipe
    from qdq.core.progress import Progress
    from qdq.plan.plan import Plan
    from qdq.tune.sensitivity.mixed.front import Allocation


@click.command()
@options.model_argument
@options.data_options
@options.output_option("plan.json")
@click.option(
    "--min-sqnr-db", type=float, help="Require this signal to noise ratio of the outputs, in dB; needs --data."
)
@options.cache_option
@options.mix_options
@options.tune_options
@options.unquantized_option
@options.settings_options
@options.compile_options
@options.json_option
def tune(
    model: Path,
    data: str | None,
    random_data: int | None,
    output: Path,
    sensitivity_file: Path | None,
    front_file: Path | None,
    plot_file: Path | None,
    metric_labels: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Choose by compiled results what is quantized, and which exact rewrites are made.

    What is quantized is predicted to gain time, by more than a tie; where that is not so, the nodes stay in float.
    Without --data every activation is assumed asymmetric, the most expensive case. With --minimize and limits each
    group of nodes gets a precision of its own; every plan that was looked at is kept in PLAN.front.json.
    """
    from engines.core.files import write_atomic
    from qdq.build.branches import with_possible_branches
    from qdq.build.engine import shape_ranges
    from qdq.build.measured.bench import bench_of, priced_here, why_predicted
    from qdq.build.pricing.tensorrt_pricer import pricer_of, unpriced
    from qdq.core.errors import InputError
    from qdq.deploy.report.front_plot import draw
    from qdq.deploy.report.report import Row, measured_rows
    from qdq.passes.prepare import load_float
    from qdq.tune.exact.elsewhere import elsewhere
    from qdq.tune.find_plan import find_plan

    for place in filter(None, (output, plot_file)):
        check_output(place, model, data, given["recipe"], sensitivity_file, front_file)
    if plot_file is not None and plot_file.absolute() in (output.absolute(), front_beside(output).absolute()):
        raise InputError(f"--plot and -o both write {plot_file}: give the picture a name of its own, as front.png.")
    recipe = options.recipe_of(given)
    if options.require_mix(recipe, sensitivity_file, front_file, plot=plot_file, labels=metric_labels):
        check_output(front_beside(output), model, data, given["recipe"], sensitivity_file)
        with Bars() as bars:
            plan, made = mixed(
                *(model, data, random_data, recipe),
                sensitivity_file=sensitivity_file,
                front_file=front_file,
                metric_labels=metric_labels,
                output=output,
                on_progress=bars,
            )
        plan.save(output)
        made.save(front_beside(output))
        if plot_file is not None:
            draw(made, plot_file)
        if as_json:
            show_json(made.to_json())
        else:
            show_rows(
                f"Plan of {model.name} in {output}", [*allocation_rows(made), ("front", str(front_beside(output)))]
            )
        return
    if why := unpriced(recipe):
        raise InputError(f"Nothing to tune by: {why}. Take the scheme int8, or --compiler rtx.")
    with Bars() as bars:
        bars(0, None, "Prepare")
        prepared = load_float(model)
        if prepared.trained:
            raise InputError(
                f"{model} says by quantizers of its own what is quantized, so there is nothing to tune. Take "
                "`qdq deploy`, which keeps them, or give the float model."
            )
        samples = None
        if data is not None or random_data is not None:
            samples = options.samples_of(prepared, recipe, data, random_data)
        elif "min_sqnr_db" in recipe.limits:
            raise InputError("--min-sqnr-db needs --data: accuracy is measured on samples.")
        shapes = shape_ranges(prepared, recipe.shapes, samples)
        prepared = with_possible_branches(prepared, samples, recipe=recipe, shapes=shapes, on_progress=bars)
        with bench_of(recipe, shapes) as bench:
            pricer = pricer_of(priced_here(recipe, bench), shapes)
            assert pricer is not None
            found = find_plan(prepared, pricer, samples=samples, bench=bench, on_progress=bars)
        outcome = found.outcome(pricer.told, elsewhere(prepared, pricer))
    found.plan.save(output)
    if outcome.measured:
        write_atomic(output.with_name(f"{output.name.removesuffix('.json')}.measured.jsonl"), outcome.lines)
    if as_json:
        show_json(outcome.to_json())
        return
    rows = [
        Row(outcome.label, outcome.times),
        *(Row("", gain) for gain in outcome.gains),
        *measured_rows(outcome.measured),
        Row("choice", found.summary),
        *(Row("", said) for said in (*outcome.said, outcome.elsewhere) if said),
        *(Row("kept", step) for step in found.steps),
        *(Row("", said) for said in prepared.notes),
    ]
    if why := why_predicted(recipe):
        note(why)
    show_rows(f"Tuned plan of {model.name} in {output}", rows)


def front_beside(output: Path) -> Path:
    """Where the front of a plan's search is kept."""
    return output.with_name(f"{output.name.removesuffix('.json')}.front.json")


def mixed(
    model: Path,
    data: str | None,
    random_data: int | None,
    recipe: Recipe,
    *,
    sensitivity_file: Path | None,
    front_file: Path | None,
    metric_labels: str,
    output: Path | None,
    on_progress: Progress,
    custom_ops: tuple[str, ...] = (),
) -> tuple[Plan, Allocation]:
    """The plan of several precisions that is asked for, and what it is; arguments as of the verb.

    Raises:
        InputError, EngineError, MissingRuntimeError: see `mix`.
    """
    import os

    from qdq.deploy.compare.bound import bounds
    from qdq.deploy.compare.score import labelled
    from qdq.deploy.compare.task import Task
    from qdq.measure.inference.session import registered
    from qdq.passes.prepare import load_float
    from qdq.tune.sensitivity.mixed.front import Allocation
    from qdq.tune.sensitivity.mixed.mix import mix, picked_from
    from qdq.tune.sensitivity.table import Sensitivity

    on_progress(0, None, "Prepare")
    known = Sensitivity.load(sensitivity_file) if sensitivity_file else None
    prepared = load_float(model)
    if front_file is not None:
        return picked_from(prepared, Allocation.load(front_file), recipe.pick, str(output or ""))
    array = Task(labels=metric_labels).array
    samples = options.samples_of(prepared, recipe, data, random_data, labels=array)
    scored = samples
    if array and data is not None:
        scored = labelled(data, prepared, array, volume=recipe.volume, case_key=options.case_key_of(recipe))
    libraries = tuple(os.path.abspath(path) for path in custom_ops)
    with registered(libraries):
        first = next(iter(scored)) if recipe.min_metrics else {}
        return mix(
            *(model, prepared, samples, recipe),
            known=known,
            bounds=bounds(recipe.min_metrics, prepared, first, metric_labels, recipe.class_axis),
            labelled=scored if metric_labels else None,
            custom_ops=libraries,
            output=output,
            on_progress=on_progress,
        )


def allocation_rows(made: Allocation) -> list[tuple[str, str]]:
    """What was chosen, for people."""
    nodes = ", ".join(f"{count} {text}" for text, count in made.nodes.items())
    pick, of_front = made.pick, f", {made.pick} of the front" if made.pick else ""
    asked = "; ".join(f"{option} {value}" for option, value in made.limits.items())
    rows = [
        ("chosen for", f"number {pick} of the front" if pick.isdecimal() else f"least {made.minimize}" + of_front),
        ("limits", asked),
        ("weights in the engine", f"{made.size_mib:.3f} MiB, by {made.compiled_by}; all in float {made.float_mib:.3f}"),
        ("nodes", nodes),
        ("SQNR of the outputs", f"{made.measured_db:.1f} dB with quick scales, {made.sum_db:.1f} by the sum of groups"),
        *((name, f"{value:.4f}") for name, value in made.best.values.items()),
        ("looked at", f"{made.measured} plans; the first within the limits had {made.allocated_db:.1f} dB"),
    ]
    if made.time_us is not None:
        us = made.tried[0].time_us or 0.0
        on = ", ".join(made.gpus)
        rows.insert(3, ("predicted time", f"{made.time_us:.2f} us on {on}; all in float {us:.2f}"))
    return [*(row for row in rows if row[1]), *(("", step) for step in made.steps)]


def _metrics() -> Iterable[str]:
    """The metrics of one sample."""
    from qdq.deploy.compare.one_sample import names

    return names()


@click.command()
@options.model_argument
@options.data_options
@click.option(
    "--candidates",
    multiple=True,
    help="Measure these, with commas between: schemes, with block or shift as in int4:block=32,int8:shift=off, and "
    "float. Default: int8,fp8,w4a8,int4,float, as far as the targets have them.",
)
@click.option("--metric", cls=options.Listed, names=_metrics, help="Also score against the float model by {names}.")
@options.output_option("sensitivity.json")
@options.workers_option
@options.cluster_option
@click.option("--plot", "plot_file", type=options.PATH, metavar="FILE.png", help="Draw the table.")
@click.option(
    "--target",
    multiple=True,
    cls=options.Listed,
    names=options.targets,
    help="Take candidates that these have: {names}; default sm89; repeatable.",
)
@options.compiler_option
@options.exclude_option
@options.unquantized_option
@options.custom_ops_option
@options.recipe_option
@options.cache_option
@options.json_option
def sensitivity(
    model: Path,
    data: str | None,
    random_data: int | None,
    metric: str | None,
    output: Path,
    workers: int | None,
    cluster: str | None,
    plot_file: Path | None,
    custom_ops: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Measure what each group of nodes costs at the outputs in each precision, without labels.

    A group are nodes that must have one precision, such as those that read one tensor. All else stays in float.
    Killed at any moment, the same command goes on where it was.
    """
    import os

    from qdq.cli.calibrate import pool_of, reopened
    from qdq.deploy.compare.one_sample import of_samples
    from qdq.deploy.report.picture import require_form
    from qdq.measure.inference.session import registered
    from qdq.passes.prepare import load_float
    from qdq.tune.sensitivity.find import Workers, beside, find, possible
    from qdq.tune.sensitivity.run import forget

    for place in filter(None, (output, plot_file)):
        check_output(place, model, data, given["recipe"], *custom_ops)
    if plot_file is not None:
        require_form(plot_file)
    recipe, libraries = options.recipe_of(given), tuple(os.path.abspath(path) for path in custom_ops)
    texts = possible(recipe.settings, recipe.targets, recipe.candidates)
    pool = pool_of(workers, cluster)
    with Bars() as bars, registered(libraries):
        bars(0, None, "Prepare")
        prepared = load_float(model)
        samples = options.samples_of(prepared, recipe, data, random_data)
        if beside(output).exists():
            note(f"Going on with the unfinished table in {beside(output)}.")
        made = find(
            model,
            prepared,
            samples,
            settings=recipe.settings,
            texts=texts,
            unquantized_type=recipe.unquantized_type,
            metric=of_samples(metric, prepared, next(iter(samples))) if metric else None,
            workers=Workers(pool=pool, source=reopened(samples, data, recipe)) if pool else None,
            custom_ops=libraries,
            output=output,
            on_progress=bars,
        )
    made.save(output)
    forget(beside(output))
    if plot_file is not None:
        from qdq.deploy.report.sensitivity_plot import draw

        draw(made, plot_file)
    if as_json:
        show_json(made.to_json())
        return
    title = (
        f"Sensitivity of {model.name} on {made.samples} samples, SQNR in dB{f', {metric}' if metric else ''}: {output}"
    )
    show_rows(title, made.rows())
    for text in (*made.notes(), *([options.RANDOM_NOTE] if random_data else [])):
        note(text)
    if plot_file is not None:
        click.echo(f"Picture: {plot_file}")
