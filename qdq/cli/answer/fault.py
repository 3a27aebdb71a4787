"""A fault of ours: a log file with what a report of it needs, and nothing of the user's data.

exception -> file in the folder for temporary files -> one paragraph that names it.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path


def report(error: BaseException, arguments: Sequence[str]) -> tuple[str, str | None]:
    """Write the log file; what to tell the user, and where the file is, None where it could not be written.

    The file holds versions, the classes of the exceptions with where each arose, and which options were given: no value
    of an option, no message, which may name a file, and no array.
    """
    from engines.verify.manifest import package_versions

    options = [word.partition("=")[0] for word in arguments[1:] if word.startswith("-")]
    verb = next((word for word in arguments[1:] if not word.startswith("-")), "")
    lines = [
        f"qdq {verb} {' '.join(options)}",
        f"Python {sys.version.split()[0]} on {platform.platform()}",
        *(f"{name} {version}" for name, version in package_versions().items()),
        "",
        *_chain(error),
    ]
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    path: Path | None = None
    try:
        folder = Path(tempfile.gettempdir())
        path = folder / f"qdq-fault-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6}.log"
        path.write_text("\n".join(lines), encoding="utf-8")
        where = f"{path} says where; it holds no data of yours"
    except OSError:
        path = None
        sys.stderr.write("\n".join(lines))
        where = "the lines above say where"
    told = (
        f"Error: this is a fault of qdq, not of your input: {what}. No file is left half written. "
        f"Please report it: {where}."
    )
    return told, None if path is None else str(path)


def _chain(error: BaseException) -> Iterator[str]:
    """Each exception's frames and class, the one that arose first first."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _chain(before)
        yield ""
    yield from (line.rstrip("\n") for line in traceback.format_tb(error.__traceback__))
    yield f"{type(error).__module__}.{type(error).__qualname__}"
