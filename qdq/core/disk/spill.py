"""Arrays in files without a name, whose pages need not stay in memory; they are gone with who holds the arrays.

`mapped` is one array that is changed in place; a `Spill` takes many that are written once and read in parts, by
whichever thread. This module must not know what is in them.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats
from qdq.core.errors import InputError
from qdq.core.resources import said_bytes


def mapped(shape: tuple[int, ...], *, what: str) -> Floats:
    """Zeros, mapped from a file of their own.

    Raises:
        InputError: no room on the disk for `what` they are.
    """
    size = 8 * math.prod(shape)
    try:
        with tempfile.TemporaryFile() as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)  # else a full disk ends the process at a later write
            return np.asarray(np.memmap(file, np.float64, mode="r+", shape=shape) if size else np.zeros(shape))
    except OSError as error:
        raise _no_room(size, what, error) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spilled:
    """An array in a `Spill`, whose file stays as long as this.

    Attributes:
        shape: of the array.
        dtype: of the array.
        sha256: of its values, by which equal arrays are told and all can be sorted.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sha256: bytes
    _spill: Spill = field(repr=False, compare=False)
    _start: int = field(compare=False)

    def read(self, start: int = 0, end: int | None = None) -> npt.NDArray[Any]:
        """The indices from `start` to `end` of the first axis, all of the others; a scalar whole."""
        length, *rest = self.shape or (1,)
        start, end, _ = slice(start, end).indices(length)
        found = np.empty((max(0, end - start), *rest), dtype=self.dtype)
        self._spill.fill(found, self._start + self.dtype.itemsize * start * math.prod(rest))
        return found if self.shape else found.reshape(())


class Spill:
    """A file of arrays."""

    def __init__(self, what: str) -> None:
        """Make it, for `what` its arrays are.

        Raises:
            InputError: the folder of temporary files is not writable.
        """
        self._what, self._size, self._lock = what, 0, threading.Lock()
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed below
        except OSError as error:
            raise _no_room(0, what, error) from None
        weakref.finalize(self, self._file.close)

    def put(self, values: npt.NDArray[Any]) -> Spilled:
        """Write an array of numbers.

        Raises:
            InputError: no room on the disk.
        """
        data = np.asarray(values, order="C")
        content = data.reshape(-1).view(np.uint8).data
        with self._lock:
            start = self._size
            try:
                self._file.seek(start)
                self._file.write(content)
                self._file.flush()
            except OSError as error:
                raise _no_room(data.nbytes, self._what, error) from None
            self._size += data.nbytes
        digest = hashlib.sha256(content).digest()
        return Spilled(shape=data.shape, dtype=data.dtype, sha256=digest, _spill=self, _start=start)

    def fill(self, values: npt.NDArray[Any], start: int) -> None:
        """Read values from a byte of the file on, as many as there are."""
        with self._lock:
            self._file.seek(start)
            self._file.readinto(values.reshape(-1).view(np.uint8).data)


def _no_room(size: int, what: str, error: OSError) -> InputError:
    return InputError(
        f"Cannot write {said_bytes(size)} of {what} to {tempfile.gettempdir()}: {error.strerror or error}. "
        "Make room, set TMPDIR to another disk, or give more --memory."
    )
