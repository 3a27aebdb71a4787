"""The options that several verbs share, and what they mean: a recipe, samples, a place to write.

option decorators -> click's parsed values -> `recipe_of`, `samples_of`.
Must stay light, like `cli`: what is heavy is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from qdq.cli.options.folder import (
    asked_of as asked_of,
    files_of as files_of,
    folder_options,
    hf_tasks as hf_tasks,
    keeping_samples as keeping_samples,
    require_folder as require_folder,
    sources as sources,
)
from qdq.cli.options.listed import (
    Listed as Listed,
    compiler_names as compiler_names,
    data_forms as data_forms,
    gpu_names as gpu_names,
    setting,
    targets as targets,
    tasks as tasks,
)
from qdq.cli.options.origin import (
    MODEL as MODEL,
    as_onnx as as_onnx,
    dynamic_option,
    opset_option,
    wanted_of as wanted_of,
)
from qdq.cli.options.read import (
    RANDOM_NOTE as RANDOM_NOTE,
    UNIT_FORM as UNIT_FORM,
    case_key_of as case_key_of,
    note_left_out as note_left_out,
    pairs as pairs,
    recipe_of as recipe_of,
    recipe_of_mix as recipe_of_mix,
    recipe_of_plan as recipe_of_plan,
    recipe_values as recipe_values,
    require_mix as require_mix,
    samples_of as samples_of,
)

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order."""
    return lambda function: reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


recipe_option = click.option(
    "--recipe", type=PATH, help="Read options from a YAML file; its keys are the options with underscores."
)
scheme_option = setting("--scheme", "Choose formats of weights and data: {names}.")
exclude_option = click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave these nodes in float; repeatable."
)
compiler_option = click.option(
    "--compiler",
    cls=Listed,
    names=compiler_names,
    help="Quantize for, and compile with, {names}; default: tensorrt for a --gpu of a data centre or a --target that "
    "only TensorRT has, else rtx.",
)
embeddings_option = setting("--embeddings", "Store tables of words, and others that a Gather reads, as {names}.")
piecewise_option = setting("--piecewise", "Give data of large products two scales and two products: {names}.")
attention_option = setting("--attention", "Run Q K and its product with V in {names}; fp8 from Ada on.")
place_options = _options(
    scheme_option, compiler_option, embeddings_option, attention_option, exclude_option, recipe_option
)
settings_options = _options(
    scheme_option,
    compiler_option,
    setting("--calibrator", "Choose activation ranges by: {names}."),
    click.option(
        "--percentile", type=float, help="Percentile to keep; only with --calibrator percentile. Default 99.99."
    ),
    setting("--rounding", "Round weights by: {names}; default: the scheme's."),
    setting("--equalize", "Balance channels by: {names}; default: the scheme's."),
    setting("--block", "Let this many 4-bit weights share a scale: {names}."),
    click.option(
        "--v0", help="FPTQ: up to this magnitude one scale; auto equalizes every tensor that gains. Default 15."
    ),
    click.option(
        "--v1", help="FPTQ: above this magnitude one scale per token; auto decides from the error. Default 150."
    ),
    embeddings_option,
    attention_option,
    setting("--gradients", "Round weights that a gradient reads again {names}: tied keeps forces that of the energy."),
    piecewise_option,
    setting("--bias-correction", "Shift biases so that means stay: {names}; auto does so where held-out samples gain."),
    click.option(
        "--shift/--no-shift", default=None, help="Shift asymmetric activations to use all codes (default on)."
    ),
    exclude_option,
    click.option(
        "--override",
        "overrides",
        multiple=True,
        metavar="PATTERN=CHOICE",
        help="Give the nodes of this name another scheme, as '/head/*=fp8', with blocks or codes of its own as "
        "int4:block=32 or int8:shift=off; float or fp32 quantizes none of them; repeatable, the first that matches "
        "counts.",
    ),
    recipe_option,
)
unquantized_option = click.option(
    "--unquantized-type",
    "--rest",
    help="Store what is not quantized as auto (default: fp16, or fp32 if tuned so), fp16, bf16 or fp32.",
)
tune_options = _options(
    click.option(
        "--tune",
        help="Choose by compiled results: placement (what is quantized at all, and rewrites), rewrites (INT8 wherever "
        "it is possible), or off. Default: placement for int8, else rewrites; for compare, off.",
    ),
    click.option(
        "--tune-compiles",
        type=int,
        metavar="N",
        help="Stop tuning after this many variants, default 160, and those to compare with; the plan is the same "
        "however busy the machine is.",
    ),
    click.option(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="Stop tuning after this time, default 1800, whatever was looked at by then.",
    ),
    click.option(
        "--judge",
        help="Decide by predicted times, or by times measured on this machine's GPU; default: measured where a GPU of "
        "the one target is here.",
    ),
    click.option(
        "--gpu",
        multiple=True,
        cls=Listed,
        names=gpu_names,
        help="Predict times for {names}; default: the fastest known of each target.",
    ),
)
mix_options = _options(
    click.option(
        "--minimize",
        help="Choose a precision for each group of nodes for least time, size or error, within the limits below. "
        "Default: least time, where what is quantized alone is chosen.",
    ),
    click.option(
        "--max-size-mib",
        type=float,
        metavar="MIB",
        help="Allow the weights in the engine this size, by the compiler's layer table.",
    ),
    click.option(
        "--max-memory-mib", type=float, metavar="MIB", help="Allow this for them and what the engine computes."
    ),
    click.option("--max-latency-us", type=float, metavar="US", help="Allow this predicted time of one inference."),
    click.option(
        "--min-metric",
        multiple=True,
        metavar="NAME=VALUE",
        help="Require this of a metric of `qdq compare`, as dice=0.9, or of FILE.py:FUNCTION, called with the outputs, "
        "the float model's and the sample; where lower is better, at most that.",
    ),
    click.option(
        "--metric-labels",
        default="",
        metavar="ARRAY",
        help="Score --min-metric against this array of the samples; next: the following tokens. Default: the float "
        "model.",
    ),
    click.option(
        "--candidates",
        multiple=True,
        help="Choose among these, with commas between, as of `qdq sensitivity`.",
    ),
    click.option(
        "--sensitivity", "sensitivity_file", type=PATH, help="Take this table of `qdq sensitivity`, and its candidates."
    ),
    click.option(
        "--pick",
        metavar="PICK",
        help="Take of the front of all plans that were looked at the knee, smallest, fastest or most-accurate one "
        "within the limits, or that of a number.",
    ),
    click.option(
        "--front", "front_file", type=PATH, help="Pick from this front.json of an earlier search, and search nothing."
    ),
    click.option("--plot", "plot_file", type=PATH, metavar="FILE.png", help="Draw the front."),
)
shape_option = click.option(
    "--shape",
    multiple=True,
    metavar="NAME:MIN:OPT:MAX",
    help="Give a dynamic input these shapes, each like 1x1x64x64x64; or NAME:SHAPE. Default: the samples', if any.",
)
compile_options = _options(
    click.option(
        "--target",
        multiple=True,
        cls=Listed,
        names=targets,
        help="Compile for a GPU generation: {names}; 8.6 means sm86; default sm89; repeatable.",
    ),
    shape_option,
    click.option(
        "--hold",
        multiple=True,
        metavar="NAME=VALUE",
        help="Compile for this value of an input of one bool or integer that chooses branches or counts turns; "
        "repeatable. Default: the samples', where the compiler does not take the model for all values.",
    ),
)


