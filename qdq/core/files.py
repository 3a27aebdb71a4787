"""Reading and writing files and folders: whole or not at all, with errors a person can act on."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engines.core.files import write_atomic
from qdq.core.errors import InputError


def write_text(path: str | os.PathLike[str], text: str, *, resumed: bool = False) -> None:
    """Write a UTF-8 file whole or not at all.

    Args:
        path: the file to write; an existing one is replaced.
        text: its content.
        resumed: as in `new_files`: what a killed run left is replaced by the next.

    Raises:
        InputError: the folder is missing or not writable.
    """
    write_atomic(path, text, error=InputError, resumed=resumed)


MADE_BY = {"plan": "qdq plan MODEL -o plan.json", "table": "qdq calibrate MODEL --data DATA -o table.json"}


def read_json(path: str | os.PathLike[str], form: str, what: str) -> Mapping[str, object]:
    """Read one of our JSON files.

    Args:
        path: the file.
        form: the value its "format" key must have.
        what: "plan" or "table", for messages.

    Raises:
        InputError: missing, not JSON, or of another format.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"Cannot read the {what} {path}: {error.strerror or error}. Make it with `{MADE_BY.get(what, 'qdq')}`."
        ) from None
    except ValueError as error:
        raise InputError(f"Cannot read the {what} {path}: it is not JSON ({error}). Make it again.") from None
    if not isinstance(content, dict) or content.get("format") != form:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        if str(got).partition("/")[0] == form.partition("/")[0]:
            raise InputError(
                f"The {what} {path} was written by another version of qdq: its format is {got!r}, needed is {form!r}. "
                + (f"Make it again with `{MADE_BY[what]}`." if what in MADE_BY else "Delete it to begin anew.")
            )
        raise InputError(f"Cannot use {path} as a {what}: its format is {got!r}, needed is {form!r}.")
    return content


def finite(value: object) -> object:
    """A value for JSON, which has no infinity: 'inf', '-inf' or 'nan' in its place."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `out`; removed in any case.

    Raises:
        InputError: `out` is a file, or the place is not writable.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, f"{place} is a file")
        folder = Path(tempfile.mkdtemp(prefix=".qdq-", dir=place))
    except OSError as error:
        raise InputError(
            f"Cannot write to the folder {out}: {error.strerror}. Choose a folder that is writable."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_all(folder: Path, out: Path) -> tuple[str, ...]:
    """Moves every file into `out` and returns their names."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        for name in names:
            os.replace(folder / name, out / name)
    except OSError as error:
        raise InputError(f"Cannot write to the folder {out}: {error.strerror}.") from error
    return tuple(names)
