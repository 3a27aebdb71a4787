"""Tensor data in side files: where it lies, how many bytes it is, reading it and moving it in pieces.

    TensorProto + folder -> External (checked place) -> stream: pieces of its bytes -> tensor_array: its values
    move(tensor, out, ...)   the values go to an open side file, `out` says where they lie
    placed(name, ...)        a tensor whose values lie in a file of a `store`: a folder of our own, outside the model's

It must not read a file outside the model's folder or a store of this process, hold more than one tensor, or know
anything of graphs. Large tensors are mapped, so that their pages are read when they are looked at.
Source: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qdq.core.errors import ModelError
from qdq.core.resources import given_bytes

SIDE_FILE_THRESHOLD = 1024  # bytes; smaller tensors stay in the model file, as in onnx's own writer
SIDE_FILE_ALIGNMENT = 4096  # bytes; lets a reader map a tensor (ExternalData.md, "offset")
CHUNK = 1 << 24  # bytes read at once when streaming
MAPPED = 1 << 20  # bytes; smaller external tensors are read into memory
LARGE = 1 << 28  # bytes of external data in a model; above, weights are worked on one at a time and kept on disk
IN_FILE_LIMIT = 1_900_000_000  # bytes; protobuf refuses a message of 2 GiB, the nodes need the rest
STORE = "store"  # key of a tensor's external data: the folder that its location is in; `storage.load` takes it away
KNOWN = frozenset(TensorProto.DataType.values())  # types of tensors
_FOUR, _TWO = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1), (TensorProto.INT2, TensorProto.UINT2)
_BITS: dict[int, int] = {**dict.fromkeys(_FOUR, 4), **dict.fromkeys(_TWO, 2)}


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's values lie in a side file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def is_packed(tensor: TensorProto) -> bool:
    """Whether several values share a byte."""
    return tensor.data_type in _BITS


def is_stored(tensor: TensorProto) -> bool:
    """Whether the tensor's values lie in a store."""
    return is_external(tensor) and any(e.key == STORE for e in tensor.external_data)


def is_large(tensors: Iterable[TensorProto]) -> bool:
    """Whether tensors hold more external data than is to be in memory at once, or have some in a store.

    That is LARGE, or a quarter of the memory that the user allows.
    """
    outside, given = [t for t in tensors if is_external(t)], given_bytes()
    most = LARGE if given is None else min(LARGE, given // 4)
    return sum(map(tensor_bytes, outside)) > most or any(map(is_stored, outside))


def placed(name: str, data_type: int, dims: Iterable[int], path: Path) -> TensorProto:
    """A tensor whose values are the whole of a file in a store.

    The file holds packed values, as ONNX stores them; it must stay as long as the tensor is in use.
    """
    tensor = TensorProto(name=name, data_type=data_type, dims=dims)
    refer(tensor, location=path.name, offset=0, length=path.stat().st_size, **{STORE: path.parent.absolute()})
    return tensor


def refer(tensor: TensorProto, **where: object) -> None:
    """Say where a tensor's values lie: location, offset, length, and the store if it is in one."""
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))


def without_store_key(tensor: TensorProto) -> None:
    """Take away what only tensors of this process may say: the folder of a store."""
    kept = [e for e in tensor.external_data if e.key != STORE]
    if len(kept) < len(tensor.external_data):
        del tensor.external_data[:]
        tensor.external_data.extend(kept)


def release(array: np.ndarray) -> None:
    """Give back the memory of an array that is mapped from a file; it is read anew when it is looked at again."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's packed values; 0 for text, which has no fixed size, and for types that onnx does not know."""
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED) or tensor.data_type not in KNOWN:
        return 0
    bits = _BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims) * bits + 7) // 8


def values_stored(tensor: TensorProto) -> tuple[int, int]:
    """How many bytes, or values of its own type, a tensor's shape needs in the model, and how many are there."""
    if is_external(tensor) or tensor.data_type == TensorProto.UNDEFINED:
        return 0, 0
    if tensor.HasField("raw_data"):
        return tensor_bytes(tensor), len(tensor.raw_data)
    count, kind = math.prod(tensor.dims), tensor.data_type
    if kind in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        count *= 2
    elif kind in _BITS:
        count = tensor_bytes(tensor)
    return count, len(getattr(tensor, onnx.helper.tensor_dtype_to_field(kind)))


