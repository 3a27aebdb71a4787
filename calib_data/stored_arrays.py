"""Arrays in ``.npy`` and ``.npz`` files, read by header, whole, or a few rows at a time.

Flow: path -> stored_arrays -> {name: StoredArray} from headers alone -> .read() for all, or .rows() to stream along the
leading axis. Streaming holds one item in memory, for compressed members too.
It must never unpickle, nor know what the arrays are for.

Source: numpy.lib.format (NPY 1.0 and 2.0); an ``.npz`` is a zip file of ``<name>.npy`` members.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import IO

import numpy as np

from calib_data.validation import Array, DataError

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """An array on disk: ``path`` itself, or ``member`` of the zip file ``path``. Values start at byte ``offset``."""

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran_order: bool
    offset: int

    def read(self) -> Array:
        """Read the whole array, of ``shape`` and ``dtype``.

        Raises:
            DataError: the file cannot be read or ends early.
        """
        with _open(self.path, self.member) as file:
            file.seek(self.offset)
            flat = self._items(file, math.prod(self.shape))
        return flat.reshape(self.shape, order="F" if self.fortran_order else "C")

    def rows(self, indices: range, block: int | None) -> Iterator[Array]:
        """Stream items along the leading axis.

        Args:
            indices: ascending; which items.
            block: None for items ``a[i]``; a number for items ``a[i * block : (i + 1) * block]``.

        Yields:
            Array of shape ``shape[1:]``, or ``(block, *shape[1:])``.

        Raises:
            DataError: the file cannot be read or ends early.
        """
        if self.fortran_order:  # an item's values lie scattered over the whole array: no way to stream it
            whole = self.read()
            yield from (whole[i] if block is None else whole[i * block : (i + 1) * block] for i in indices)
            return
        shape = self.shape[1:] if block is None else (block, *self.shape[1:])
        size = math.prod(shape)
        with _open(self.path, self.member) as file:
            for i in indices:
                file.seek(self.offset + i * size * self.dtype.itemsize)
                yield self._items(file, size).reshape(shape)

    def _items(self, file: IO[bytes], count: int) -> Array:
        data = file.read(count * self.dtype.itemsize)
        if len(data) != count * self.dtype.itemsize:
            raise ValueError(f"the file ends {count * self.dtype.itemsize - len(data)} bytes early")
        return np.frombuffer(data, self.dtype)


def stored_arrays(path: Path) -> dict[str, StoredArray]:
    """Array name -> StoredArray, by the headers of a file; a ``.npy`` file has one, named "".

    Raises:
        DataError: the file is missing, unreadable, damaged, or holds pickled objects.
    """
    if path.suffix == ".npy":
        with _open(path, None) as file:
            return {"": _header(file, path, None, size=path.stat().st_size)}
    found: dict[str, StoredArray] = {}
    with _explained(path, None), _regular(path).open("rb") as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in found:
                raise ValueError(f"it holds {name!r} more than once")
            with _explained(path, member.filename), archive.open(member) as stream:
                found[name] = _header(stream, path, member.filename, size=member.file_size)
    return found


def _header(file: IO[bytes], path: Path, member: str | None, *, size: int) -> StoredArray:
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"npy format version {version} holds structured arrays only")
    shape, fortran_order, dtype = _READERS[version](file)
    offset = file.tell()
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"its header has the shape {shape}")
    missing = offset + math.prod(shape) * dtype.itemsize - size
    if missing > 0 and not dtype.hasobject:  # before a damaged header makes us ask for terabytes
        raise ValueError(f"the file ends {missing} bytes early")
    if dtype.hasobject:
        raise DataError(
            f"Refused to unpickle {_label(path, member)}: it holds Python objects (dtype object), which can run code "
            "when read; a numeric array is needed. Save plain numbers: numpy.save(path, array.astype('float32'))."
        )
    return StoredArray(path=path, member=member, shape=shape, dtype=dtype, fortran_order=fortran_order, offset=offset)


@contextmanager
def _open(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    with _explained(path, member), _regular(path).open("rb") as file:
        if member is None:
            yield file
        else:
            with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
                yield stream


def _regular(path: Path) -> Path:
    """The path, where it leads to a file: a pipe or a device may never end."""
    if not S_ISREG(path.stat().st_mode):
        raise ValueError("it is a device, a pipe or a folder, and no file")
    return path


@contextmanager
def _explained(path: Path, member: str | None) -> Iterator[None]:
    """Turn whatever zipfile, its decompressors and numpy's reader of headers raise on a bad file into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # lzma, tokenize, ast and others have errors of their own, which share no base
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"Cannot read {_label(path, member)}: {why}. An undamaged "
            f"{path.suffix} file as numpy.{'save' if path.suffix == '.npy' else 'savez'} writes it is needed. Write "
            "the file again, or remove it."
        ) from error


def _label(path: Path, member: str | None) -> str:
    return str(path) if member is None else f"{path} (member {member})"
