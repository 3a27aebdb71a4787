"""What is known of a plan, samples, a machine or a file alone: explain, data, doctor, measure-gpu, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qdq.cli import options
from qdq.cli.terminal import Bars, note, show_json, show_rows
from qdq.core.errors import MissingRuntimeError
from qdq.core.outputs import check_output


@click.command()
@click.argument("source", type=options.PATH, metavar="MODEL|PLAN.json")
@click.argument("node")
@click.option("--engine", type=options.PATH, help="Also say which kernel of this engine runs the node.")
@click.option("--sensitivity", type=options.PATH, help="Also say what this table of `qdq sensitivity` has of the node.")
@options.settings_options
@options.shape_option
@options.json_option
def explain(
    source: Path, node: str, engine: Path | None, sensitivity: Path | None, as_json: bool, **given: Any
) -> None:
    """Say whether and why a node is quantized, by which rule, and what it costs."""
    from qdq.deploy.explain import explain as explained

    lines = explained(source, node, options.recipe_of(given), engine=engine, sensitivity=sensitivity)
    if as_json:
        from qdq.cli.answer.documents import ExplainAnswer

        show_json(ExplainAnswer(node=node, lines=tuple(lines)).to_json())
    else:
        click.echo("\n".join(lines))


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
    from qdq.cli.answer.documents import ArrayOf, DataAnswer, SeenImage
    from qdq.core.errors import InputError

    for path in filter(None, (preview, write_recipe)):
        check_output(path, source, given["recipe"])
    recipe, form = options.recipe_of(given), form_of(source)
    if not isinstance(form, ImageForm):
        if preview or write_recipe or recipe.volume:
            raise InputError(
                "These samples are arrays, which are given as a model gets them: there is no image in them."
            )
        found = {name: ArrayOf(shape=a.shape, dtype=str(a.dtype)) for name, a in form.arrays(source).items()}
        if as_json:
            show_json(DataAnswer(form=form.says, arrays=found, images=(), recipe=None, notes=()).to_json())
            return
        rows = [(name, "x".join(map(str, array.shape)), array.dtype) for name, array in found.items()]
        show_rows(f"One of the samples: {form.says}", rows or [("arrays without names", "", "")])
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
    if not as_json:
        title = f"{len(cases)} image{'s' * (len(cases) > 1)}: {form.says}"
        show_rows(title, [tuple(image.values()) for image in images])
    said = []
    if write_recipe and str(write_recipe) != "-":
        write_atomic(write_recipe, block(spec).encode())
        said.append(f"Recipe: {write_recipe}")
    elif write_recipe and not as_json:
        click.echo(block(spec), nl=False)
    if preview:
        write_atomic(preview, drawn(cases, spec))
        said.append(f"Preview: {preview}")
    if not as_json:
        for line in said:
            click.echo(line)
        return
    left_out = getattr(cases, "left_out", "")
    answer = DataAnswer(
        form=form.says,
        arrays={},
        images=tuple(SeenImage(**image) for image in images),
        recipe=block(spec) if write_recipe else None,
        notes=tuple(filter(None, (left_out, *said))),
    )
    show_json(answer.to_json())


def _purposes() -> list[str]:
    from engines.backends.doctor import PURPOSES

    return [f"{name} ({what})" for name, what in PURPOSES.items()]


@click.command()
@click.option(
    "--for",
    "purpose",
    metavar="PURPOSE",
    cls=options.Listed,
    names=_purposes,
    help="End with 3 unless this machine can {names}; imports the runtimes, so that a health check means something.",
)
@click.option(
    "--compiler", cls=options.Listed, names=options.compiler_names, help="With --for: by {names}; default: any of them."
)
@options.json_option
def doctor(purpose: str | None, compiler: str | None, as_json: bool) -> None:
    """Say which runtimes and GPUs are here, and what will and will not work."""
    from engines.backends.backend import backend_named
    from engines.backends.doctor import PURPOSES, examined
    from engines.backends.profile import profile_named
    from qdq.core.choices import choose
    from qdq.core.errors import InputError

    if compiler and not purpose:
        raise InputError("--compiler says by which compiler --for is meant: give --for build, or leave it out.")
    backend = backend_named(profile_named(compiler).backend) if compiler else None
    found = examined(choose(purpose, tuple(PURPOSES), "purpose") if purpose else "", backend)
    if as_json:
        show_json(found.to_json())
    else:
        show_rows("This machine", [("ok" if f.ok else "--", f.name, f.detail, f.fix) for f in found.findings])
    if found.lacking:
        for text in found.lacking:
            click.echo(f"Missing: {text}", err=True)
        click.get_current_context().exit(MissingRuntimeError.exit_code)


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
        from engines.core.documents import converted
        from qdq.cli.answer.documents import GpuAnswer

        plain = {**found.to_mapping(), "watched": watched.to_mapping(), "recipe": str(output)}
        show_json(converted(plain, GpuAnswer).to_json())
        return
    show_rows(f"{card.name} ({card.target}), measured with {backend.title}", found.rows())
    note(watched.summary())
    click.echo(f"Recipe: {output}")


def _schemas(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    from qdq.deploy.report.schemas import FILES

    return [name for name in FILES if name.startswith(incomplete)]


@click.command()
@click.argument("name", metavar="[NAME]", required=False, shell_complete=_schemas)
@options.json_option
def schema(name: str | None, as_json: bool) -> None:
    """Print the JSON Schema of a file or an answer, such as plan, recipe, report or error; without NAME, list them.

    Every JSON file and every answer to --json has the key "schema": its name here and its version.
    """
    from qdq.deploy.report.schemas import schema as schema_of, versions

    if name is not None:
        show_json(json.dumps(schema_of(name), indent=1) + "\n")
        return
    found = versions()
    if not as_json:
        show_rows("qdq schema NAME", [(key, version, maker, what) for key, version, what, maker in found])
        return
    from qdq.cli.answer.documents import KnownSchema, SchemasAnswer

    known = (KnownSchema(name=key, version=version, what=what, made_by=maker) for key, version, what, maker in found)
    show_json(SchemasAnswer(schemas=tuple(known)).to_json())