def tensor_array(tensor: TensorProto, directory: Path) -> np.ndarray:
    """The values of a tensor whose external data, if any, lie in a folder: its own type and shape, perhaps read-only.

    Large external data are mapped: they take memory as they are looked at, until `release` or the end of the array.

    Raises:
        ModelError: the external data cannot be read.
    """
    if is_external(tensor) and tensor_bytes(tensor) >= MAPPED and not is_packed(tensor) and sys.byteorder == "little":
        return _mapped(tensor, directory)
    return np.asarray(numpy_helper.to_array(embedded(tensor, directory)))


def embedded(tensor: TensorProto, directory: Path) -> TensorProto:
    """The same tensor with its values in it.

    Raises:
        ModelError: the external data cannot be read.
    """
    if not is_external(tensor):
        return tensor
    raw = b"".join(stream(tensor, directory))
    return TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """Where an external tensor's bytes lie; checked to be inside the model's folder and inside the file."""

    path: Path
    offset: int
    length: int

    @classmethod
    def of(cls, tensor: TensorProto, directory: Path) -> External:
        """Find and check the place of an external tensor of a model in a folder.

        Raises:
            ModelError: the data file is missing, too short, outside the folder, or of another length than the shape.
        """
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        what = f"Cannot read the external data of tensor {tensor.name!r}"
        directory = Path(entries.get(STORE, directory))
        path = directory / location
        if (
            not location
            or "\0" in location
            or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))
        ):
            raise ModelError(
                f"{what}: its location {location!r} is not inside the model's folder {directory}, so it "
                "is not followed. Put the data file itself (no link) into that folder."
            )
        if not path.is_file():
            raise ModelError(
                f"{what}: {location!r} is not a file in the model's folder {directory}. "
                "Copy the data file that was exported with the model to that place."
            )
        needed, available = tensor_bytes(tensor), path.stat().st_size
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", str(needed)))
        except ValueError:
            offset = length = -1
        if offset < 0 or length != needed or offset + length > available:
            raise ModelError(
                f"{what}: it needs {needed} bytes for its shape {list(tensor.dims)}, the model says {length} bytes "
                f"from offset {offset}, and {location!r} holds {available}. The data file is truncated or belongs to "
                "another model; copy or export both again."
            )
        return cls(path=path, offset=offset, length=length)


def stream(tensor: TensorProto, directory: Path) -> Iterator[bytes]:
    """The bytes of an external tensor of a model in a folder, in pieces of at most `CHUNK`.

    Raises:
        ModelError: as `External.of`, or the data file cannot be read.
    """
    place = External.of(tensor, directory)
    left = place.length
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            while left and (chunk := file.read(min(left, CHUNK))):
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise _unreadable(tensor, place, error) from None


def move(tensor: TensorProto, out: TensorProto, directory: Path, location: str, file: BinaryIO) -> None:
    """Make `out` the same tensor with its values in the side file; small ones stay in the model.

    Args:
        tensor: what to move; unchanged unless it is `out` itself.
        out: the tensor to fill.
        directory: the folder of the source's external data.
        location: name of the side file, to be written into `out`.
        file: the side file, open for writing; the values are appended.

    Raises:
        ModelError: external data of the source can no longer be read.
        OSError: the side file cannot be written.
    """
    if tensor_bytes(tensor) < SIDE_FILE_THRESHOLD and not is_external(tensor):
        if out is not tensor:
            out.CopyFrom(tensor)
        return
    file.write(b"\0" * (-file.tell() % SIDE_FILE_ALIGNMENT))
    offset = file.tell()
    if is_external(tensor):
        for chunk in stream(tensor, directory):
            file.write(chunk)
    else:
        raw = tensor if tensor.HasField("raw_data") else numpy_helper.from_array(numpy_helper.to_array(tensor))
        file.write(raw.raw_data)
    moved = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, doc_string=tensor.doc_string)
    refer(moved, location=location, offset=offset, length=file.tell() - offset)
    out.CopyFrom(moved)


def _mapped(tensor: TensorProto, directory: Path) -> np.ndarray:
    """The values of an external tensor, read-only, as a view of the file."""
    place = External.of(tensor, directory)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    try:
        return np.asarray(np.memmap(place.path, dtype, mode="r", offset=place.offset, shape=tuple(tensor.dims)))
    except OSError as error:
        raise _unreadable(tensor, place, error) from None


def _unreadable(tensor: TensorProto, place: External, error: OSError) -> ModelError:
    return ModelError(
        f"Cannot read the external data of tensor {tensor.name!r} from {place.path}: {error.strerror}. "
        "Check the file and its permissions."
    )
