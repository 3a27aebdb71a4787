"""The verb `calibrate`: in one process, in many, on a cluster; killed and continued; merged; drawn.

options -> plan, samples, checkpoint -> `calibrate.collect` or `shards.collect_shards` -> table.json, pictures.
Must not measure anything itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdq.cli import options
from qdq.cli.options.read import opener
from qdq.cli.terminal import Bars, note, show_json
from qdq.core.errors import InputError
from qdq.core.outputs import check_output

if TYPE_CHECKING:
    from calib_data import InputSpec, Samples
    from calib_data.volumes.spec import VolumeSpec
    from qdq.build.recipe import Recipe
    from qdq.core.progress import Progress
    from qdq.measure.shards import Pool
    from qdq.measure.table import CalibrationTable
    from qdq.model.model import Model
    from qdq.plan.plan import Plan


@click.command()
@click.argument("files", nargs=-1, type=options.PATH, metavar="MODEL | --merge TABLE...")
@options.data_options
@click.option("--plan", "plan_file", type=options.PATH, help="Take this plan.json in place of a new plan.")
@options.output_option("table.json")
@click.option("--merge", is_flag=True, help="Make one table of several, given in place of MODEL.")
@options.workers_option
@options.cluster_option
@click.option("--provider", default="cpu", show_default=True, help="Run ONNX Runtime on cpu or cuda.")
@options.custom_ops_option
@click.option(
    "--plot", "plot_folder", type=options.PATH, metavar="DIR", help="Draw each tensor's histogram and thresholds."
)
@options.place_options
@options.shape_option
@options.cache_option
@options.json_option
def calibrate(
    files: tuple[Path, ...],
    data: str | None,
    random_data: int | None,
    plan_file: Path | None,
    output: Path,
    merge: bool,
    workers: int | None,
    cluster: str | None,
    provider: str,
    custom_ops: tuple[str, ...],
    plot_folder: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure the tensors that a plan quantizes, and the largest magnitude of every other.

    Killed at any moment, the same command goes on where it was. `--merge A.json B.json -o C.json` unites tables of
    different samples.
    """
    check_output(output, *files, data, plan_file, given["recipe"], *custom_ops)
    if merge:
        table = _merged(files)
        table.save(output)
    elif len(files) != 1:
        raise InputError(f"{len(files)} files are given: `qdq calibrate` takes one model, or tables with --merge.")
    else:
        from qdq.core.resources import given_bytes

        running: dict[str, Any] = {
            "provider": provider,
            "custom_ops": tuple(os.path.abspath(path) for path in custom_ops),
            "memory": given_bytes(),
        }
        prepared, plan, table = _measured(
            files[0], data, random_data, plan_file, output, options.recipe_of(given), pool_of(workers, cluster), running
        )
    magnitudes, drawn = f"the largest magnitude of {len(table.ranges)}", None
    if not as_json:
        click.echo(f"{len(table.tensors)} tensors measured on {table.count} samples, and {magnitudes}: {output}")
    notes = [f"{table.repeated} samples are equal to others and count as often as they are there."]
    for text in notes if table.repeated else ():
        note(text)
    if plot_folder is not None and not merge:
        from qdq.deploy.report.plots import draw

        drawn = draw(prepared, plan, table, plot_folder)
        if not as_json:
            click.echo(f"Histograms and thresholds: {drawn}")
    if as_json:
        from qdq.cli.answer.documents import CalibrateAnswer

        answer = CalibrateAnswer(
            table=str(output),
            tensors=len(table.tensors),
            magnitudes=len(table.ranges),
            samples=table.count,
            repeated=table.repeated,
            pictures=None if drawn is None else str(drawn),
            notes=tuple(notes if table.repeated else ()),
        )
        show_json(answer.to_json())


def pool_of(workers: int | None, cluster: str | None) -> Pool | None:
    """Where to run; None for this process.

    Raises:
        InputError: both are given, or see `shards`.
    """
    from qdq.measure.shards import dask_pool, local_pool

    if workers is not None and cluster is not None:
        raise InputError("Both --workers and --cluster are given: choose one.")
    if cluster is not None:
        return dask_pool(cluster)
    return None if workers is None else local_pool(workers)


