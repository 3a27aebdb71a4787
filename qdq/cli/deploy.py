"""The whole job as a verb: deploy; what is deployed at work: segment; the demo; and the page of a run: report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdq.cli import options
from qdq.cli.terminal import Bars, note, show_json, show_rows, warn
from qdq.cli.tune import allocation_rows, mixed
from qdq.core.errors import InputError
from qdq.core.outputs import check_output

if TYPE_CHECKING:
    from engines.verify.report import Report
    from qdq.assemble.tables import Measure
    from qdq.build.recipe import Recipe
    from qdq.core.progress import Progress
    from qdq.deploy.deploy import Deployed
    from qdq.measure.table import CalibrationTable
    from qdq.plan.plan import Plan


@click.command()
@options.any_model_argument
@options.data_options
@click.option("--out", type=options.PATH, required=True, help="Write the results to this folder.")
@options.export_options
@click.option("--eval", "evaluation", help="Check on these samples, in the forms of --data; default: those of --data.")
@options.made_options
@options.workers_option
@options.settings_options
@options.unquantized_option
@options.mix_options
@options.tune_options
@options.compile_options
@options.judging_options
@options.share_option
@options.overlap_option
@click.option(
    "--with-images",
    is_flag=True,
    help="Show slices of your images on the page where whole volumes disagree most; they are kept in slices.npz. "
    "Without it no pixel is kept.",
)
@options.custom_ops_option
@options.cache_option
@options.json_option
def deploy(
    model: Path,
    data: str | None,
    random_data: int | None,
    out: Path,
    evaluation: str | None,
    plan_file: Path | None,
    table_file: Path | None,
    workers: int | None,
    sensitivity_file: Path | None,
    front_file: Path | None,
    plot_file: Path | None,
    metric_labels: str,
    allow_overlap: bool,
    with_images: bool,
    custom_ops: tuple[str, ...],
    dynamic: tuple[str, ...],
    opset: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Do it all: export where MODEL is no ONNX file, then tune, calibrate, quantize, build, audit and check."""
    from qdq.deploy.compare.task import Task
    from qdq.deploy.deploy import deploy as deployed
    from qdq.deploy.report.front_plot import draw
    from qdq.deploy.report.report import warning_lines
    from qdq.deploy.trace.command import command_of
    from qdq.measure.table import CalibrationTable
    from qdq.plan.plan import Plan

    asked = options.asked_of(model, given, data=data, evaluation=evaluation, needed=random_data is None)
    plan = Plan.load(plan_file) if plan_file else None
    recipe, notes = options.recipe_of_plan(given, plan, plan_file), [] if random_data is None else [options.RANDOM_NOTE]
    mixing = options.require_mix(
        recipe, sensitivity_file, front_file, plot=plot_file, labels=metric_labels, checks=True
    )
    made, labels = None, Task(labels=metric_labels).array
    if plot_file is not None:
        check_output(plot_file, model, data, evaluation, given["recipe"], sensitivity_file, front_file)
    if mixing and (plan or table_file):
        raise InputError("--minimize and --pick make a plan of their own, and its table: leave out --plan and --table.")
    if table_file and plan is None and recipe.tune != "off":
        raise InputError(
            "--table holds the tensors of one plan, and a tuned plan may need others: give that --plan too, or --tune "
            "off. A folder for --cache remembers tables by itself."
        )
    table = CalibrationTable.load(table_file) if table_file else None
    with Bars() as bars, options.as_onnx(model, out, recipe, data, dynamic, opset, asked) as (path, exported):
        data, evaluation = options.sources(exported, data, evaluation)
        if mixing:
            plan, made = mixed(
                *(path, data, random_data, recipe),
                sensitivity_file=sensitivity_file,
                front_file=front_file,
                metric_labels=metric_labels,
                output=None,
                on_progress=bars,
                custom_ops=custom_ops,
            )
            recipe = options.recipe_of_mix(given, plan)
            notes.append("; ".join(f"{a}: {b}" for a, b in allocation_rows(made) if a))
            if plot_file is not None:
                draw(made, plot_file)
        done = deployed(
            path,
            lambda prepared: options.samples_of(prepared, recipe, data, random_data, labels=labels),
            out,
            recipe=recipe,
            evaluation=(lambda prepared: options.samples_of(prepared, recipe, evaluation, None, labels=labels))
            if evaluation
            else None,
            plan=plan,
            allocation=made,
            calibrated=table,
            measure=_on_workers(path, data, random_data, recipe, workers, custom_ops, labels),
            allow_overlap=allow_overlap,
            with_images=with_images,
            custom_ops=custom_ops,
            on_progress=bars,
            notes=notes,
            command=command_of(click.get_current_context()),
            exported=exported,
        )
    _show_deployed(done, path.name, as_json)
    finish_with(done.report.failures, warning_lines(done.report.check))


