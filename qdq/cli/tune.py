"""`qdq tune`: the plan that the compiler's result is predicted fastest for, or measured where a GPU is here.

options -> recipe, samples if given -> qdq.tune.find_plan -> plan.json, lines of what was measured, a short table.
What is heavy is imported inside the verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qdq.cli import options
from qdq.cli.terminal import Bars, note, show_json, show_rows
from qdq.core.outputs import check_output


@click.command()
@options.model_argument
@options.data_options
@options.output_option("plan.json")
@click.option(
    "--min-sqnr-db", type=float, help="Require this signal to noise ratio of the outputs, in dB; needs --data."
)
@options.cache_option
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
    as_json: bool,
    **given: Any,
) -> None:
    """Choose by compiled results what is quantized, and which exact rewrites are made.

    What is quantized is predicted to gain time, by more than a tie; where that is not so, the nodes stay in float.
    Without --data every activation is assumed asymmetric, the most expensive case.
    """
    from engines.core.files import write_atomic
    from qdq.build.branches import with_possible_branches
    from qdq.build.engine import shape_ranges
    from qdq.build.measured.bench import bench_of, priced_here, why_predicted
    from qdq.build.pricing.tensorrt_pricer import pricer_of, unpriced
    from qdq.core.errors import InputError
    from qdq.deploy.report.report import Row, measured_rows
    from qdq.passes.prepare import load_float
    from qdq.tune.exact.elsewhere import elsewhere
    from qdq.tune.find_plan import find_plan

    check_output(output, model, data, given["recipe"])
    recipe = options.recipe_of(given)
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
        *measured_rows(outcome.measured),
        Row("choice", found.summary),
        *(Row("", said) for said in (*outcome.said, outcome.elsewhere) if said),
        *(Row("kept", step) for step in found.steps),
        *(Row("", said) for said in prepared.notes),
    ]
    if why := why_predicted(recipe):
        note(why)
    show_rows(f"Tuned plan of {model.name} in {output}", rows)
