"""A compiled engine on the GPU of this machine: its buffers, its launch, its graph, its kernels one by one.

Engine -> runtime of its backend -> execution context, memory for every tensor -> `launch`, `graph`, `outputs`.
Must not time anything itself but through the runtime's profiler. Needs the driver and the runtime, not CUDA's toolkit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engines.backends.backend import Running, backend_named
from engines.backends.compiler import Engine
from engines.backends.plugins import load_plugins
from engines.backends.trt import RuntimeCache
from engines.core.errors import import_runtime
from engines.timing.driver import Driver
from engines.timing.timer import Arrays, KernelTime, TimingError

# Names of `DataType` -> numpy; FP4 and INT4 cannot be inputs or outputs.
DTYPES: Mapping[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffer:
    """Memory of one tensor; `dtype` and `shape` as numpy has them."""

    address: int
    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    is_input: bool


def random_array(shape: Sequence[int], dtype: npt.DTypeLike, seed: int = 0) -> npt.NDArray[np.generic]:
    """Values for an input: normal floats, codes over the whole range of INT8, indices 0 and 1, True.

    The first 2^20 values come again and again in a larger one.
    """
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    size = min(int(np.prod(shape)), 1 << 20)
    if kind == np.int8:
        values: npt.NDArray[np.generic] = rng.integers(-127, 128, size=size, dtype=np.int8)
    elif kind.kind in "iub":
        values = rng.integers(1 if kind.kind == "b" else 0, 2, size=size).astype(kind)
    else:
        values = rng.standard_normal(size=size, dtype=np.float32).astype(kind)
    return np.resize(values, tuple(shape))


class LoadedEngine(AbstractContextManager["LoadedEngine"]):
    """An engine with memory and data for its inputs; a context manager. Its first launch compiles what JIT leaves."""

    def __init__(
        self,
        driver: Driver,
        made: Engine,
        inputs: Arrays | None = None,
        *,
        running: Running | None = None,
        cache: RuntimeCache | None = None,
    ) -> None:
        """Loads it; inputs that are not given are random.

        Args:
            driver: with the GPU and the stream.
            made: the engine.
            inputs: name -> array.
            running: what the engine needs beside it; `cache` is opened from its file by who runs several engines.
            cache: what TensorRT-RTX compiles goes there; it must outlive this.

        Raises:
            MissingRuntimeError: the backend's runtime is not installed.
            TimingError: the runtime refuses the engine, or a tensor of it cannot be made.
            EngineError: what the engine needs beside it (`running`) is refused.
        """
        self._driver, self._held = driver, ExitStack()
        running = running or Running()
        trt = import_runtime(backend_named(made.table.backend).runtime)
        load_plugins(trt, running.plugins)
        self._cache = cache
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        runtime.engine_host_code_allowed = True  # a VERSION_COMPATIBLE engine of ours holds a runtime
        self._engine = engine = runtime.deserialize_cuda_engine(made.data)
        if engine is None:
            targets = ", ".join(made.table.targets)
            what = f"{made.table.backend} {trt.__version__} does not load the engine for {targets} on this GPU"
            raise TimingError(f"{what}: compile it for this GPU, with this version.")
        self._runtime, self._trt = runtime, trt
        if (budget := running.weight_streaming_budget) is not None:
            automatic = budget < 0
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget() if automatic else budget
        settings = () if self._cache is None else (self._cache.settings(engine),)
        self._context = engine.create_execution_context(*settings)
        if self._context is None:
            raise TimingError("The runtime makes no execution context for the engine: too little memory on the GPU?")
        try:
            self._buffers = self._allocated(inputs or {})
        except BaseException:
            self._held.close()
            raise
        self.runtime_graph = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the context back, then what it used."""
        self._context = self._engine = self._runtime = None
        self._held.close()

    def launch(self) -> bool:
        """Puts one inference into the stream; False where the runtime refuses."""
        context = self._context
        return bool(context.execute_async_v3(self._driver.stream))

    def run(self) -> None:
        """One inference, until it is done.

        Raises:
            TimingError: the runtime or the GPU refuses.
        """
        if not self.launch():
            raise TimingError("The runtime refuses to run the engine; its log on standard error says why.")
        self._driver.synchronize()

    def graph(self, repeats: int) -> int | None:
        """An executable graph of that many inferences; None where the engine cannot be captured from outside.

        TensorRT-RTX captures an engine only if it was built for the user's memory (REQUIRE_USER_ALLOCATION); of others
        it makes graphs itself, which `launch` replays from then on: `runtime_graph`.
        """
        context = self._context
        if not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(self._driver.stream):
            captured = self._driver.capture(lambda: all(self.launch() for _ in range(repeats)))
            if captured is not None:
                self._held.callback(self._driver.destroy_graph, captured)
                return captured
        if hasattr(self._trt, "CudaGraphStrategy"):
            self._let_runtime_capture()
        return None

    def _let_runtime_capture(self) -> None:
        """Goes on with an execution context that captures its inferences."""
        engine, trt = self._engine, self._trt
        settings = self._cache.settings(engine) if self._cache else engine.create_runtime_config()
        settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        made = engine.create_execution_context(settings)
        if made is None:
            return
        self._context, self.runtime_graph = made, True
        self._bind()
        for _ in range(3):  # compile, capture, replay
            self.run()

    def outputs(self) -> dict[str, npt.NDArray[np.generic]]:
        """What one inference gives.

        Raises:
            TimingError: as `run`, or an output whose size only the run decides.
        """
        self.run()
        found = {}
        for name, buffer in self._buffers.items():
            if not buffer.is_input:
                if min(buffer.shape, default=0) < 0:
                    raise TimingError(f"The size of output {name} is decided by data: it cannot be read here.")
                found[name] = np.empty(buffer.shape, buffer.dtype)
                self._driver.download(buffer.address, found[name])
        return found

    def kernel_times(self, runs: int) -> list[KernelTime]:
        """The median time of each kernel over some inferences, in the order in which they run.

        Kernels are launched one by one, with events of the runtime around each: their sum is more than an inference.
        """
        self._profiler = profiler = _profiler(self._trt)  # the context does not keep it alive
        context = self._context
        context.profiler = profiler
        found = []
        for _ in range(runs):
            profiler.seen = []
            self.run()
            found.append(profiler.seen)
        names = [name for name, _ in found[-1]]
        alike = [seen for seen in found if [name for name, _ in seen] == names]
        table = np.array([[ms for _, ms in seen] for seen in alike]).reshape(len(alike), len(names))
        return [KernelTime(name=n, us=float(us)) for n, us in zip(names, np.median(table, axis=0) * 1e3, strict=True)]

    def activation_bytes(self) -> int:
        """Device memory of the execution context."""
        engine = self._engine
        return int(engine.device_memory_size_v2)

    def _allocated(self, inputs: Arrays) -> dict[str, _Buffer]:
        """Memory for every tensor, bound to the context; inputs first, since the shapes of outputs follow them."""
        engine, trt, context = self._engine, self._trt, self._context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        known = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        if unknown := sorted(set(inputs) - known):
            raise TimingError(f"The engine has no input {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        found: dict[str, _Buffer] = {}
        for name in sorted(names, key=lambda n: n not in known):
            kind = engine.get_tensor_dtype(name).name
            if kind not in DTYPES:
                raise TimingError(f"Tensor {name} of the engine is {kind}, which has no data here.")
            if name in known:
                found[name] = self._filled(name, DTYPES[kind], inputs.get(name))
                continue
            shape = tuple(context.get_tensor_shape(name))
            size = int(np.prod(shape)) * np.dtype(DTYPES[kind]).itemsize
            size = size if min(shape, default=0) >= 0 else int(context.get_max_output_size(name))
            found[name] = _Buffer(address=self._memory(size), shape=shape, dtype=DTYPES[kind], is_input=False)
        self._buffers = found
        self._bind()
        return found

    def _filled(self, name: str, dtype: npt.DTypeLike, given: npt.NDArray[np.generic] | None) -> _Buffer:
        """An input with its data on the GPU."""
        engine, context = self._engine, self._context
        shape = tuple(engine.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            shape = tuple(given.shape if given is not None else engine.get_tensor_profile_shape(name, 0)[1])
        array = random_array(shape, dtype) if given is None else given
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise TimingError(f"Input {name} is {array.dtype} {array.shape}; the engine has {np.dtype(dtype)} {shape}.")
        if not context.set_input_shape(name, shape):
            raise TimingError(f"The engine refuses the shape {shape} of input {name}: it was built for other shapes.")
        address = self._memory(array.nbytes)
        self._driver.upload(address, array)
        return _Buffer(address=address, shape=shape, dtype=dtype, is_input=True)

    def _memory(self, nbytes: int) -> int:
        address = self._driver.allocate(nbytes)
        self._held.callback(self._driver.free, address)
        return address

    def _bind(self) -> None:
        context = self._context
        for name, buffer in self._buffers.items():
            if buffer.is_input:
                context.set_input_shape(name, buffer.shape)
            context.set_tensor_address(name, buffer.address)


def _profiler(trt: Any) -> Any:
    """A profiler that keeps (name of the kernel, milliseconds) of one inference in `seen`."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.seen: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.seen.append((layer_name, ms))

    return Profiler()