def _keep_to(context: click.Context, _: click.Parameter, size: str | None) -> None:
    """Let everything that the verb runs keep to a budget; checked here, so that a wrong one is said first."""
    from qdq.core.resources import parse_bytes, within

    if size is not None:
        context.with_resource(within(parse_bytes(size)))


memory_option = click.option(
    "--memory",
    metavar="SIZE",
    expose_value=False,
    callback=_keep_to,
    help="Use at most this much to run samples, as 2G: models, weights and activations, beyond the 110 MB of a process "
    "with its libraries; more passes, or fewer samples at a time, where that is little. Default: 4G, or half of "
    "what is free.",
)


def _limit(context: click.Context, _: click.Parameter, count: int | None) -> None:
    """Let every source that the verb opens give so many samples at most."""
    from calib_data.elements import limiting

    if count is not None:
        context.with_resource(limiting(count))


def _trust(context: click.Context, _: click.Parameter, yes: bool) -> None:
    """Let a bundle run its code, for the whole verb. No recipe can say so."""
    if yes:
        from calib_data.volumes.monai import trusting

        context.with_resource(trusting())


def _keep_work(context: click.Context, _: click.Parameter, folder: Path | None) -> None:
    """Take earlier work from a folder, and keep there what the verb does."""
    from qdq.core.disk.cache import caching

    if folder is not None:
        context.with_resource(caching(folder))


cache_option = click.option(
    "--cache",
    type=PATH,
    metavar="DIR",
    envvar="QDQ_CACHE",
    show_envvar=True,
    expose_value=False,
    callback=_keep_work,
    help="Take what earlier runs did of the same model and data from this folder, and keep this run's work there.",
)


