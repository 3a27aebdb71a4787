"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from engines.core.errors import EngineError


@contextmanager
def new_files(*paths: Path, resumed: bool = False) -> Iterator[list[BinaryIO]]:
    """Opens a temporary file beside each path; when all are written they are renamed, else none is and all are removed.

    Args:
        paths: files to make or to replace, in the order in which they appear.
        resumed: the temporary files have the names of `unfinished`, so that what a killed process left of them is
            replaced by the next one; only one may write at a time.

    Raises:
        OSError: of the folder or the disk.
    """
    temporary = [unfinished(p) if resumed else p.with_name(f".{p.name}.{secrets.token_hex(4)}.part") for p in paths]
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(path.open("wb")) for path in temporary]
        for path, final in zip(temporary, paths, strict=True):
            path.replace(final)
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """The temporary file of a path that `resumed` writes."""
    return path.with_name(f".{path.name.lstrip('.')}.part")


def write_atomic(
    path: str | os.PathLike[str], data: bytes | str, *, error: type[Exception] = EngineError, resumed: bool = False
) -> None:
    """Writes a file, text in UTF-8; see `new_files`.

    Raises:
        error: the folder is missing or not writable; nothing is left behind.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        with new_files(Path(path), resumed=resumed) as (file,):
            file.write(content)
    except OSError as cause:
        reason = cause.strerror or cause
        raise error(f"Cannot write {path}: {reason}. Choose a folder that exists and is writable.") from cause