def _on_workers(
    model: Path,
    data: str | None,
    random_data: int | None,
    recipe: Recipe,
    workers: int | None,
    libraries: Sequence[str],
    labels: str,
) -> Measure | None:
    """What calibrates on several processes, None for this one."""
    if workers is None:
        return None
    from qdq.cli.calibrate import reopened
    from qdq.core.resources import given_bytes
    from qdq.measure.shards import collect_shards, local_pool
    from qdq.passes.prepare import load_float

    pool = local_pool(workers)

    def measure(plan: Plan, on_progress: Progress | None) -> CalibrationTable:
        samples = options.samples_of(load_float(model), recipe, data, random_data, labels=labels)
        return collect_shards(
            model,
            plan,
            reopened(samples, data, recipe, labels),
            pool,
            total=samples.len_or_none(),
            custom_ops=tuple(os.path.abspath(path) for path in libraries),
            memory=given_bytes(),
            on_progress=on_progress,
        )

    return measure


def _show_deployed(done: Any, name: str, as_json: bool) -> None:
    from qdq.deploy.report.report import audit_lines

    if as_json:
        show_json(done.report.to_json())
        return
    show_rows(f"{name} {done.report.title}", done.report.rows())
    show_volumes(done.report.check)
    for line in (*audit_lines(done.report.audit), *done.report.notes):
        note(line)
    _show_places(done)


def _show_places(done: Any) -> None:
    click.echo(f"Results: {done.folder.resolve()}")
    click.echo(f"Page: {done.page.resolve()}")


def show_volumes(report: Report) -> None:
    """The tables of whole volumes, where any were run."""
    from qdq.deploy.volumes.table import lines, tables

    if report.volumes:
        for title, rows in tables(report.volumes):
            show_rows(title, rows)
        for line in lines(report.volumes):
            note(line)


def finish_with(failures: list[str], warnings: Iterable[str] = ()) -> None:
    """Name what is poor and the limits that failed, and end with 1 if there are any."""
    warn(warnings)
    for failure in failures:
        click.echo(f"Failed: {failure}", err=True)
    if failures:
        click.get_current_context().exit(1)