image_options = _options(
    click.option(
        "--trust",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_trust,
        help="Run the code of a MONAI bundle, or of a Hugging Face folder.",
    ),
    click.option(
        "--preprocess",
        metavar="SOURCE",
        help="Prepare images as nnunet:FOLDER[:3d_fullres] or monai:BUNDLE/configs/inference.json says (the latter "
        "with --trust), in place of a recipe's `volume:`.",
    ),
    click.option(
        "--case-key",
        metavar="FILE",
        help="Call images by the keyed hash (HMAC) of their names with this key; default: a key of this run.",
    ),
)
max_samples_option = click.option(
    "--max-samples",
    type=click.IntRange(1),
    metavar="N",
    expose_value=False,
    callback=_limit,
    help="Use the first N samples of each source only; needed for a function that never ends.",
)
data_options = _options(
    memory_option,
    click.option("--data", cls=Listed, names=data_forms, help="Read samples from {names}."),
    max_samples_option,
    image_options,
    click.option("--random-data", type=int, metavar="N", help="Make N random samples in place of --data."),
)
made_options = _options(
    click.option("--plan", "plan_file", type=PATH, help="Take this plan.json in place of a new plan."),
    click.option("--table", "table_file", type=PATH, help="Take this table.json in place of a new calibration."),
)
workers_option = click.option(
    "--workers", type=int, metavar="N", help="Run on N processes of this machine; default: one."
)
cluster_option = click.option("--cluster", metavar="tcp://HOST:PORT", help="Run on the workers of this Dask cluster.")
limit_options = _options(
    click.option("--min-sqnr-db", type=float, help="Require this signal to noise ratio of each output, in dB."),
    click.option(
        "--min-sqnr-spread-db",
        type=float,
        help="Require this ratio of the spread over samples to the error of each output, in dB.",
    ),
    click.option("--min-cosine", type=float, help="Require this cosine similarity of each output."),
    click.option("--min-dice", type=float, help="Require this Dice of each class of each segmentation."),
    click.option("--min-top1", type=float, help="Require this agreement of the argmax, from 0 to 1."),
    click.option(
        "--max-dice-drop",
        type=float,
        help="Allow this fall of each structure's mean Dice in whole volumes, against labels, else the float model.",
    ),
    click.option("--max-hd95-mm", type=float, help="Allow this HD95 of each structure to the float model, in mm."),
    click.option(
        "--max-volume-diff-ml", type=float, help="Allow this difference of each structure's volume to it, in ml."
    ),
)
window_option = click.option(
    "--window",
    metavar="PATCH[:KEY=VALUE...]",
    help="Run over whole volumes with this patch, as 96x96x96:overlap=0.5:rule=nnunet; default: the model's size.",
)
judging_options = _options(
    limit_options,
    window_option,
    click.option(
        "--task",
        cls=Listed,
        names=tasks,
        help="Take the outputs for: {names}; auto: as the graph ends. Of `hf:FOLDER` in `deploy` also what `export "
        "--task` takes.",
    ),
    click.option(
        "--class-axis", type=int, help="Look for classes on this axis of the outputs; default: as the graph says."
    ),
    click.option(
        "--unit",
        "units",
        multiple=True,
        metavar="OUTPUT=UNIT,SCALE",
        help="Tell the mean error of an output in this unit, SCALE of which make one of the output's own; repeatable.",
    ),
    click.option("--warn-sqnr-db", type=float, help="Warn below this signal to noise ratio, in dB; default 20."),
    click.option("--warn-top1", type=float, help="Warn below this agreement of the argmax, from 0 to 1; default 0.99."),
)
share_option = click.option(
    "--min-int8-share",
    type=float,
    help="Require this fraction of the multiply-adds in INT8, as compiled, from 0 to 1.",
)
overlap_option = click.option(
    "--allow-overlap", is_flag=True, help="Allow samples of --data among those of --eval; the report says how many."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to standard output.")
model_argument = click.argument("model", type=PATH)
any_model_argument = click.argument("model", type=PATH, metavar=MODEL)
export_options = _options(dynamic_option, opset_option, folder_options)


custom_ops_option = click.option(
    "--custom-ops", multiple=True, metavar="LIB", help="Load an ONNX Runtime library of custom operators; repeatable."
)


def output_option(what: str, *, required: bool = True) -> Callable[[F], F]:
    """Where the result goes."""
    return click.option("-o", "--output", type=PATH, required=required, help=f"Write {what} here.")
