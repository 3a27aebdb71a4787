"""What a verb's options mean: a recipe, and samples. What is heavy is imported inside the functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdq.cli.terminal import note
from qdq.core.errors import InputError

if TYPE_CHECKING:
    from calib_data import Samples
    from qdq.build.recipe import Recipe
    from qdq.model.model import Model
    from qdq.plan.plan import Plan
    from qdq.plan.settings import Settings

RANDOM_NOTE = "Random data: the figures say that the model compiles and runs, nothing about its accuracy."


OVERRIDE_FORM = "PATTERN=CHOICE, as in '/head/*=fp8' or 'fc=float'"
UNIT_FORM = "OUTPUT=UNIT,SCALE, as in 'energy=meV/atom,1000'"


def recipe_values(given: Mapping[str, Any], base: Mapping[str, object] | None = None) -> dict[str, object]:
    """Keys of a verb's recipe: `base`, then its recipe file, then the options given."""
    from qdq.build.keys.recipe_file import read_recipe

    options = {k: v for k, v in given.items() if k != "recipe" and v is not None and v != ()}
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    if "overrides" in options:
        options["overrides"] = pairs(given["overrides"], "--override", OVERRIDE_FORM)
    if "units" in options:
        options["units"] = pairs(given["units"], "--unit", UNIT_FORM)
    read = read_recipe(given["recipe"]) if given.get("recipe") else {}
    return {**(base or {}), **read, **options}


def pairs(given: Sequence[str], option: str, form: str) -> dict[str, str]:
    """The mapping that a repeated option of a form such as PATTERN=CHOICE makes.

    Raises:
        InputError: one has no =, or nothing on one side of it, or two say different things of one name.
    """
    found = dict[str, str]()
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"{option} is {text!r}: it must be {form}.")
        if found.setdefault(name, value) != value:
            raise InputError(f"{option} says two things of {name}: {found[name]} and {value}. Leave one out.")
    return found


def recipe_of(given: Mapping[str, Any], base: Mapping[str, object] | None = None) -> Recipe:
    """The recipe of a verb, from its `recipe_values`."""
    from qdq.build.recipe import Recipe

    return Recipe.from_mapping(recipe_values(given, base))


def recipe_of_plan(given: Mapping[str, Any], plan: Plan | None, where: Path | None) -> Recipe:
    """The recipe of a verb that may be given a plan, whose settings are then the defaults.

    Raises:
        InputError: an option would change what the plan says.
    """
    recipe = recipe_of(given, base=plan.settings.to_mapping() if plan else None)
    if plan and _places(recipe.settings) != _places(plan.settings):
        raise InputError(
            f"The plan {where} already says what is quantized, which --scheme, --compiler, --block, --embeddings, "
            "--attention, --shift and --exclude cannot change. Edit the plan, or make another with `qdq plan`."
        )
    from engines.core.documents import replace

    return replace(recipe, chosen_because="the plan is for it") if plan else recipe


def recipe_of_mix(given: Mapping[str, Any], plan: Plan) -> Recipe:
    """The recipe of a verb whose plan was made of it: what the plan says of schemes stands in place of the options."""
    from qdq.build.recipe import Recipe

    return Recipe.from_mapping({**recipe_values(given), **plan.settings.to_mapping()})


def require_mix(
    recipe: Recipe,
    sensitivity: Path | None,
    front: Path | None = None,
    *,
    plot: Path | None = None,
    labels: str = "",
    checks: bool = False,
) -> bool:
    """Whether a plan of several precisions is asked for.

    Args:
        recipe: with what is minimized, limits and candidates.
        sensitivity: a table to choose by.
        front: an earlier search to pick from.
        plot: a file for the picture of it.
        labels: of the metrics.
        checks: the verb checks a size and the outputs, whatever it chooses by.

    Raises:
        InputError: what it is chosen from or limited by without the aim, the aim without what bounds it, labels without
            a metric, or a picture of no search.
        MissingRuntimeError: a picture without matplotlib.
    """
    if labels and not recipe.min_metrics:
        raise InputError("--metric-labels are what --min-metric is scored against: give one, such as top1=0.9.")
    asked = _asks_mix(recipe, sensitivity, front, checks=checks)
    if plot is not None and not asked:
        raise InputError(
            "--plot draws the front of plans of several precisions: add --minimize and a limit, or --pick."
        )
    if plot is not None:
        from qdq.deploy.report.picture import require_form

        require_form(plot)
    return asked


