"""An engine of TensorRT or TensorRT-RTX on one GPU, for any number of threads, which take turns.

bytes -> `OnGpuEngine` -> arrays by name in and out, by one execution context and memory that grows with what is run.
Must not read an engine's file: its bytes were verified. Must not keep an error of the runtime to itself.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from engines.backends.backend import Running, backend_named
from engines.backends.compiler import ShapeRange
from engines.backends.doctor import gpus
from engines.backends.plugins import load_plugins
from engines.backends.trt import RuntimeCache, fitting_profile
from engines.core.errors import EngineError, OutOfMemoryError, import_runtime
from engines.runtime.arrays import Array, OnGpu, TensorSpec
from engines.timing.driver import Driver
from engines.timing.loaded import DTYPES

_MEMORY = ("out of memory", "outofmemory", "bad_alloc", "insufficient memory", "cudaerrormemoryallocation")


@dataclass(slots=True)
class _Memory:
    """What one tensor has on the GPU."""

    address: int = 0
    nbytes: int = 0


class OnGpuEngine:
    """An engine that runs on a GPU of this machine."""

    def __init__(
        self, data: bytes, *, backend: str, device: int, running: Running, host_code: bool = False, where: str
    ) -> None:
        """Load it.

        Args:
            data: the engine.
            backend: whose it is, by the name of a backend.
            device: the GPU's number, as the driver counts.
            running: what it needs beside it.
            host_code: the engine may hold a runtime of its own (VERSION_COMPATIBLE).
            where: what messages call it.

        Raises:
            MissingRuntimeError: the runtime or the driver is not there.
            OutOfMemoryError: the GPU has too little memory for its largest shapes.
            EngineError: the runtime refuses it.
        """
        self._lock, self._memory, self._where = threading.Lock(), dict[str, _Memory](), where
        self._device, self._profile, self._open, self._allocators = device, 0, ExitStack(), dict[str, Any]()
        own = backend_named(backend)
        self._trt = trt = import_runtime(own.runtime)
        load_plugins(trt, running.plugins)
        self._cache = RuntimeCache(running.runtime_cache) if running.runtime_cache else None
        self._driver = self._open.enter_context(Driver(device))
        try:
            self._log = _logger(trt)
            runtime = trt.Runtime(self._log)
            runtime.engine_host_code_allowed = host_code
            engine = runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise self._refusal(f"{own.title} {trt.__version__} does not load {where} on this GPU")
            self._runtime, self._engine = runtime, engine
            if (budget := running.weight_streaming_budget) is not None:
                automatic = budget < 0
                engine.weight_streaming_budget_v2 = (
                    engine.get_weight_streaming_automatic_budget() if automatic else budget
                )
            settings = () if self._cache is None else (self._cache.settings(engine),)
            self._context: Any = engine.create_execution_context(*settings)
            if self._context is None:
                raise self._refusal(f"{own.title} makes no execution context for {where}")
            self._read_tensors()
        except BaseException:
            self._context = self._engine = self._runtime = None
            self._open.close()
            raise
        self.title = f"{own.title} {trt.__version__} on {gpus()[device].name} ({gpus()[device].target})"

    def run(self, arrays: Mapping[str, Array | OnGpu]) -> dict[str, Array]:
        """One run, from any thread; of several one after the other.

        Raises:
            OutOfMemoryError: it needs more memory than the GPU has.
            EngineError: the runtime refuses the shapes or the run.
        """
        with self._lock:
            if self._context is None:
                raise EngineError(f"{self._where} was closed.")
            self._driver.attach()
            self._log.errors.clear()
            try:
                return self._run(arrays)
            except OutOfMemoryError:
                self._free()
                raise

    def close(self) -> None:
        """Give everything back, after a run that goes on; a second time does nothing."""
        with self._lock:
            if self._context is None:
                return
            self._driver.attach()
            if self._cache is not None:
                self._cache.save()
            self._context = self._engine = self._runtime = None
            self._free()
            self._open.close()

    def _read_tensors(self) -> None:
        """Names, types, shapes and their ranges."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        specs: list[list[TensorSpec]] = [[], []]
        self._host = {name for name in names if engine.is_shape_inference_io(name)}
        for name in names:
            kind = engine.get_tensor_dtype(name).name
            if kind not in DTYPES:
                raise EngineError(f"Tensor {name} of {self._where} is {kind}, which has no data here.")
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            shape = tuple(None if n < 0 else int(n) for n in engine.get_tensor_shape(name))
            ranges: tuple[ShapeRange, ...] = ()
            if is_input and None in shape and name not in self._host:
                found = [engine.get_tensor_profile_shape(name, p) for p in range(engine.num_optimization_profiles)]
                ranges = tuple(ShapeRange(min=tuple(a), opt=tuple(b), max=tuple(c)) for a, b, c in found)
            spec = TensorSpec(name=name, dtype=np.dtype(DTYPES[kind]).name, shape=shape, ranges=ranges)
            specs[not is_input].append(spec)
        self.inputs, self.outputs = (tuple(some) for some in specs)

    def _run(self, arrays: Mapping[str, Array | OnGpu]) -> dict[str, Array]:
        engine, context, driver = self._engine, self._context, self._driver
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        if (profile := fitting_profile(engine, shapes)) != self._profile:
            if not context.set_optimization_profile_async(profile, driver.stream):
                raise self._refusal(f"The runtime refuses optimization profile {profile} of {self._where}")
            driver.synchronize()
            self._profile = profile
        held = []  # host memory that must outlive the run
        for name, array in arrays.items():
            if not context.set_input_shape(name, shapes[name]):
                raise self._refusal(f"The runtime refuses the shape {shapes[name]} of input {name!r} of {self._where}")
            if name in self._host:
                values = np.ascontiguousarray(self._on_host(name, array))
                held.append(values)
                address = values.ctypes.data
            else:
                address = self._room(name, array.nbytes)
                self._upload(address, array)
            context.set_tensor_address(name, address)
        readers = {spec.name: self._bind_output(spec) for spec in self.outputs}
        if not context.execute_async_v3(driver.stream):
            raise self._refusal(f"The runtime refuses to run {self._where}")
        driver.synchronize()
        return {name: reader() for name, reader in readers.items()}

    def _bind_output(self, spec: TensorSpec) -> Any:
        """Memory for an output; what reads it after the run."""
        context, dtype = self._context, np.dtype(spec.dtype)
        shape = tuple(int(n) for n in context.get_tensor_shape(spec.name))
        if spec.name in self._host:
            values = np.empty(shape, dtype)
            context.set_tensor_address(spec.name, values.ctypes.data)
            return lambda: values
        if min(shape, default=0) >= 0:
            address = self._room(spec.name, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
            context.set_tensor_address(spec.name, address)
            return lambda: self._download(address, shape, dtype)
        most = int(context.get_max_output_size(spec.name))
        address, seen = self._room(spec.name, most), list[tuple[int, ...]]()
        context.set_tensor_address(spec.name, address)
        self._allocators[spec.name] = _allocator(self._trt, address, most, seen)  # the context does not keep it alive
        context.set_output_allocator(spec.name, self._allocators[spec.name])
        return lambda: self._download(address, seen[-1], dtype)

    def _upload(self, address: int, array: Array | OnGpu) -> None:
        if not isinstance(array, OnGpu):
            self._driver.upload(address, array)
        elif array.device != self._device:
            raise EngineError(f"An input lies on GPU {array.device}, and the engine runs on GPU {self._device}.")
        elif array.nbytes:
            self._driver.copy(address, array.address, array.nbytes)

    def _download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        found = np.empty(shape, dtype)
        if found.nbytes:
            self._driver.download(address, found)
        return found

    def _on_host(self, name: str, array: Array | OnGpu) -> Array:
        if isinstance(array, OnGpu):
            raise EngineError(f"Input {name!r} says a shape, which the runtime reads on the CPU: give it there.")
        return array

    def _room(self, name: str, nbytes: int) -> int:
        """The address of memory for a tensor, which is kept for the next run.

        Raises:
            OutOfMemoryError: the GPU has too little.
        """
        memory = self._memory.setdefault(name, _Memory())
        if memory.nbytes < nbytes or not memory.address:
            if memory.address:
                self._driver.free(memory.address)
                memory.address = memory.nbytes = 0
            memory.address, memory.nbytes = self._driver.allocate(nbytes), nbytes
        return memory.address

    def _free(self) -> None:
        for memory in self._memory.values():
            if memory.address:
                self._driver.free(memory.address)
        self._memory.clear()

    def _refusal(self, what: str) -> EngineError:
        """An error with the runtime's own words."""
        said = " | ".join(self._log.errors) or "it gives no reason"
        short = any(word in said.lower() for word in _MEMORY)
        return (OutOfMemoryError if short else EngineError)(f"{what}: {said}.")


def _logger(trt: ModuleType) -> Any:
    """A logger that keeps errors."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message.strip())
                del self.errors[:-8]

    return Log()


def _allocator(trt: ModuleType, address: int, most: int, seen: list[tuple[int, ...]]) -> Any:
    """An allocator that gives memory which is there already, and notes the shape that the run decides."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return address if size <= most else 0

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return address if size <= most else 0

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            seen.append(tuple(int(n) for n in shape))

    return Allocator()
