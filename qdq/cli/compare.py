"""`qdq compare`: the table of schemes that the literature shows, measured on one model.

options -> entries, a task, samples -> qdq.deploy.compare -> a table or JSON, and report.json.
What is heavy is imported inside the verb.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdq.cli import options
from qdq.cli.terminal import Bars, note, show_json, show_rows
from qdq.core.errors import InputError
from qdq.core.outputs import check_output

if TYPE_CHECKING:
    from calib_data import Samples
    from qdq.deploy.compare.task import Masking

DEFAULT_SCHEMES = ("int8,int8-weight,int4,w4a8,fptq",)


def _metrics() -> Iterable[str]:
    """The names of the metrics."""
    from qdq.deploy.compare.metrics import METRICS

    return METRICS


def _masking(token: int | None, special: str, share: float | None) -> Masking | None:
    """What the options of masked tokens say; None where none is given.

    Raises:
        InputError: ids that are no numbers, or without a mask token.
    """
    from qdq.deploy.compare.task import Masking

    if token is None:
        if special or share is not None:
            raise InputError("--special-tokens and --mask-share need --mask-token, the id that tokens are masked with.")
        return None
    try:
        ids = tuple(int(text) for text in special.split(",") if text.strip())
    except ValueError:
        raise InputError(f"--special-tokens is {special!r}: it must be ids with commas between, as 0,2,3.") from None
    return Masking(token=token, special=ids, share=share)


@click.command()
@options.model_argument
@options.data_options
@click.option("--eval", "evaluation", help="Score on these samples, in the forms of --data; default: those of --data.")
@click.option(
    "--schemes",
    multiple=True,
    default=DEFAULT_SCHEMES,
    show_default=True,
    help="Compare these schemes, with commas between; each may have options, as in int4:block=32:rounding=nearest.",
)
@click.option(
    "--metric", cls=options.Listed, names=_metrics, default="cosine", show_default=True, help="Score by {names}."
)
@click.option(
    "--labels",
    default="",
    metavar="ARRAY",
    help="Score against this array of the evaluation samples; next: the following tokens. Default: the float model.",
)
@click.option(
    "--mask-token", type=int, metavar="ID", help="Mask tokens with this id, for masked-accuracy and the like."
)
@click.option(
    "--special-tokens", default="", metavar="ID,...", help="Never mask these, such as begin, end and padding."
)
@click.option("--mask-share", type=float, help="Mask this share of a sequence at once; default: as the metric has it.")
@click.option("--score-output", default="", metavar="NAME", help="Score this output; default: the first.")
@click.option(
    "--unit",
    "units",
    multiple=True,
    metavar="UNIT|OUTPUT=UNIT,SCALE",
    help="Name the unit of a metric that has one, as mae: kcal/mol; or of one output, and how many of it make one of "
    "the output's own: forces=meV/A,1000 (repeatable).",
)
@click.option("--per", type=float, default=1.0, help="Say how much of the output makes one such unit.")
@click.option("--class-axis", type=int, help="Look for classes on this axis; default: as the end of the graph says.")
@options.window_option
@options.overlap_option
@click.option("-o", "--output", type=options.PATH, help="Write report.json here, and its page beside it.")
@options.unquantized_option
@options.tune_options
@options.compiler_option
@options.compile_options
@options.recipe_option
@options.custom_ops_option
@options.cache_option
@options.json_option
def compare(
    model: Path,
    data: str | None,
    random_data: int | None,
    evaluation: str | None,
    schemes: tuple[str, ...],
    metric: str,
    labels: str,
    mask_token: int | None,
    special_tokens: str,
    mask_share: float | None,
    score_output: str,
    units: tuple[str, ...],
    per: float,
    class_axis: int | None,
    allow_overlap: bool,
    output: Path | None,
    custom_ops: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Measure several schemes: sizes, accuracy on your task, predicted time. One line each.

    Every scheme is quantized with the same samples, compiled for the target and scored on the evaluation samples. A
    scheme that the target cannot compile is a line with the reason. Variants are not tuned unless --tune says so.
    """
    from qdq.build.keys.units import units_of
    from qdq.core.files import write_text
    from qdq.deploy.compare.compare import compare_schemes, entries
    from qdq.deploy.compare.score import labelled
    from qdq.deploy.compare.task import Task
    from qdq.deploy.page.folder import page_beside
    from qdq.deploy.page.render import write_page
    from qdq.passes.prepare import load_float

    if output:
        for place in (output, page_beside(output)):
            check_output(place, model, data, evaluation, given["recipe"], *custom_ops)
    plain = [text for text in units if "=" not in text]
    if len(plain) > 1:
        raise InputError(f"--unit is {' and '.join(plain)}: for one of several outputs give {options.UNIT_FORM}.")
    task = Task(
        metric=metric,
        labels=labels,
        output=score_output,
        unit=next(iter(plain), ""),
        units=units_of(options.pairs([text for text in units if "=" in text], "--unit", options.UNIT_FORM)),
        per=per,
        class_axis=class_axis,
        masking=_masking(mask_token, special_tokens, mask_share),
    )
    asked = entries(",".join(schemes).split(","), options.recipe_values(given, base={"tune": "off"}))
    recipe = asked[0].recipe
    with Bars() as bars:
        bars(0, None, "Prepare")
        prepared = load_float(model)

        def opened(source: str | None, random: int | None, *, scored: bool) -> Samples:
            if source and task.array and random is None:
                key = options.case_key_of(recipe)
                return labelled(source, prepared, task.array, required=scored, volume=recipe.volume, case_key=key)
            return options.samples_of(prepared, recipe, source, random)

        calibration = opened(data, random_data, scored=not evaluation)
        held = opened(evaluation, None, scored=True) if evaluation else None
        made = compare_schemes(
            model,
            calibration,
            schemes=asked,
            task=task,
            evaluation=held,
            prepared=prepared,
            allow_overlap=allow_overlap,
            custom_ops=custom_ops,
            on_progress=bars,
        )
    if output:
        write_text(output, made.to_json())
        shown = write_page(output)
    if as_json:
        show_json(made.to_json())
        return
    show_rows(f"{model.name} for {', '.join(made.targets)}, {made.samples} {made.evaluated_on}", made.table())
    for text in (*made.notes, *([options.RANDOM_NOTE] if random_data else [])):
        note(text)
    if output:
        click.echo(f"Page: {shown.resolve()}")
