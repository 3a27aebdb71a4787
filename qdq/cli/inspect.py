"""What is known without a run: explain, doctor, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qdq.cli import options
from qdq.cli.terminal import show_rows


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


@click.command()
@click.argument("name", metavar="FILE")
def schema(name: str) -> None:
    """Print the JSON Schema of a file that qdq reads or writes, such as plan, recipe, report or manifest."""
    from qdq.deploy.schemas import schema as schema_of

    click.echo(json.dumps(schema_of(name), indent=1))