def _measured(
    model: Path,
    data: str | None,
    random_data: int | None,
    plan_file: Path | None,
    output: Path,
    recipe: Recipe,
    pool: Pool | None,
    running: dict[str, Any],
) -> tuple[Model, Plan, CalibrationTable]:
    """Measure and write the table, going on from a checkpoint beside it."""
    from qdq.assemble.tables import measured
    from qdq.core.files import write_text
    from qdq.measure.checkpoint import Checkpoint
    from qdq.measure.collect import collect, key
    from qdq.measure.inference.memory import passes
    from qdq.measure.shards import collect_shards
    from qdq.passes.prepare import load_float
    from qdq.plan import placement
    from qdq.plan.plan import Plan

    with Bars() as bars:
        bars(0, None, "Prepare")
        prepared = load_float(model)
        samples = options.samples_of(prepared, recipe, data, random_data)
        plan = Plan.load(plan_file) if plan_file else placement.plan(prepared, recipe.settings)
        prepared = plan.form(prepared)
        made_of = key(prepared, plan, provider=running["provider"], custom_ops=running["custom_ops"])
        checkpoint = Checkpoint.beside(output, made_of)
        if checkpoint.path.exists():
            note(f"Going on with the unfinished calibration in {checkpoint.path}.")
        names = list(dict.fromkeys(p.tensor for p in plan.activations))
        layout = passes(prepared, names, next(iter(samples)), memory=running["memory"])
        if len(layout.groups) > 1:
            note(
                f"{len(names)} tensors do not fit the memory at once: {len(layout.groups)} passes over the samples, of "
                f"at most {layout.bytes_each / 1e6:.0f} MB of activations."
            )

        def measure(plan: Plan, on_progress: Progress | None) -> CalibrationTable:
            if pool is None:
                return collect(prepared, plan, samples, checkpoint=checkpoint, on_progress=on_progress, **running)
            return collect_shards(
                model,
                plan,
                reopened(samples, data, recipe),
                pool,
                total=samples.len_or_none(),
                checkpoint=checkpoint,
                on_progress=on_progress,
                **running,
            )

        usual = running["provider"] == "cpu" and not running["custom_ops"]  # as every other stage measures
        table = measured(prepared, plan, samples, by=measure, on_progress=bars) if usual else measure(plan, bars)
    write_text(output, table.to_json(), resumed=True)
    checkpoint.remove()
    return prepared, plan, table


def reopened(samples: Samples, data: str | None, recipe: Recipe, labels: str = "") -> Callable[[], Samples]:
    """What opens the samples anew in a worker; `data` is the option, None for random ones, `labels` as of `opener`."""
    from calib_data.elements import limited_to
    from calib_data.volumes.monai import trusted

    where = os.path.abspath(data) if data is not None and os.path.exists(data.rpartition(":")[0] or data) else data
    how = (recipe.volume, options.case_key_of(recipe), trusted(), limited_to(), labels)
    return partial(_open, where, samples.inputs, *how) if where else partial(replace, samples)


def _open(
    data: str,
    inputs: tuple[InputSpec, ...],
    volume: VolumeSpec | None,
    case_key: bytes | None,
    trust: bool,
    limit: int | None,
    labels: str,
) -> Samples:
    """In a worker: the samples."""
    from calib_data.elements import limiting
    from calib_data.volumes.monai import trust_here

    trust_here(trust)
    with nullcontext() if limit is None else limiting(limit):
        return opener(labels)(data, inputs, volume=volume, case_key=case_key)


def _merged(files: tuple[Path, ...]) -> CalibrationTable:
    """The union of some tables.

    Raises:
        InputError: fewer than two.
    """
    from qdq.measure.table import CalibrationTable, merged

    if len(files) < 2:
        raise InputError("--merge needs two tables or more: qdq calibrate --merge a.json b.json -o all.json")
    return merged([CalibrationTable.load(path) for path in files], [str(path) for path in files])
