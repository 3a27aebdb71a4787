"""Files written whole or not at all, read only where they end; temporary folders that no run leaves behind.

A temporary file or folder is locked by the run that makes it: what is not locked was left by a run that was killed, and
goes when the same file is written again, or the next folder made there.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from types import FrameType, TracebackType
from typing import BinaryIO

from engines.core.errors import EngineError

try:
    import fcntl
except ImportError:  # Windows: what a killed run leaves stays
    fcntl = None  # type: ignore[assignment]

PREFIX = "qdq-scratch-"  # of temporary folders; results may lie beside them, in /tmp/qdq-baseline
YOUNG_S = 2.0  # what is younger may be about to be locked
_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def new_files(*paths: Path, resumed: bool = False) -> Iterator[list[BinaryIO]]:
    """Opens a temporary file beside each path; when all are written they are renamed, else none is and all are removed.

    Args:
        paths: files to make or to replace, in the order in which they appear.
        resumed: the temporary files have the names of `unfinished`, so that what a killed process left of them is
            replaced by the next one; only one may write at a time.

    Raises:
        OSError: of the folder or the disk; or a path leads to a folder, a pipe or a device.
    """
    temporary = [unfinished(p) if resumed else p.with_name(f".{p.name}.{secrets.token_hex(4)}.part") for p in paths]
    for path in paths:
        if path.exists():
            regular(path)  # /dev/null would be gone by a rename
        _remove_abandoned(path)
    try:
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(path.open("wb")) for path in temporary]
            for file in files:
                lock(file.fileno())
            yield files
        with uninterrupted():
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


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; a pipe or a device, which may never end, is not opened.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    return regular(path).read_bytes()


def regular(path: str | os.PathLike[str]) -> Path:
    """The path of a file, for who opens it otherwise: opening a pipe waits for a writer, and a device may never end.

    Raises:
        OSError: there is nothing, or a folder, a pipe or a device.
    """
    if not S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", os.fspath(path))
    return Path(path)


def sha256_file(path: Path | str) -> str:
    """The sha256 of a file, read in pieces.

    Raises:
        EngineError: the file cannot be read.
    """
    try:
        with regular(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"Cannot read {path}: {error.strerror}.") from error


def lock(descriptor: int) -> bool:
    """Locks an open file or folder for this process, as long as it is open; False where another process holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        return False
    return True


def abandoned(path: Path) -> bool:
    """Whether no process holds the lock of a file or folder that it would hold if it lived."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # gone, or of another user
        return False
    try:
        return time.time() - os.fstat(descriptor).st_mtime > YOUNG_S and lock(descriptor)
    finally:
        os.close(descriptor)


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


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of a path that killed runs left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.part"):
        if abandoned(left):
            with suppress(OSError):
                left.unlink()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the end, for a few renames that belong together."""
    held: list[tuple[int, FrameType | None]] = []
    if threading.current_thread() is not threading.main_thread():  # which signals do not reach
        yield
        return
    before = {number: signal.signal(number, lambda *seen: held.append(seen)) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0][0])
