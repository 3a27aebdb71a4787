"""Running what the user wrote: whatever it raises becomes an error that says what and where."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calib_data.validation import DataError

ENDINGS = (Exception, SystemExit, GeneratorExit)  # what code may raise by itself; Ctrl-C comes from outside


@contextmanager
def users_code(path: Path | None, doing: str) -> Iterator[None]:
    """Run what the user wrote; whatever it raises, `sys.exit` too, becomes a DataError that says what and where.

    Args:
        path: of the file, whose line is named; None where there is none.
        doing: what failed, for the message.
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
        raise DataError(f"{doing}: {said(error)}{where}. It must give samples and not end Python. Mend it.") from error


def said(error: BaseException) -> str:
    """The type and the text of what was raised; an exception of the user's own may fail to give a text."""
    try:
        text = str(error)
    except Exception:
        text = "it has no text"
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"
