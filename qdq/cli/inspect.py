"""What is known of a plan, samples, a machine or a file alone: explain, data, doctor, measure-gpu, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qdq.cli import options
from qdq.cli.terminal import Bars, note, show_rows
from qdq.core.outputs import check_output


@click.command()
@click.argument("source", type=options.PATH, metavar="MODEL|PLAN.json")
@click.argument("node")
@click.option("--engine", type=options.PATH, help="Also say which kernel of this engine runs the node.")
@options.settings_options
@options.shape_option
@options.json_option
def explain(source: Path, node: str, engine: Path | None, as_json: bool, **given: Any) -> None:
    """Say whether and why a node is quantized, by which rule, and what it costs."""
    from qdq.deploy.explain import explain as explained

    lines = explained(source, node, options.recipe_of(given), engine=engine)
    click.echo(json.dumps({"node": node, "lines": lines}, indent=1) if as_json else "\n".join(lines))


@click.command()
@click.argument("source", metavar="DATA")
@click.option("--preview", type=options.PATH, metavar="OUT.png", help="Draw what a model will see of the first images.")
@click.option("--write-recipe", type=options.PATH, metavar="FILE", help="Write the `volume:` block; - prints it.")
@options.image_options
@options.recipe_option
@options.json_option
def data(source: str, preview: Path | None, write_recipe: Path | None, as_json: bool, **given: Any) -> None:
    """Say what samples hold: arrays, or images and what a recipe or --preprocess makes of them."""
    from calib_data.sources import ImageForm, form_of
    from calib_data.volumes.prepare import described, require_one_geometry
    from calib_data.volumes.preview import preview as drawn
    from calib_data.volumes.samples import cases_of
    from calib_data.volumes.spec import VolumeSpec, block
    from engines.core.files import write_atomic
    from qdq.core.errors import InputError

    for path in filter(None, (preview, write_recipe)):
        check_output(path, source, given["recipe"])
    recipe, form = options.recipe_of(given), form_of(source)
    if not isinstance(form, ImageForm):
        if preview or write_recipe or recipe.volume:
            raise InputError(
                "These samples are arrays, which are given as a model gets them: there is no image in them."
            )
        found = {name: [list(array.shape), str(array.dtype)] for name, array in form.arrays(source).items()}
        rows = [(name, "x".join(map(str, shape)), dtype) for name, (shape, dtype) in found.items()]
        _show(found, f"One of the samples: {form.says}", rows or [("arrays without names", "", "")], as_json)
        return
    spec = recipe.volume or VolumeSpec(intensity="stored")
    cases = cases_of(form, source, options.case_key_of(recipe))
    options.note_left_out(cases)
    require_one_geometry(cases, spec)
    with Bars() as bars:
        images = []
        for done, case in enumerate(cases, 1):
            images.append(described(case, spec))
            bars(done, len(cases), "read")
    _show(
        images,
        f"{len(cases)} image{'s' * (len(cases) > 1)}: {form.says}",
        [tuple(image.values()) for image in images],
        as_json,
    )
    if write_recipe and str(write_recipe) != "-":
        write_atomic(write_recipe, block(spec).encode())
        click.echo(f"Recipe: {write_recipe}")
    elif write_recipe:
        click.echo(block(spec), nl=False)
    if preview:
        write_atomic(preview, drawn(cases, spec))
        click.echo(f"Preview: {preview}")


def _show(plain: object, title: str, rows: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(plain, indent=1))
    else:
        show_rows(title, rows)


@click.command()
@options.json_option
def doctor(as_json: bool) -> None:
    """Say which runtimes and GPUs are here, and what will and will not work."""
    from dataclasses import asdict

    from engines.backends.doctor import diagnose

    findings = diagnose()
    if as_json:
        click.echo(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        show_rows("This machine", [("ok" if f.ok else "--", f.name, f.detail, f.fix) for f in findings])


@click.command("measure-gpu")
@options.output_option("gpu.yaml, a recipe with what was measured")
@click.option(
    "--compiler",
    cls=options.Listed,
    names=options.compiler_names,
    help="Compile with {names}; default: the first that is installed and has this GPU.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.2, 60),
    default=3.0,
    show_default=True,
    help="Run each large product that long: the clock falls under load.",
)
@options.json_option
def measure_gpu(output: Path, compiler: str | None, seconds: float, as_json: bool) -> None:
    """Measure this machine's GPU, so that predicted times become those of this GPU.

    Starts of kernels, bandwidths, rates in each type, and how FP16 products accumulate. Nothing else should use the GPU
    meanwhile. Then: qdq deploy MODEL --data DATA --recipe gpu.yaml.
    """
    from engines.backends.profile import profile_named
    from engines.core.files import write_atomic
    from engines.timing.driver import Driver
    from engines.timing.events import EventTimer
    from engines.timing.gpu_file import measured_gpu
    from engines.timing.machine import Monitor
    from engines.timing.measure import backend_for

    check_output(output)
    with Driver() as driver, Bars() as bars:
        card = driver.card()
        backend = backend_for(card, compiler and profile_named(compiler).backend)
        with Monitor(card.bus) as monitor:
            found = measured_gpu(card, backend, EventTimer(driver), seconds=seconds, on_probe=bars)
        watched = monitor.watched()
    write_atomic(output, found.text())
    if as_json:
        click.echo(json.dumps({**found.to_mapping(), "watched": watched.to_mapping()}, indent=1))
        return
    show_rows(f"{card.name} ({card.target}), measured with {backend.title}", found.rows())
    note(watched.summary())
    click.echo(f"Recipe: {output}")


@click.command()
@click.argument("name", metavar="FILE")
def schema(name: str) -> None:
    """Print the JSON Schema of a file that qdq reads or writes, such as plan, recipe, report or manifest."""
    from qdq.deploy.report.schemas import schema as schema_of

    click.echo(json.dumps(schema_of(name), indent=1))
