"""Temporary folders that no run leaves behind, whatever ends it.

Scratch() -> a folder that goes at the end; this process locks it, so the next run sees which folders a killed one left,
and removes them. Must not know what lies in a folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from engines.core.files import abandoned, lock

PREFIX = "qdq-"


class Scratch:
    """A new folder; use it as a context manager, which gives its path, or call `remove`."""

    def __init__(self, place: Path | None = None) -> None:
        """Make it in `place`, hidden, or where the system has its temporary files.

        Folders that killed runs left there go first.

        Raises:
            OSError: the place is not writable.
        """
        prefix = f".{PREFIX}" if place else PREFIX
        within = place or Path(tempfile.gettempdir())
        for left in within.glob(f"{prefix}????????"):
            if left.is_dir() and not left.is_symlink() and abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=within))
        self._lock = os.open(self.path, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else -1
        if self._lock >= 0:
            lock(self._lock)

    def remove(self) -> None:
        """Remove it; a second time does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        descriptor, self._lock = self._lock, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Path:
        """Its path."""
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self.remove()
