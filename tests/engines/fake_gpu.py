"""A GPU that is not there, behind the real names: the CUDA driver, NVML and a runtime of engines, on clocks of its own.

The host takes time for each call, the GPU works off its stream in order, and an event has the time at which the GPU
came to it: what a host's clock would show and what events show are different here too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.timing import driver, machine

NOT_READY, NO_CAPTURE, NO_MEMORY, NO_DEVICE = 600, 900, 2, 6
ATTRIBUTES = {16: 128, 13: 2_520_000, 36: 10_501_000, 37: 384, 38: 72 << 20, 75: 8, 76: 9}


@dataclass
class FakeKernel:
    """One kernel: microseconds by the time in seconds at which it begins."""

    name: str
    us: Callable[[float], float]


@dataclass
class FakeEngine:
    """What a fake runtime loads: kernels, tensors (name -> (shape, type, is input)), and outputs of inputs."""

    kernels: list[FakeKernel]
    tensors: dict[str, tuple[tuple[int, ...], str, bool]] = field(
        default_factory=lambda: {"x": ((4,), "HALF", True), "y": ((4,), "HALF", False)}
    )
    compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda arrays: {}
    capturable: bool = True
    profiles: list[dict[str, tuple[tuple[int, ...], ...]]] = field(default_factory=list)  # name -> min, opt, max
    sizes: Callable[[dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]]] = lambda shapes: {}  # of outputs
    most: dict[str, int] = field(default_factory=dict)  # bytes of outputs whose size the data decide
    says: Callable[[dict[str, tuple[int, ...]]], str] = lambda shapes: ""  # why a run is refused


@dataclass
class FakeRuntimeCache:
    """What a runtime compiled: names of kernels. It takes what it wrote itself, and nothing else."""

    names: list[str] = field(default_factory=list)
    compiled: int = 0

    def compile(self, kernels: list[FakeKernel]) -> None:
        new = [kernel.name for kernel in kernels if kernel.name not in self.names]
        self.names += new
        self.compiled += len(new)

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"rtx:"):
            return False
        self.names = blob[4:].decode().split(",")
        return True

    def serialize(self) -> bytes:
        return b"rtx:" + ",".join(self.names).encode()


class FakeCuda:
    """The driver's functions, and the state of one GPU."""

    def __init__(self, *, call_us: float = 4.0, devices: int = 1, name: str = "NVIDIA GeForce RTX 4090") -> None:
        self.host_us = self.gpu_us = 0.0
        self.call_us, self.devices, self.name = call_us, devices, name
        self.memory: dict[int, np.ndarray] = {}
        self.taken: dict[int, int] = {}
        self.events: dict[int, float] = {}
        self.graphs: dict[int, list[FakeKernel]] = {}
        self.captured: list[FakeKernel] | None = None
        self.next, self.calls, self.limit_bytes = 1, list[str](), 24 << 30

    def number(self) -> int:
        self.next += 4096
        return self.next

    def work(self, kernel: FakeKernel) -> None:
        """Puts a kernel into the stream, or into the graph that is captured."""
        if self.captured is not None:
            self.captured.append(kernel)
            return
        began = max(self.gpu_us, self.host_us)
        self.gpu_us = began + kernel.us(began / 1e6)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the fake driver has no {name}")

    def tick(self, name: str) -> None:
        self.calls.append(name)
        self.host_us += self.call_us

    # what `ctypes.CDLL` would give, by the real names

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> int:
        text.value = self.name.encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = self.limit_bytes
        return 0

    def cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> int:
        text.value = b"00000000:65:00.0"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13000
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> int:
        value._obj.value = ATTRIBUTES[number]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        stream._obj.value = 7
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        used = sum(self.taken.values())
        free._obj.value, total._obj.value = self.limit_bytes - used, self.limit_bytes
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        if sum(self.taken.values()) + size.value > self.limit_bytes:
            return NO_MEMORY
        address._obj.value = self.number()
        self.taken[address._obj.value] = size.value
        self.memory[address._obj.value] = np.zeros(min(size.value, 1 << 16), np.uint8)
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        del self.memory[address.value], self.taken[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, address: Any, source: Any, size: Any) -> int:
        read = ctypes.cast(source, ctypes.POINTER(ctypes.c_ubyte))
        self.memory[address.value] = np.ctypeslib.as_array(read, (size.value,)).copy()
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, address: Any, size: Any) -> int:
        ctypes.memmove(target, self.memory[address.value].ctypes.data, size.value)
        return 0

    def cuMemcpyDtoD_v2(self, address: Any, source: Any, size: Any) -> int:
        self.memory[address.value] = self.memory[source.value][: size.value].copy()
        return 0

    def cuMemsetD8Async(self, address: Any, value: Any, size: Any, stream: Any) -> int:
        self.tick("cuMemsetD8Async")
        self.work(FakeKernel("fill", lambda _: size.value / 1e6))
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        self.tick("cuStreamSynchronize")
        self.host_us = max(self.host_us, self.gpu_us)
        return 0

    def cuEventCreate(self, event: Any, flags: int) -> int:
        event._obj.value = self.number()
        self.events[event._obj.value] = -1.0
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        self.tick("cuEventRecord")
        self.gpu_us = self.events[event.value] = max(self.gpu_us, self.host_us)
        return 0

    def cuEventQuery(self, event: Any) -> int:
        return 0 if self.events[event.value] <= self.host_us else NOT_READY

    def cuEventElapsedTime(self, passed: Any, first: Any, second: Any) -> int:
        assert self.events[second.value] <= self.host_us, "read before the GPU came to it"
        passed._obj.value = (self.events[second.value] - self.events[first.value]) / 1e3
        return 0

    def cuEventDestroy_v2(self, event: Any) -> int:
        del self.events[event.value]
        return 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        self.captured = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        kernels, self.captured = self.captured, None
        if kernels is None:
            return NO_CAPTURE
        graph._obj.value = self.number()
        self.graphs[graph._obj.value] = kernels
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = self.number()
        self.graphs[executable._obj.value] = self.graphs[graph.value]
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        del self.graphs[graph.value]
        return 0

    def cuGraphExecDestroy(self, graph: Any) -> int:
        del self.graphs[graph.value]
        return 0

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:
        self.tick("cuGraphLaunch")
        for kernel in self.graphs[graph.value]:
            self.work(kernel)
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = {NO_MEMORY: b"out of memory"}.get(status, b"fake error")
        return 0

    # NVML: a clock that is held down while the GPU is looked at

    looks = 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus: bytes, handle: Any) -> int:
        return 0 if bus == b"00000000:65:00.0" else NO_DEVICE

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        text.value = b"580.10"
        return 0

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any, milliwatts: Any) -> int:
        milliwatts._obj.value = 450_000
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: Any, milliwatts: Any) -> int:
        self.looks += 1
        milliwatts._obj.value = 30_000 + 100_000 * (self.looks > 1)
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, mhz: Any) -> int:
        mhz._obj.value = {1: 2520 - 300 * (self.looks > 1), 2: 10501}[kind]
        return 0

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, celsius: Any) -> int:
        celsius._obj.value = 61
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, reasons: Any) -> int:
        reasons._obj.value = 4
        return 0


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda | None) -> None:
    """Puts a fake in the place of the driver and of NVML, or nothing; other libraries are loaded as ever."""
    real = ctypes.CDLL

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        if name not in (driver.DRIVER, machine.LIBRARY):
            return real(name, *arguments, **options)
        if fake is None:
            raise OSError(f"{name}: cannot open shared object file")
        return fake

    monkeypatch.setattr(ctypes, "CDLL", load)