def _asks_mix(recipe: Recipe, sensitivity: Path | None, front: Path | None, *, checks: bool) -> bool:
    given = {
        "--candidates": bool(recipe.candidates),
        "--sensitivity": sensitivity is not None,
        "--max-size-mib": recipe.max_size_mib is not None and not (checks and not recipe.minimize),
        "--max-memory-mib": recipe.max_memory_mib is not None,
        "--max-latency-us": recipe.max_latency_us is not None,
        "--min-metric": bool(recipe.min_metrics),
    }
    named = [name for name, there in given.items() if there]
    if front is not None:
        if not recipe.pick or named or recipe.minimize or ("min_sqnr_db" in recipe.limits and not checks):
            raise InputError("--front picks from what an earlier search found: give --pick, and no aim or limit.")
        return True
    if recipe.pick:
        if recipe.pick.isdecimal():
            raise InputError(f"--pick {recipe.pick} is a number in a front: give the file with --front.")
        return True
    if not recipe.minimize:
        if named:
            raise InputError(
                f"{named[0]} is for a choice of the precision of each group: add --minimize time, size or error."
            )
        return False
    if recipe.minimize == "time":
        return bool(named)
    limited = {name for name in named if name.startswith("--max")}
    if recipe.minimize == "error" and not limited:
        raise InputError(
            "--minimize error without a bound is the float model itself: give --max-size-mib, the size that the "
            "weights in the engine may have, or --max-memory-mib or --max-latency-us."
        )
    if recipe.minimize == "size" and not (recipe.min_metrics or "min_sqnr_db" in recipe.limits):
        raise InputError(
            "--minimize size without a bound on the error takes the fewest bits everywhere: give --min-sqnr-db or "
            "--min-metric."
        )
    return True


def _places(settings: Settings) -> tuple[object, ...]:
    """The settings that decide where quantizers go; the others decide scales and codes."""
    names = ("scheme", "compiler", "shift", "exclude", "overrides", "block", "embeddings", "attention")
    return tuple(getattr(settings, name) for name in names)


def samples_of(model: Model, recipe: Recipe, data: str | None, random_data: int | None, *, labels: str = "") -> Samples:
    """The samples that the options name; `labels` as of `opener`.

    Raises:
        InputError: none, or both kinds.
        DataError: see `calib_data.open_samples`.
    """
    from calib_data import random_samples
    from qdq.measure.inference.inputs import input_specs

    if (data is None) == (random_data is None):
        raise InputError(
            "No data: give --data DATA, a folder or file with real inputs of the model. Random data needs an explicit "
            "--random-data N, and calibrates nothing real."
            if data is None
            else "Both --data and --random-data are given: choose one."
        )
    specs = input_specs(model)
    if data is not None:
        found = opener(labels)(data, specs, volume=recipe.volume, case_key=case_key_of(recipe))
        note_left_out(found.source)
        _require_room(model, found)
        return found
    note(RANDOM_NOTE)
    sizes: dict[str | tuple[str, int], int] = {
        (shape.name, axis): size for shape in recipe.shapes for axis, size in enumerate(shape.opt)
    }
    found = random_samples(specs, random_data or 0, seed=0, sizes=sizes)
    _require_room(model, found)
    return found


def opener(labels: str) -> Callable[..., Samples]:
    """What opens samples: `open_samples`, or where arrays may hold labels beside the inputs, `unlabelled`."""
    from calib_data import open_samples

    if not labels:
        return open_samples
    from qdq.deploy.compare.score import unlabelled

    return partial(unlabelled, labels=labels)


def case_key_of(recipe: Recipe) -> bytes | None:
    """The key of images' names, None for one of this run."""
    from calib_data.volumes.case import read_case_key

    return read_case_key(recipe.case_key) if recipe.case_key else None


def note_left_out(source: object) -> None:
    """Tell what of a source is not used, and why; of several that say the same once."""
    context = click.get_current_context(silent=True)
    told: set[str] = context.meta.setdefault(f"{__name__}.left_out", set()) if context else set()
    if (said := getattr(source, "left_out", "")) and said not in told:
        told.add(said)
        note(said)


def _require_room(model: Model, samples: Samples) -> None:
    """Say before any work starts that a budget cannot be met."""
    from qdq.core.resources import given_bytes
    from qdq.measure.inference.memory import require_room

    if given_bytes() is not None and (first := next(iter(samples), None)) is not None:
        require_room(model, first)
