"""The CUDA driver through ctypes: memory, a stream, events, captured graphs.

libcuda -> `Driver` (one GPU, its primary context) -> handles as plain integers.
Must not need the CUDA runtime or a toolkit: the driver is there where a GPU is. Must not keep an error to itself.

Source: CUDA driver API reference, versions 11 to 13; the `_v2` names are what `cuda.h` makes of the plain ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.backends.doctor import DRIVER
from engines.core.errors import MissingRuntimeError
from engines.timing.timer import GpuMemoryError, TimingError

THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
# CUdevice_attribute
_ATTRIBUTES = {"sms": 16, "clock_khz": 13, "memory_khz": 36, "bus_bits": 37, "l2_bytes": 38, "major": 75, "minor": 76}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU as its driver describes it.

    Attributes:
        name: the driver's, like 'NVIDIA GeForce RTX 4090'.
        target: like 'sm89'.
        sms: streaming multiprocessors.
        boost_mhz: highest clock of them; 0 where the driver does not say.
        l2_bytes: of the L2 cache.
        bandwidth_gb_s: of memory, two transfers a clock, 10^9 bytes a second; 0 where the driver does not say.
        memory_bytes: of the GPU.
        bus: PCI address, like '00000000:65:00.0'.
        cuda: version that the driver supports, like '13.0'.
    """

    name: str
    target: str
    sms: int
    boost_mhz: float
    l2_bytes: int
    bandwidth_gb_s: float
    memory_bytes: int
    bus: str
    cuda: str


class Driver(AbstractContextManager["Driver"]):
    """One GPU of this machine and a stream on it; a context manager."""

    def __init__(self, index: int = 0) -> None:
        """The GPU of that number.

        Raises:
            MissingRuntimeError: no driver, or no such GPU.
        """
        try:
            self._cuda: Any = ctypes.CDLL(DRIVER)
        except OSError as error:
            raise MissingRuntimeError(
                f"No NVIDIA driver found here ({error}): measure on a machine with an NVIDIA GPU."
            ) from error
        count = ctypes.c_int()
        if self._cuda.cuInit(0) or self._cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value <= index:
            raise MissingRuntimeError(
                f"The NVIDIA driver shows {count.value} GPUs here, and number {index} is needed: measure on a machine "
                "with an NVIDIA GPU, and look at CUDA_VISIBLE_DEVICES."
            )
        self._device, self._context, self.stream = ctypes.c_int(), ctypes.c_void_p(), 0
        self._call("cuDeviceGet", ctypes.byref(self._device), index)

    def __enter__(self) -> Driver:
        """Makes the GPU's primary context current, which runtimes share, and a stream."""
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        self.stream = stream.value or 0
        return self

    def attach(self) -> None:
        """Makes the GPU's context that of the calling thread too."""
        self._call("cuCtxSetCurrent", self._context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives both back; a GPU that failed refuses, and its own error is what matters."""
        self._cuda.cuStreamDestroy_v2(ctypes.c_void_p(self.stream))
        self._cuda.cuDevicePrimaryCtxRelease_v2(self._device)

    def card(self) -> Card:
        """What the driver says of the GPU."""
        text, memory, version = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
        bus = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetName", text, len(text), self._device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), self._device)
        self._call("cuDeviceGetPCIBusId", bus, len(bus), self._device)
        self._call("cuDriverGetVersion", ctypes.byref(version))
        found = {name: self._attribute(number) for name, number in _ATTRIBUTES.items()}
        return Card(
            name=text.value.decode(),
            target=f"sm{found['major']}{found['minor']}",
            sms=found["sms"],
            boost_mhz=found["clock_khz"] / 1e3,
            l2_bytes=found["l2_bytes"],
            bandwidth_gb_s=2 * found["memory_khz"] * 1e3 * found["bus_bits"] / 8 / 1e9,
            memory_bytes=memory.value,
            bus=bus.value.decode(),
            cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        )

    def free_bytes(self) -> int:
        """Memory that is free now."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, nbytes: int) -> int:
        """The address of new memory.

        Raises:
            GpuMemoryError: there is not enough.
        """
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Gives memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: npt.NDArray[np.generic]) -> None:
        """Copies an array to the GPU."""
        array = np.ascontiguousarray(array)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), _pointer(array.ctypes.data), size)

    def download(self, address: int, array: npt.NDArray[np.generic]) -> None:
        """Copies from the GPU into a contiguous array."""
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoH_v2", _pointer(array.ctypes.data), ctypes.c_uint64(address), size)

    def copy(self, address: int, source: int, nbytes: int) -> None:
        """Copies within the GPU, once what its default stream was given is done."""
        self._call("cuMemcpyDtoD_v2", ctypes.c_uint64(address), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))
        self._call("cuStreamSynchronize", _pointer(0))  # such a copy may return before its end

    def fill(self, address: int, nbytes: int) -> None:
        """Writes zeros, in the stream."""
        size, stream = ctypes.c_size_t(nbytes), _pointer(self.stream)
        self._call("cuMemsetD8Async", ctypes.c_uint64(address), ctypes.c_ubyte(0), size, stream)

    def synchronize(self) -> None:
        """Waits for the stream.

        Raises:
            TimingError: something in it failed.
        """
        self._call("cuStreamSynchronize", _pointer(self.stream))

    def event(self) -> int:
        """A new event with a time."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        return event.value or 0

    def record(self, event: int) -> None:
        """Puts an event into the stream."""
        self._call("cuEventRecord", _pointer(event), _pointer(self.stream))

    def reached(self, event: int) -> bool:
        """Whether the GPU has come to an event."""
        return bool(self._cuda.cuEventQuery(_pointer(event)) == 0)

    def elapsed_us(self, first: int, second: int) -> float:
        """Microseconds of the GPU between two events that it has reached."""
        passed = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(passed), _pointer(first), _pointer(second))
        return passed.value * 1e3

    def destroy_event(self, event: int) -> None:
        """Gives an event back."""
        self._call("cuEventDestroy_v2", _pointer(event))

    def capture(self, launch: Callable[[], bool]) -> int | None:
        """An executable graph of what `launch` puts into the stream; None where that cannot be captured."""
        if self._cuda.cuStreamBeginCapture_v2(_pointer(self.stream), THREAD_LOCAL):
            return None
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        launched = launch()
        if self._cuda.cuStreamEndCapture(_pointer(self.stream), ctypes.byref(graph)):
            return None
        failed = self._cuda.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._cuda.cuGraphDestroy(graph)
        if failed or launched:
            return None if failed else executable.value
        self.destroy_graph(executable.value or 0)
        return None

    def replay(self, graph: int) -> None:
        """Puts an executable graph into the stream."""
        self._call("cuGraphLaunch", _pointer(graph), _pointer(self.stream))

    def destroy_graph(self, graph: int) -> None:
        """Gives an executable graph back."""
        self._call("cuGraphExecDestroy", _pointer(graph))

    def _attribute(self, number: int) -> int:
        """One figure of the GPU; 0 where this driver does not have it."""
        value = ctypes.c_int()
        return 0 if self._cuda.cuDeviceGetAttribute(ctypes.byref(value), number, self._device) else value.value

    def _call(self, name: str, *arguments: object) -> None:
        """Calls the driver.

        Raises:
            TimingError: it answers with an error.
        """
        if status := getattr(self._cuda, name)(*arguments):
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            kind = GpuMemoryError if status == OUT_OF_MEMORY else TimingError
            raise kind(f"The CUDA driver refuses {name}: {(text.value or b'?').decode()} (error {status}).")


def _pointer(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)
