"""`qdq lint MODEL [--fix -o OUT.onnx]`: what TensorRT will not take of a Q/DQ model, and the repaired model with proof.

MODEL -> findings -> with --fix: repaired -> compiled for the targets, and compared with MODEL in ONNX Runtime -> OUT.
OUT is written only where the repaired model compiles. Exit codes: 0 clean, or repaired and clean; 1 errors are left, or
it does not compile; 2 bad input; 3 a runtime is missing. Registered by `cli`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdq.cli import options
from qdq.cli.terminal import Bars, note, show_json, show_rows
from qdq.core.errors import InputError
from qdq.core.outputs import check_output

if TYPE_CHECKING:
    from engines.backends.profile import Profile
    from engines.verify.report import Report
    from qdq.build.recipe import Recipe
    from qdq.lint.lint import Finding
    from qdq.lint.repair.repair import Repaired
    from qdq.model.model import Model

PROOF_SAMPLES = 4
PATH = click.Path(path_type=Path)


@click.command("lint")
@click.argument("model", type=PATH)
@click.option("--fix", is_flag=True, help="Repair what needs no data, prove it, and write the model.")
@click.option("-o", "--output", type=PATH, help="Write the repaired model here.")
@click.option("--target", multiple=True, help="Prove it for a GPU generation, such as sm89 (default); repeatable.")
@click.option(
    "--compiler",
    cls=options.Listed,
    names=options.compiler_names,
    help="Judge it for {names}; default: the one that it was quantized for, or rtx.",
)
@click.option(
    "--shape",
    multiple=True,
    metavar="NAME:MIN:OPT:MAX",
    help="Compile a dynamic input for these shapes; or NAME:SHAPE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON to standard output.")
def lint_command(
    model: Path,
    fix: bool,
    output: Path | None,
    target: tuple[str, ...],
    compiler: str | None,
    shape: tuple[str, ...],
    as_json: bool,
) -> None:
    """Find what TensorRT refuses in a Q/DQ model, or would run in float, and repair it."""
    from qdq.lint.lint import lint, profile_for
    from qdq.lint.report import LintReport
    from qdq.model.storage import load

    if fix != (output is not None):
        raise InputError(
            "--fix needs -o OUT.onnx: the model given is never changed."
            if fix
            else "-o writes a repaired model: give --fix too."
        )
    loaded = load(model)
    profile = profile_for(loaded, compiler)
    if not fix:
        found = lint(loaded, profile)
        if as_json:
            show_json(LintReport(findings=tuple(found)).to_json())
        else:
            _show(f"{model.name} for {profile.title}: {_count(found)}", found)
        raise SystemExit(int(any(f.severity == "error" for f in found)))
    assert output is not None
    check_output(output, model)
    raise SystemExit(_fix(loaded, model, output, profile, target, shape, as_json))


def _fix(
    loaded: Model,
    model: Path,
    output: Path,
    profile: Profile,
    target: tuple[str, ...],
    shape: tuple[str, ...],
    as_json: bool,
) -> int:
    """Repair, prove, write, report; returns the exit code."""
    from engines.core.files import Scratch
    from qdq.build.recipe import Recipe
    from qdq.lint.lint import lint
    from qdq.lint.repair.repair import repair
    from qdq.lint.report import LintReport, Proof
    from qdq.model.storage import save

    given: Mapping[str, object] = {k: list(v) for k, v in (("target", target), ("shape", shape)) if v}
    recipe = Recipe.from_mapping({**given, "compiler": profile.key})
    done = repair(loaded, profile)
    with Scratch(output.absolute().parent) as folder, Bars() as bars:
        draft = folder / output.name
        save(done.model, draft)
        refused, kernels = _compile(done.model, draft, recipe, bars)
        difference = _difference(loaded, model, draft, done.model, recipe)
        if not refused:
            save(done.model, output)
    errors = any(f.severity == "error" for f in done.left)
    compared = None if isinstance(difference, str) else difference
    proof = Proof(
        compiles=not refused,
        compiler=refused,
        kernels=kernels,
        sqnr_db=compared.sqnr_db if compared else None,
        max_abs_error=_largest(compared) if compared else None,
        not_compared=difference if isinstance(difference, str) else "",
    )
    if as_json:
        found = LintReport(
            findings=tuple(lint(loaded, profile)), changes=tuple(done.changes), left=tuple(done.left), proof=proof
        )
        show_json(found.to_json())
    else:
        _report(model, output, done, refused, kernels, difference)
    return int(errors or bool(refused))


def _compile(model: Model, path: Path, recipe: Recipe, bars: Bars) -> tuple[str, int]:
    """The compiler's refusal ('' for none) and the number of kernels; never asked about what crashes it.

    Where it does not work here, who stands in for it says whether it compiles, and the kernels are those of that.
    """
    from engines.core.errors import BuildError
    from qdq.build.engine import compile_engine, shape_ranges
    from qdq.build.machine import stand_in
    from qdq.lint.lint import lint

    if any(f.effect == "crash" for f in lint(model)):
        return "not tried: a computed scale ends the compiler's process", 0
    try:
        shapes = shape_ranges(model, recipe.shapes, None)
        engine = compile_engine(path, recipe=stand_in(recipe, model.proto), shapes=shapes, on_progress=bars)
    except BuildError as error:
        return str(error), 0
    return "", int(engine.table.kernels)


def _largest(report: Report) -> float | None:
    """The largest error of an output of numbers; None where there is no such output."""
    return max((o.max_abs_error for o in report.outputs if o.max_abs_error is not None), default=None)


def _difference(loaded: Model, model: Path, fixed: Path, repaired: Model, recipe: Recipe) -> Report | str:
    """The repaired model's outputs against those of the model given, on random data; or why not."""
    from calib_data import random_samples
    from engines.core.errors import EngineError
    from engines.verify.compare import compare
    from qdq.deploy.check import float_session
    from qdq.measure.inference.inputs import input_specs

    sizes: dict[str | tuple[str, int], int] = {
        (s.name, axis): size for s in recipe.shapes for axis, size in enumerate(s.opt)
    }
    samples = random_samples(input_specs(repaired), PROOF_SAMPLES, seed=0, sizes=sizes)
    try:
        given = float_session(loaded, str(model))
        return compare(given, str(fixed), samples, model=loaded.proto, names=("model given", "repaired model"))
    except EngineError as error:
        return str(error)