@click.command()
@click.argument("model", type=options.PATH, metavar="MODEL|ENGINE")
@options.memory_option
@click.option("--data", required=True, help="Read images from this folder or file.")
@options.image_options
@options.window_option
@click.option("-o", "--out", type=options.PATH, required=True, help="Write the labels to this folder.")
@click.option(
    "--form",
    type=click.Choice(["nifti", "dicom-seg"]),
    default="nifti",
    show_default=True,
    help="Write NIfTI files, which hold nothing of the patient; or DICOM segmentation objects for the archive that the "
    "series came from, which hold the patient's name and identifiers, as DICOM demands.",
)
@click.option(
    "--write-map",
    type=options.PATH,
    metavar="CSV",
    help="Write which image each label file is of: paths and series, which can identify patients. Default: nothing "
    "tells.",
)
@click.option("--task", cls=options.Listed, names=options.tasks, help="Take the output for: {names}.")
@click.option("--class-axis", type=int, help="Look for classes on this axis; default: as the graph says.")
@options.custom_ops_option
@options.recipe_option
@options.json_option
def segment(
    model: Path,
    data: str,
    out: Path,
    form: str,
    write_map: Path | None,
    custom_ops: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Segment images: labels as files on the images' own grids, and the names of structures.

    Files are named by the number of an image in the order of names, and by its key.
    """
    from calib_data import open_samples
    from qdq.deploy.volumes.forms import case_map, dicom_seg
    from qdq.deploy.volumes.segment import opened, segment as segmented

    recipe = options.recipe_of(given)
    if write_map:
        check_output(write_map, model, data, given["recipe"])
    found = opened(model, custom_ops=custom_ops)
    samples = open_samples(data, found.inputs, volume=recipe.volume, case_key=options.case_key_of(recipe))
    options.note_left_out(samples.source)
    with Bars() as bars:
        made = segmented(
            found,
            samples,
            recipe.whole,
            out,
            form=form,
            task=recipe.task,
            class_axis=recipe.class_axis,
            on_progress=bars,
        )
    note(made.said)
    warnings = []
    if form == "dicom-seg":
        warnings.append(f"{dicom_seg.WARNING}.")
    if write_map:
        case_map.write_private(write_map, case_map.case_map(made.cases, made.files))
        warnings.append(f"{case_map.WARNING}.")
    if as_json:
        from qdq.cli.answer.documents import SegmentAnswer

        answer = SegmentAnswer(
            folder=str(out.resolve()), files=(*made.files, "labels.json"), notes=(made.said, *warnings)
        )
        show_json(answer.to_json())
    else:
        click.echo(f"{len(made.files)} image{'s' * (len(made.files) > 1)}: {out.resolve()}")
        if write_map:
            click.echo(f"Map: {write_map}")
    warn(warnings)


@click.command()
@click.option(
    "--out", type=options.PATH, default=Path("qdq-demo"), show_default=True, help="Write the results to this folder."
)
@options.unquantized_option
@options.tune_options
@options.compiler_option
@options.compile_options
@options.cache_option
@options.json_option
def demo(out: Path, as_json: bool, **given: Any) -> None:
    """Deploy the 3-D brain segmentation network and the brain volume that the package ships.

    Where INT8 does not pay, a second table shows what it is like all the same.
    """
    from engines.core.documents import replace
    from qdq.deploy.demo import demo_labels, demo_model, demo_samples
    from qdq.deploy.deploy import deploy as deployed
    from qdq.deploy.report.report import warning_lines
    from qdq.deploy.trace.command import command_of

    calibration, evaluation = demo_samples()
    recipe, labels, everywhere = options.recipe_of(given), demo_labels(), None
    with Bars() as bars:

        def deploy_to(folder: Path, recipe: Recipe) -> Deployed:
            return deployed(
                demo_model(),
                calibration,
                folder,
                recipe=recipe,
                evaluation=evaluation,
                labels=labels,
                on_progress=bars,
                command=command_of(click.get_current_context()),
            )

        done = deploy_to(out, recipe)
        if recipe.tune == "placement" and not done.quantized:
            everywhere = deploy_to(out / "int8", replace(recipe, tune="rewrites"))
    _show_deployed(done, "Demo: grey and white matter,", as_json)
    if everywhere and not as_json:
        slower = " and predicted slower" if everywhere.report.slower else ""
        show_rows(f"Smaller still{slower}: INT8 wherever it is possible (--tune rewrites)", everywhere.report.brief())
        _show_places(everywhere)
    finish_with(done.report.failures, warning_lines(done.report.check))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=options.PATH, metavar="DIR [DIR]")
@click.option(
    "-o",
    "--output",
    type=options.PATH,
    help="Write the page here; default: report.html beside report.json, of two runs changes.html in this folder.",
)
@click.option("--with-images", is_flag=True, help="Show the slices that `deploy --with-images` kept.")
@options.json_option
def report(runs: tuple[Path, ...], output: Path | None, with_images: bool, as_json: bool) -> None:
    """Make the page of a run again from its folder, or a page of what differs between two runs.

    DIR is what `deploy` or `demo` wrote, or the JSON file of `compare`.
    """
    from engines.verify.covered import read_sums, refresh_sums
    from qdq.cli.answer.documents import PageAnswer
    from qdq.core.files import write_text
    from qdq.deploy.page.folder import PAGE, page_beside
    from qdq.deploy.page.render import page, page_of_changes

    if len(runs) > 2:
        raise InputError(f"{len(runs)} runs are given: `qdq report` makes the page of one, or compares two.")
    if len(runs) == 2 and with_images:
        raise InputError("--with-images is for the page of one run: leave it out where two are compared.")
    place = output or (Path("changes.html") if len(runs) == 2 else page_beside(runs[0]))
    homes = [page_beside(run).parent for run in runs]
    read = [file for home in homes if home.is_dir() for file in home.iterdir() if file.suffix != ".html"]
    check_output(place, *runs, *read)
    text = page_of_changes(*runs) if len(runs) == 2 else page(runs[0], with_images=with_images)
    home = place.parent
    covered = place.name == PAGE and (home.resolve() in {h.resolve() for h in homes} or PAGE in read_sums(home))
    write_text(place, text)
    if covered:
        refresh_sums(home, PAGE)
    if as_json:
        show_json(PageAnswer(page=str(place.resolve())).to_json())
    else:
        click.echo(f"Page: {place.resolve()}")
