"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from engines.core.errors import EngineError


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name in the same folder, then renames it.

    Raises:
        EngineError: the folder is missing or not writable; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise EngineError(
            f"Cannot write {path}: {error.strerror}. Choose a folder that exists and is writable."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
