"""What the user wrote, found by name and run: whatever it raises becomes an error that says what and where."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calib_data.validation import DataError

SAMPLES = "It must give samples and not end Python. Mend it."
ENDINGS = (Exception, SystemExit, GeneratorExit)  # what code may raise by itself; Ctrl-C comes from outside


@contextmanager
def users_code(path: Path | None, doing: str, fix: str = SAMPLES) -> Iterator[None]:
    """Run what the user wrote; whatever it raises, `sys.exit` too, becomes a DataError that says what and where.

    Args:
        path: of the file, whose line is named; None where there is none.
        doing: what failed, for the message.
        fix: what to do.
    """
    try:
        yield
    except DataError:
        raise
    except ENDINGS as error:
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        where = f" (line {line})" if line else ""
        raise DataError(f"{doing}: {said(error)}{where}. {fix}") from error


def object_of(named: str, of: str, *, or_else: str = "", fix: str = SAMPLES) -> Any:
    """What `package.module:name` names; the current folder is searched first, as by `python -m`.

    Args:
        named: the text.
        of: what it is for, for messages: "the data source x:y".
        or_else: what may be given in its place.
        fix: of what fails while it is imported.

    Raises:
        DataError: there is no such module or name, a package that it needs is missing, or importing it fails.
    """
    module_name, _, name = named.partition(":")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        with users_code(None, f"Cannot import {module_name}, of {of}", fix):
            found: Any = importlib.import_module(module_name)
    except DataError as error:
        lost = getattr(error.__cause__, "name", None) if isinstance(error.__cause__, ModuleNotFoundError) else None
        if lost is None:
            raise
        if f"{module_name}.".startswith(f"{lost}."):
            raise DataError(
                f"No module {lost!r} for {of}: neither in the current folder nor installed. Run in the folder that "
                f"the module's name starts from{or_else}."
            ) from None
        frames = traceback.extract_tb(error.__cause__.__traceback__ if error.__cause__ else None)
        files = [f"{Path(f.filename).name} line {f.lineno}" for f in frames if not f.filename.startswith("<")]
        raise DataError(
            f"Cannot import {module_name}, of {of}: it needs {lost}, which is not installed ({files[-1]}): "
            f"pip install {lost.partition('.')[0]}."
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            there = ", ".join(n for n in vars(found) if not n.startswith("_")) if hasattr(found, "__dict__") else "none"
            raise DataError(f"No {part!r} in {module_name}, of {of}: it has {there[:300]}.")
        found = getattr(found, part)
    return found


def said(error: BaseException) -> str:
    """The type and the text of what was raised; an exception of the user's own may fail to give a text."""
    try:
        text = str(error)
    except Exception:
        text = "it has no text"
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"