def _report(model: Path, output: Path, done: Repaired, refused: str, kernels: int, difference: Report | str) -> None:
    from qdq.deploy.report.report import headline

    show_rows(
        f"{model.name}: {len(done.changes)} repairs", [(", ".join(c.rules), c.node, c.what) for c in done.changes]
    )
    if done.left:
        _show(f"Left: {_count(list(done.left))}", list(done.left))
    if refused:
        note(f"Not written, it does not compile: {refused}")
    else:
        click.echo(f"Compiles to {kernels} kernels: {output}")
    if isinstance(difference, str):
        note(f"Not compared with {model.name}: {' '.join(difference.split())[:300]}")
    else:
        worst = _largest(difference) or 0.0
        click.echo(
            f"Against {model.name} in ONNX Runtime, {difference.samples} random samples: "
            f"{headline(difference)}, largest difference {worst:.3g}"
        )


def _show(title: str, found: list[Finding]) -> None:
    show_rows(title, [(f.severity, f.rule, f.node, f.message) for f in found])
    meaning = {f.rule: (f.rule, f.effect, f"TensorRT: {f.tensorrt}", f.remedy) for f in found}
    if meaning:
        show_rows("What that means", meaning.values())


def _count(found: list[Finding]) -> str:
    errors = sum(f.severity == "error" for f in found)
    return f"{errors} errors, {len(found) - errors} warnings" if found else "nothing found"
