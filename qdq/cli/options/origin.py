"""A MODEL argument that is no ONNX file yet, and the options of its export.

argument, options -> `as_onnx` -> the path of an ONNX file, and what it was exported from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qdq.cli.options.folder import Asked, files_of
from qdq.core.errors import InputError

if TYPE_CHECKING:
    from calib_data import Samples
    from qdq.build.recipe import Recipe
    from qdq.frontend.exported import Dynamic, Exported
    from qdq.frontend.origin import Wanted
    from qdq.model.model import Model

F = TypeVar("F", bound=Callable[..., Any])
SAMPLES = "samples"  # folder of what is made with a model
MODEL = "MODEL.onnx | torch:PACKAGE.MODULE:FACTORY | MODEL.pt2 | hf:FOLDER"

dynamic_option = click.option(
    "--dynamic",
    multiple=True,
    metavar="INPUT:AXIS=NAME[,...]",
    help="Leave these sizes of an exported model open, as image:0=batch,2=height; none: no size. Default: the batch.",
)
opset_option = click.option("--opset", type=int, help="Export in this opset of ONNX; default: one that compilers take.")


def dynamic_of(texts: Sequence[str]) -> Dynamic | bool | None:
    """What --dynamic says.

    Raises:
        InputError: a text is not of its form.

    >>> dynamic_of(["image:0=batch,2=height"])
    {'image': {0: 'batch', 2: 'height'}}
    """
    if not texts:
        return None
    if list(texts) == ["none"]:
        return False
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        name, _, axes = text.rpartition(":")
        for each in axes.split(","):
            axis, _, word = each.partition("=")
            if not name or not axis.strip().isdecimal() or not word.strip():
                raise InputError(f"--dynamic {text} is not of the form INPUT:AXIS=NAME, as image:0=batch,2=height.")
            found.setdefault(name, {})[int(axis)] = word.strip()
    return found


def wanted_of(
    recipe: Recipe,
    data: str | None,
    dynamic: Sequence[str],
    opset: int | None,
    tolerance: float | None = None,
    *,
    asked: Asked | None = None,
    samples: Path | None = None,
) -> Wanted:
    """How a model is exported, from the options; samples that are made with it go to the folder `samples`."""
    from qdq.frontend.exported import TOLERANCE
    from qdq.frontend.origin import Wanted

    take = None if asked is None or asked.take is None else replace(asked.take, samples=samples)
    return Wanted(
        data=data,
        volume=recipe.volume,
        shapes={shape.name: tuple(shape.opt) for shape in recipe.shapes},
        samples=(lambda model: _opened(model, recipe, data)) if data is not None else None,
        dynamic=dynamic_of(dynamic),
        opset=opset,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        task=asked.task if asked else None,
        own=take,
    )


def _opened(model: Model, recipe: Recipe, data: str) -> Samples:
    from calib_data import open_samples
    from qdq.cli.options.read import case_key_of
    from qdq.measure.inference.inputs import input_specs

    return open_samples(data, input_specs(model), volume=recipe.volume, case_key=case_key_of(recipe))


@contextmanager
def as_onnx(
    model: Path,
    out: Path,
    recipe: Recipe,
    data: str | None,
    dynamic: Sequence[str],
    opset: int | None,
    asked: Asked | None = None,
) -> Iterator[tuple[Path, Exported | None]]:
    """An ONNX file of the argument, as long as this lasts; and what it was exported from, None where it was given.

    Raises:
        InputError: it cannot be exported; or an ONNX file is given, and options of an export.
        MissingRuntimeError: torch is not installed.
    """
    from qdq.core.files import folder_beside
    from qdq.frontend.origin import origin_of

    if (origin := origin_of(model)) is None:
        if dynamic or opset is not None:
            raise InputError(f"--dynamic and --opset are of an export, and {model} is an ONNX file. Leave them out.")
        yield model, None
        return
    if any(path.parent.resolve() == out.resolve() for path in files_of(model)):
        raise InputError(f"{out} holds files of the model. Give another folder for --out.")
    with folder_beside(out) as folder:
        wanted = wanted_of(recipe, data, dynamic, opset, asked=asked, samples=folder / SAMPLES)
        made = origin.export(folder / f"{origin.stem}.onnx", wanted)
        yield made.path, made