def fake_runtime(cuda: FakeCuda, engines: dict[bytes, FakeEngine], *, rtx: bool = True) -> Any:
    """A module like `tensorrt_rtx`, whose engines are found by their bytes."""
    log: list[Any] = []  # the logger of the newest runtime

    class IProfiler:
        def __init__(self) -> None:
            pass

    class Context:
        def __init__(self, engine: FakeEngine, own_graph: bool, store: FakeRuntimeCache | None) -> None:
            self.engine, self.own_graph, self.addresses = engine, own_graph, dict[str, int]()
            self.store = store
            self.profiler: Any = None
            self.shapes, self.profile, self.running = dict[str, tuple[int, ...]](), 0, 0
            self.allocators: dict[str, Any] = {}

        def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
            self.profile = profile
            return profile < len(self.engine.profiles)

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = tuple(shape)
            if not self.engine.profiles:
                return tuple(shape) == self.engine.tensors[name][0]
            low, _, high = self.engine.profiles[self.profile][name]
            return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            known = {**self.shapes, **self.engine.sizes(self.shapes)}
            return known.get(name, self.engine.tensors[name][0])

        def get_max_output_size(self, name: str) -> int:
            return self.engine.most[name]

        def set_output_allocator(self, name: str, allocator: Any) -> bool:
            self.allocators[name] = allocator
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            assert set(self.addresses) == set(self.engine.tensors) and stream == 7
            self.running += 1
            assert self.running == 1, "two threads in one execution context"
            if said := self.engine.says(self.shapes):
                log[0].log(Logger.ERROR, said)
                self.running = 0
                return False
            if self.store is not None:
                self.store.compile(self.engine.kernels)
            for kernel in self.engine.kernels:
                if not self.own_graph:
                    cuda.tick("launch")
                cuda.work(kernel)
                if self.profiler is not None:
                    self.profiler.report_layer_time(kernel.name, kernel.us(0) / 1e3)
            if self.own_graph:
                cuda.tick("launch")
            self.compute()
            self.running = 0
            return True

        def compute(self) -> None:
            arrays = {}
            for name, (shape, kind, is_input) in self.engine.tensors.items():
                dtype = {"HALF": np.float16, "FLOAT": np.float32}[kind]
                shape = self.shapes.get(name, shape)
                if is_input:
                    held = cuda.memory[self.addresses[name]]
                    arrays[name] = held.view(dtype)[: int(np.prod(shape))].reshape(shape) if held.nbytes else held
            for name, array in self.engine.compute(arrays).items():
                if name in self.allocators:
                    own = self.allocators[name]
                    assert own.reallocate_output(name, self.addresses[name], array.nbytes, 256) == self.addresses[name]
                    own.notify_shape(name, array.shape)
                cuda.memory[self.addresses[name]] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)

    if rtx:
        Context.is_stream_capturable = lambda self, stream: self.engine.capturable  # type: ignore[attr-defined]

    class RtxSettings:
        def __init__(self) -> None:
            self.cuda_graph_strategy, self.store = "disabled", None

        def create_runtime_cache(self) -> FakeRuntimeCache:
            return FakeRuntimeCache()

        def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
            self.store = cache
            return True

    class Loaded:
        device_memory_size_v2, weight_streaming_budget_v2 = 1 << 20, 0

        def __init__(self, engine: FakeEngine) -> None:
            self.engine, self.names = engine, list(engine.tensors)
            self.num_io_tensors = len(self.names)
            self.num_optimization_profiles = max(len(engine.profiles), 1)

        def is_shape_inference_io(self, name: str) -> bool:
            return False

        def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
            return self.engine.profiles[profile][name]

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_mode(self, name: str) -> str:
            return "input" if self.engine.tensors[name][2] else "output"

        def get_tensor_dtype(self, name: str) -> Any:
            return SimpleNamespace(name=self.engine.tensors[name][1])

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.engine.tensors[name][0]

        def create_runtime_config(self) -> Any:
            return RtxSettings() if rtx else SimpleNamespace()

        def get_weight_streaming_automatic_budget(self) -> int:
            return 4096

        def create_execution_context(self, settings: Any = None) -> Context:
            own_graph = getattr(settings, "cuda_graph_strategy", "") == "whole"
            return Context(self.engine, own_graph, getattr(settings, "store", None))

    class Runtime:
        def __init__(self, logger: Any) -> None:
            log[:] = [logger]

        def deserialize_cuda_engine(self, data: bytes) -> Loaded | None:
            return Loaded(engines[data]) if data in engines else None

    class Logger:
        ERROR, INTERNAL_ERROR = 1, 0

        def __init__(self, level: int = 1) -> None:
            pass

        def log(self, severity: int, message: str) -> None:
            pass

    class IOutputAllocator:
        pass

    names: dict[str, Any] = {"IProfiler": IProfiler, "Runtime": Runtime, "Logger": Logger, "__version__": "1.7.1"}
    names |= {"ILogger": Logger, "IOutputAllocator": IOutputAllocator}
    names["TensorIOMode"] = SimpleNamespace(INPUT="input", OUTPUT="output")
    if rtx:
        names["CudaGraphStrategy"] = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    return SimpleNamespace(**names)
