"""What a model takes, and arrays of others as such: NumPy's, and all that speak DLPack, on the CPU or a GPU.

sample, specs -> `checked` -> name -> `Array`, or `OnGpu` for what lies on a GPU; no copy is made.
Must not convert values: another type or shape is refused.

Source: DLPack 1.0, dlpack.h, and its Python protocol.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engines.backends.compiler import ShapeRange
from engines.core.errors import EngineError, did_you_mean

Array = npt.NDArray[Any]
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
LEGACY_STREAM = 1  # CUDA's default stream, in the protocol's words
_KINDS = {
    (0, 8): np.int8,
    (0, 16): np.int16,
    (0, 32): np.int32,
    (0, 64): np.int64,
    (1, 8): np.uint8,
    (1, 16): np.uint16,
    (1, 32): np.uint32,
    (1, 64): np.uint64,
    (2, 16): np.float16,
    (2, 32): np.float32,
    (2, 64): np.float64,
    (4, 16): ml_dtypes.bfloat16,
    (6, 8): np.bool_,
    (10, 8): ml_dtypes.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or an output.

    Attributes:
        name: of the model.
        dtype: numpy's name of it; "" where numpy has none.
        shape: None where a size is open.
        ranges: of the shape, one for each optimization profile of an engine; empty: any.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    ranges: tuple[ShapeRange, ...] = ()

    @property
    def said(self) -> str:
        """In words."""
        sizes = ", ".join("any" if n is None else str(n) for n in self.shape)
        beyond = (
            f", from {' or '.join(f'{_said(r.min)} to {_said(r.max)}' for r in self.ranges)}" if self.ranges else ""
        )
        return f"{self.dtype or 'values'} ({sizes}){beyond}"

    def to_mapping(self) -> dict[str, Any]:
        """Plain values."""
        ranges = {"ranges": [str(r) for r in self.ranges]} if self.ranges else {}
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), **ranges}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnGpu:
    """A contiguous array in the memory of a GPU.

    Attributes:
        address: of its first element.
        shape: of it.
        dtype: numpy's.
        device: the GPU's number.
        owner: keeps the memory.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int
    owner: object = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def checked(sample: object, specs: tuple[TensorSpec, ...]) -> dict[str, Array | OnGpu]:
    """A sample as arrays of the types and shapes that a model takes.

    Raises:
        EngineError: no mapping, other names, no array, another type, rank or size; says what is there and needed.
    """
    names = [spec.name for spec in specs]
    needed = "; ".join(f"{spec.name!r}: {spec.said}" for spec in specs)
    if not isinstance(sample, Mapping):
        raise EngineError(f"A sample is a {type(sample).__name__}; a mapping of name to array is needed: {needed}.")
    if set(sample) != set(names):
        unknown = [str(name) for name in sample if name not in names]
        near = did_you_mean(unknown[0], [n for n in names if n not in sample]) if unknown else ""
        held = ", ".join(repr(str(name)) for name in sample) or "nothing"
        raise EngineError(f"A sample holds {held}, and the model needs exactly {needed}.{near}")
    found = {}
    for spec in specs:
        array = taken(sample[spec.name], spec.name)
        if spec.dtype and array.dtype != np.dtype(spec.dtype):
            raise EngineError(
                f"Input {spec.name!r} is {array.dtype}, and the model takes {spec.said}: convert it first, for "
                f"instance by value.astype({spec.dtype!r})."
            )
        _check_shape(spec, tuple(array.shape))
        found[spec.name] = array
    return found


def _check_shape(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    fits = len(shape) == len(spec.shape) and all(n in (None, m) for n, m in zip(spec.shape, shape, strict=True))
    if not fits or (spec.ranges and not any(r.takes(shape) for r in spec.ranges)):
        rank = "" if len(shape) == len(spec.shape) else f" of rank {len(shape)}"
        raise EngineError(
            f"Input {spec.name!r} has the shape {_said(shape)}{rank}, and the model takes {spec.said}: give that shape"
            f"{', or build an engine for this one' if spec.ranges else ''}."
        )


def taken(value: Any, name: str) -> Array | OnGpu:
    """An array of NumPy's, or of any library that speaks DLPack, as it lies in memory.

    Raises:
        EngineError: it is no array, or lies where nothing here can read it; names the input.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise EngineError(f"Input {name!r} is a masked array: fill it first, for instance by value.filled(0).")
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        raise EngineError(
            f"Input {name!r} is a {type(value).__name__}: a NumPy array is needed, or an array of a library that "
            "speaks DLPack, such as PyTorch, CuPy or JAX."
        )
    try:
        kind, device = (int(n) for n in value.__dlpack_device__())
        if kind in (CPU, CUDA_HOST):
            return _on_cpu(value)
        if kind in (CUDA, CUDA_MANAGED):
            return _on_gpu(value.__dlpack__(stream=LEGACY_STREAM), device)
    except EngineError as error:
        raise EngineError(f"Input {name!r} cannot be read: {error}") from None
    except Exception as error:  # of another library
        raise EngineError(f"Input {name!r} cannot be read: {type(value).__name__} says {error}") from error
    raise EngineError(f"Input {name!r} lies on a device of DLPack's kind {kind}: move it to the CPU or to a CUDA GPU.")


def _on_cpu(value: Any) -> Array:
    try:
        return np.asarray(np.from_dlpack(value))
    except (BufferError, TypeError, RuntimeError):  # NumPy's own reader has no bfloat16 or float8
        capsule = value.__dlpack__()
    held, shape, dtype, strides = _parts(capsule)
    if strides is not None and strides != _contiguous(shape):
        raise EngineError("it is not contiguous; make it so first, for instance by value.contiguous().")
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.frombuffer(ctypes.string_at(held, count), np.uint8)  # a copy: NumPy cannot keep a capsule
    return raw.view(dtype).reshape(shape)


def _on_gpu(capsule: object, device: int) -> OnGpu:
    address, shape, dtype, strides = _parts(capsule)
    if strides is not None and strides != _contiguous(shape):
        raise EngineError("it is not contiguous; make it so first, for instance by value.contiguous().")
    return OnGpu(address=address, shape=shape, dtype=dtype, device=device, owner=capsule)


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _parts(capsule: object) -> tuple[int, tuple[int, ...], np.dtype[Any], tuple[int, ...] | None]:
    """Address, shape, type and strides (in elements) of a capsule, which stays its owner's: it is not consumed.

    Raises:
        EngineError: of a type that no model here takes.
    """
    kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    address = kind(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dltensor")
    tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
    dtype = _KINDS.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise EngineError(f"its type (DLPack's code {tensor.code}, {tensor.bits} bits) is that of no model's input.")
    shape = tuple(tensor.shape[n] for n in range(tensor.ndim))
    strides = tuple(tensor.strides[n] for n in range(tensor.ndim)) if tensor.strides else None
    return (tensor.data or 0) + tensor.byte_offset, shape, np.dtype(dtype), strides


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= max(n, 1)
    return tuple(reversed(steps))


def _said(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
