"""The options of `hf:FOLDER`: what is exported of it, and how its tokenizer or processor makes samples.

argument, options -> `asked_of` -> `Asked` -> `as_onnx` -> `sources`: what --data and --eval then name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qdq.cli.options.listed import Listed, tasks
from qdq.core.errors import InputError
from qdq.frontend.huggingface.folder import PREFIX

if TYPE_CHECKING:
    from qdq.frontend.exported import Exported
    from qdq.frontend.huggingface.choose import Take

F = TypeVar("F", bound=Callable[..., Any])
ARRAYS = (".json", ".jsonl", ".npy", ".npz", ".csv")  # of --eval, which no tokenizer reads
PARTS = ("calibration", "evaluation")  # folders of samples
PATH = click.Path(path_type=Path)


def hf_tasks() -> Iterable[str]:
    """The tasks of the Hub that a folder is exported for."""
    from qdq.frontend.huggingface.tasks import names

    return names()


def _units() -> Iterable[str]:
    from qdq.frontend.huggingface.choose import UNITS

    return UNITS


def _paddings() -> Iterable[str]:
    from qdq.frontend.huggingface.choose import PADDINGS

    return PADDINGS


OPTIONS = (
    click.option(
        "--text", type=PATH, metavar="FILE", help="hf: make samples of this text with the folder's tokenizer."
    ),
    click.option("--text-unit", cls=Listed, names=_units, help="hf: take each {names} for a sample; default: line."),
    click.option("--max-length", type=int, metavar="N", help="hf: cut samples off at N tokens; default: at most 128."),
    click.option(
        "--padding",
        cls=Listed,
        names=_paddings,
        help="hf: {names}: keep each sample's length, fill all up to --max-length, or cut the whole text into blocks "
        "of that; default: blocks for text-generation, else none.",
    ),
    click.option("--count", type=int, metavar="N", help="hf: calibrate on N samples, check on N others; default: 128."),
    click.option("--past", type=int, metavar="N", help="hf: fix the cache at N tokens; default: its length is open."),
)
NAMES = ("text", "text_unit", "max_length", "padding", "count", "past")


def folder_options(function: F) -> F:
    """The options, in this order."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the options say of a folder; nothing of any other model.

    Attributes:
        task: of the Hub; None as config.json says.
        take: where samples come from; None where the model is no folder.
    """

    task: str | None = None
    take: Take | None = None


def asked_of(
    model: Path, given: dict[str, Any], *, data: str | None, evaluation: str | None = None, needed: bool = False
) -> Asked:
    """Take the options of a folder out of those that were given; `needed`: a sample must come from somewhere.

    Raises:
        InputError: they are given for another model, or two sources of samples are.
    """
    own = {name: given.pop(name, None) for name in NAMES}
    if not str(model).startswith(PREFIX):
        if wrong := next((name for name, value in own.items() if value is not None), None):
            raise InputError(
                f"--{wrong.replace('_', '-')} is for `hf:FOLDER`, whose tokenizer makes samples, and {model} is none. "
                "Give its samples with --data."
            )
        if (task := given.get("task")) is not None and task in [*hf_tasks()]:
            require_folder(model, task)
        return Asked()
    from qdq.frontend.huggingface.choose import Take

    task = given.get("task")
    if task in list(tasks()):  # what outputs are taken for; all else is the Hub's, maybe misspelt
        task = None
    elif task is not None:
        given["task"] = None
    if own["text"] is not None and data is not None:
        raise InputError("Both --text and --data are given: choose one to calibrate with; the other may be --eval.")
    if needed and own["text"] is None and data is None:
        raise InputError(
            "No data: give --text FILE for the folder's tokenizer, or --data with pictures or recordings for its "
            "processor, or with arrays."
        )
    as_text = own["text"] is not None and _is_text(evaluation)
    is_folder = own["text"] is None and evaluation is not None
    take = Take(
        text=own["text"],
        data=data,
        evaluation=evaluation if as_text or is_folder else None,
        elsewhere=evaluation is not None and not as_text,
        unit=own["text_unit"],
        length=own["max_length"],
        padding=own["padding"],
        past=own["past"],
        **({"count": own["count"]} if own["count"] is not None else {}),
    )
    return Asked(task=task, take=take)


def require_folder(model: Path, task: str | None) -> None:
    """Refuse a task of an export for what is exported as it is.

    Raises:
        InputError: the model is no folder.
    """
    if task is not None and not str(model).startswith(PREFIX):
        raise InputError(
            f"--task {task} says what `hf:FOLDER` is exported for, and {model} is none: all of it is exported. Leave "
            "--task out."
        )


def files_of(model: Path) -> Iterator[Path]:
    """The files of the folder that `hf:FOLDER` names, and of those in it, which no output may replace."""
    folder = Path(str(model).removeprefix(PREFIX)).expanduser()
    if str(model).startswith(PREFIX) and folder.is_dir():
        yield from (path for path in folder.rglob("*") if path.is_file())


def sources(exported: Exported | None, data: str | None, evaluation: str | None) -> tuple[str | None, str | None]:
    """What --data and --eval name, or the samples that were made in place of them."""
    if exported is None or exported.calibration is None:
        return data, evaluation
    return str(exported.calibration), str(exported.evaluation) if exported.evaluation else evaluation


def _is_text(evaluation: str | None) -> bool:
    return evaluation is not None and Path(evaluation).is_file() and Path(evaluation).suffix.lower() not in ARRAYS


@contextmanager
def keeping_samples(place: Path | None, output: Path) -> Iterator[Path]:
    """A folder that samples are written to; those in it are moved to `place` in the end, if that is given.

    Raises:
        InputError: samples are there already, or the place is not writable.
    """
    from qdq.core.files import folder_beside

    if place is not None and (there := next((place / name for name in PARTS if (place / name).exists()), None)):
        raise InputError(f"{there} is there already. Give another folder for --samples, or move that one away.")
    with folder_beside(place or output.absolute().parent) as folder:
        yield folder
        if place is None:
            return
        try:
            place.mkdir(parents=True, exist_ok=True)
            for name in PARTS:
                if (folder / name).exists():
                    os.replace(folder / name, place / name)
        except OSError as error:
            raise InputError(f"Cannot write to the folder {place}: {error.strerror or error}.") from error
