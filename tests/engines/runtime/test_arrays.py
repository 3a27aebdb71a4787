"""What a model takes is said clearly, and arrays of any library are taken as they lie."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engines.backends.compiler import ShapeRange
from engines.core.errors import EngineError
from engines.runtime.arrays import CPU, CUDA, OnGpu, TensorSpec, _Tensor, checked, taken

SPECS = (
    TensorSpec(name="image", dtype="float32", shape=(None, 1, 4)),
    TensorSpec(name="mask", dtype="bool", shape=(2,)),
)
GOOD = {"image": np.zeros((3, 1, 4), np.float32), "mask": np.zeros(2, bool)}


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class Foreign:
    """An array of another library, as DLPack has it."""

    def __init__(
        self, array: np.ndarray, *, code: int = 2, device: tuple[int, int] = (CPU, 0), strides: tuple[int, ...] = ()
    ) -> None:
        self.array, self.device, self.streams = array, device, list[Any]()
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        steps = (ctypes.c_int64 * array.ndim)(*strides) if strides else None
        pointer = ctypes.POINTER(ctypes.c_int64)
        tensor = _Tensor(
            array.ctypes.data, *device, array.ndim, code, 8 * array.itemsize, 1, shape, steps or pointer(), 0
        )
        self._kept = (shape, steps, Managed(tensor, None, None))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.streams.append(stream)
        make = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(("PyCapsule_New", ctypes.pythonapi))(ctypes.addressof(self._kept[2]), b"dltensor", None)


class Exporting:
    """NumPy's own exchange, behind another type."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CPU, 0)

    def __dlpack__(self, **given: Any) -> Any:
        return self.array.__dlpack__(**given)


def test_a_good_sample_is_taken_as_it_is() -> None:
    found = checked(GOOD, SPECS)
    assert all(found[name] is array for name, array in GOOD.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": None}, r"a NoneType: a NumPy array is needed"),
        ({"image": np.ma.masked_all((3, 1, 4), np.float32)}, r"'image' is a masked array: fill it first"),
        ({"image": [[1.0]]}, r"'image' is a list: a NumPy array is needed, .*DLPack"),
        ({"image": np.zeros((3, 1, 4))}, r"'image' is float64, .*float32 \(any, 1, 4\).*astype\('float32'\)"),
        ({"image": np.zeros((3, 1, 4), ">f4")}, r"'image' is >f4"),
        (
            {"image": np.zeros((3, 4), np.float32)},
            r"the shape \(3, 4\) of rank 2, and the model takes float32 \(any, 1",
        ),
        ({"image": np.zeros((3, 2, 4), np.float32)}, r"the shape \(3, 2, 4\), and the model takes"),
        ({"imge": 1, "image": ...}, r"holds 'mask', 'imge'.*needs exactly 'image': float32.*Did you mean 'image'"),
        ({"more": 1}, r"holds 'image', 'mask', 'more'"),
    ],
)
def test_a_wrong_sample_is_refused(changes: dict[str, Any], said: str) -> None:
    sample: dict[str, Any] = {**GOOD, **changes}
    sample = {name: value for name, value in sample.items() if value is not ...}
    with pytest.raises(EngineError, match=said):
        checked(sample, SPECS)


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(EngineError, match="A sample is a ndarray; a mapping of name to array is needed: 'image'"):
        checked(np.zeros(3), SPECS)


def test_shapes_beyond_all_profiles_are_refused() -> None:
    ranges = tuple(ShapeRange(min=(a, 1), opt=(a, 1), max=(b, 1)) for a, b in ((1, 2), (8, 16)))
    spec = (TensorSpec(name="x", dtype="float32", shape=(None, 1), ranges=ranges),)
    for n in (1, 2, 8, 16):
        checked({"x": np.zeros((n, 1), np.float32)}, spec)
    for n in (0, 3, 17):
        with pytest.raises(EngineError, match=r"from \(1, 1\) to \(2, 1\) or \(8, 1\) to \(16, 1\).*build an engine"):
            checked({"x": np.zeros((n, 1), np.float32)}, spec)


def test_arrays_of_other_libraries_share_their_memory() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
    found = taken(Exporting(array), "image")
    assert isinstance(found, np.ndarray) and np.shares_memory(found, array)
    turned = taken(Exporting(array.T), "image")
    np.testing.assert_array_equal(turned, array.T)


def test_types_that_numpy_lacks_are_read() -> None:
    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    found = taken(Foreign(array, code=4), "x")
    assert isinstance(found, np.ndarray) and found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, array)
    with pytest.raises(EngineError, match="'x' cannot be read: it is not contiguous"):
        taken(Foreign(array, code=4, strides=(1, 2)), "x")
    with pytest.raises(EngineError, match=r"its type \(DLPack's code 5, 16 bits\)"):
        taken(Foreign(array, code=5), "x")


def test_memory_of_a_gpu_is_named_not_read() -> None:
    array = np.zeros((2, 3), np.float32)
    value = Foreign(array, device=(CUDA, 1), strides=(3, 1))
    found = taken(value, "x")
    assert isinstance(found, OnGpu) and found.address == array.ctypes.data and found.device == 1
    assert (found.shape, found.dtype, found.nbytes) == ((2, 3), np.float32, 24) and value.streams == [1]
    with pytest.raises(EngineError, match="'x' cannot be read: it is not contiguous"):
        taken(Foreign(array, device=(CUDA, 0), strides=(1, 2)), "x")
    with pytest.raises(EngineError, match="on a device of DLPack's kind 10"):
        taken(Foreign(array, device=(10, 0)), "x")


def test_what_another_library_says_is_passed_on() -> None:
    class Gradient(Exporting):
        def __dlpack__(self, **given: Any) -> Any:
            raise BufferError("Can't export tensors that require gradient")

    with pytest.raises(EngineError, match="'x' cannot be read: Gradient says Can't export"):
        taken(Gradient(np.zeros(2)), "x")
