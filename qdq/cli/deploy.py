"""The whole job as a verb: deploy; what is deployed at work: segment; and the demo."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdq.cli import options
from qdq.cli.terminal import Bars, note, show_rows, warn
from qdq.core.outputs import check_output

if TYPE_CHECKING:
    from engines.verify.report import Report
    from qdq.build.recipe import Recipe
    from qdq.deploy.deploy import Deployed


@click.command()
@options.model_argument
@options.data_options
@click.option("--out", type=options.PATH, required=True, help="Write the results to this folder.")
@click.option("--eval", "evaluation", help="Check on these samples, in the forms of --data; default: those of --data.")
@options.settings_options
@options.unquantized_option
@options.tune_options
@options.compile_options
@options.judging_options
@options.share_option
@options.overlap_option
@options.custom_ops_option
@options.json_option
def deploy(
    model: Path,
    data: str | None,
    random_data: int | None,
    out: Path,
    evaluation: str | None,
    allow_overlap: bool,
    custom_ops: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Do it all: tune, calibrate, quantize, build, audit and check."""
    from qdq.deploy.deploy import deploy as deployed
    from qdq.deploy.report import warning_lines

    recipe = options.recipe_of(given)
    with Bars() as bars:
        done = deployed(
            model,
            lambda prepared: options.samples_of(prepared, recipe, data, random_data),
            out,
            recipe=recipe,
            evaluation=(lambda prepared: options.samples_of(prepared, recipe, evaluation, None))
            if evaluation
            else None,
            allow_overlap=allow_overlap,
            custom_ops=custom_ops,
            on_progress=bars,
            notes=[] if random_data is None else [options.RANDOM_NOTE],
        )
    _show_deployed(done, model.name, as_json)
    finish_with(done.report.failures, warning_lines(done.report.check))


def _show_deployed(done: Any, name: str, as_json: bool) -> None:
    from qdq.deploy.report import audit_lines

    if as_json:
        click.echo(done.report.to_json(), nl=False)
        return
    show_rows(f"{name} {done.report.title}", done.report.rows())
    show_volumes(done.report.check)
    for line in (*audit_lines(done.report.audit), *done.report.notes):
        note(line)
    click.echo(f"Results: {done.folder.resolve()}")


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
def segment(
    model: Path,
    data: str,
    out: Path,
    form: str,
    write_map: Path | None,
    custom_ops: tuple[str, ...],
    **given: Any,
) -> None:
    """Segment images: labels as files on the images' own grids, and the names of structures.

    Files are named by the number of an image in the order of names, and by its key.
    """
    from calib_data import open_samples
    from qdq.deploy.volumes import case_map, dicom_seg
    from qdq.deploy.volumes.segment import opened
    from qdq.deploy.volumes.segment import segment as segmented

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
    click.echo(f"{len(made.files)} image{'s' * (len(made.files) > 1)}: {out.resolve()}")
    if form == "dicom-seg":
        warn([f"{dicom_seg.WARNING}."])
    if write_map:
        case_map.write_private(write_map, case_map.case_map(made.cases, made.files))
        click.echo(f"Map: {write_map}")
        warn([f"{case_map.WARNING}."])


@click.command()
@click.option(
    "--out", type=options.PATH, default=Path("qdq-demo"), show_default=True, help="Write the results to this folder."
)
@options.unquantized_option
@options.tune_options
@options.compiler_option
@options.compile_options
@options.json_option
def demo(out: Path, as_json: bool, **given: Any) -> None:
    """Deploy the 3-D brain segmentation network and the brain volume that the package ships.

    Where INT8 does not pay, a second table shows what it is like all the same.
    """
    from engines.core.documents import replace
    from qdq.deploy.demo import demo_labels, demo_model, demo_samples
    from qdq.deploy.deploy import deploy as deployed
    from qdq.deploy.report import warning_lines

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
            )

        done = deploy_to(out, recipe)
        if recipe.tune == "placement" and not done.quantized:
            everywhere = deploy_to(out / "int8", replace(recipe, tune="rewrites"))
    _show_deployed(done, "Demo: grey and white matter,", as_json)
    if everywhere and not as_json:
        slower = " and predicted slower" if everywhere.report.slower else ""
        show_rows(f"Smaller still{slower}: INT8 wherever it is possible (--tune rewrites)", everywhere.report.brief())
        click.echo(f"Results: {everywhere.folder.resolve()}")
    finish_with(done.report.failures, warning_lines(done.report.check))
