"""TensorRT 10.16 and 11.x on an NVIDIA GPU: compile for the GPU of this machine, and run engines.

model -> compiled (strongly typed, as `TensorRtOptions` say) -> inspector JSON -> `Engine` with its `LayerTable`.
engine -> `runner`, which also runs TensorRT-RTX's engines, and keeps what that compiles when an engine first runs.
Must not set precision flags or a calibrator: TensorRT 11 has none, and the Q/DQ nodes say it all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from engines.backends.backend import Backend, Running
from engines.backends.compiler import Engine, OnProgress, ShapeRange, compile_model
from engines.backends.doctor import gpus
from engines.backends.layers import LayerTable, table_from_inspector
from engines.backends.plugins import load_plugins
from engines.backends.tensorrt_options import TensorRtOptions
from engines.core.errors import BuildError, EngineError, MissingRuntimeError, import_runtime
from engines.core.files import write_atomic
from engines.core.load import load_graph


def _gpu_target() -> str:
    """The first GPU's name in the form 'sm90'."""
    if not (found := gpus()):
        raise MissingRuntimeError(
            "TensorRT needs an NVIDIA GPU and its driver, and none was found here. Build for TensorRT-RTX instead "
            "(--compiler rtx), which needs neither."
        )
    return found[0].target


def check_targets(model: onnx.ModelProto, targets: Sequence[str]) -> tuple[str, ...]:
    """Refuses an unknown target; () for the others, since the compiler asks the GPU of this machine.

    Raises:
        UnsupportedTargetError: names the nearest.
    """
    for target in targets:
        BACKEND.target(target)
    return ()


def build(
    model: Path | str | onnx.ModelProto,
    *,
    targets: Sequence[str] = (),
    shapes: Mapping[str, ShapeRange] | None = None,
    options: TensorRtOptions | None = None,
    directory: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Engine:
    """Compiles an engine for the GPU of this machine. Arguments and errors as of `backend.Build`.

    A timing cache is read if it exists, then written: the next build chooses the same kernels, faster. The layer table
    is that of the first optimization profile.
    """
    target = _gpu_target()
    check_targets(load_graph(model), targets)
    trt = import_runtime("tensorrt")
    asked = options or TensorRtOptions()
    asked.require(trt.__version__)
    load_plugins(trt, asked.libraries)
    file = Path(asked.timing_cache) if asked.timing_cache else None
    caches: list[tuple[Any, Any]] = []  # the configuration, and the cache that it needs alive

    def configure(config: Any) -> None:
        asked.configure(trt, config)
        if file is not None:
            caches.append((config, _timing_cache(config, file, ignore_mismatch=asked.ignore_mismatch)))

    compiled = compile_model(
        trt,
        model,
        shapes=shapes or {},
        profiles=asked.ranges,
        configure=configure,
        directory=directory,
        on_progress=on_progress,
    )
    for config, _ in caches:
        write_atomic(file or Path(), bytes(config.get_timing_cache().serialize()))
    return Engine(data=compiled.data, table=inspect(trt, compiled.data, target=target, backend="trt"))


def _timing_cache(config: Any, file: Path, *, ignore_mismatch: bool) -> Any:
    """The timing cache of a file, or a new one, attached to a configuration.

    Raises:
        EngineError: the file cannot be read, or is the cache of another device or version.
    """
    try:
        held = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise EngineError(f"Cannot read the timing cache {file}: {error.strerror}.") from error
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch):
        raise EngineError(
            f"TensorRT does not take the timing cache {file}: it is damaged, or of another GPU or version. Name a file "
            "that does not exist yet for a new one; ignore_mismatch: true takes times measured on another GPU."
        )
    return cache


def inspect(trt: Any, data: bytes, *, target: str, backend: str) -> LayerTable:
    """The layer table of a serialized engine, read through the inspector of `tensorrt` or `tensorrt_rtx` on its GPU.

    Raises:
        BuildError: the engine does not belong to this version or this GPU, or was built without DETAILED verbosity.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    runtime.engine_host_code_allowed = True  # a VERSION_COMPATIBLE engine, which was just built, holds a runtime
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BuildError(f"{backend} {trt.__version__} cannot load the engine on this GPU ({target}): build it here.")
    inspector = engine.create_engine_inspector()
    return table_from_inspector(
        inspector.get_engine_information(trt.LayerInformationFormat.JSON),
        backend=backend,
        version=trt.__version__,
        targets=(target,),
        engine_bytes=len(data),
        weight_bytes=int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)),
        activation_bytes=int(engine.device_memory_size_v2),
    )


class RuntimeCache:
    """What TensorRT-RTX compiles when an engine first runs, in a file: the next process need not compile it again.

    A file of another GPU, driver or version is replaced; `note` says so.
    """

    def __init__(self, file: Path) -> None:
        """For a file, which need not exist yet.

        Raises:
            EngineError: its folder is not writable, or it cannot be read.
        """
        self._file, self._cache, self.note = file, None, ""
        if not os.access(file.absolute().parent, os.W_OK):
            raise EngineError(f"Cannot write the runtime cache {file}: choose a folder that exists and is writable.")
        try:
            self._held = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise EngineError(f"Cannot read the runtime cache {file}: {error.strerror}.") from error

    def settings(self, engine: Any) -> Any:
        """An `IRuntimeConfig` of an engine, with this cache; all contexts of one process share it.

        Raises:
            EngineError: the engine's runtime has no such cache, as TensorRT's has none.
        """
        settings = engine.create_runtime_config()
        if not hasattr(settings, "create_runtime_cache"):
            raise EngineError(f"{BACKEND.no_runtime_cache}. Leave {self._file} out.")
        if self._cache is None:
            self._cache = kept = settings.create_runtime_cache()
            if self._held and not kept.deserialize(self._held):
                self.note = f"the runtime cache {self._file} is of another GPU, driver or version: it was made anew"
        settings.set_runtime_cache(self._cache)
        return settings

    def save(self) -> None:
        """Writes the file, if an engine ran."""
        kept = self._cache
        if kept is not None:
            write_atomic(self._file, bytes(kept.serialize()))


def runner(
    engine: Path | str | bytes, *, rtx: bool = False, name: str = "engine", running: Running | None = None
) -> Any:
    """A Polygraphy `TrtRunner` of a built engine, which takes the first optimization profile that fits its inputs.

    Args:
        engine: path or bytes.
        rtx: the engine is TensorRT-RTX's. One process runs one kind: Polygraphy reads the choice once, at import.
        name: shown in reports.
        running: what the engine needs beside it.

    Raises:
        EngineError: the file cannot be read, or this process has chosen the other kind; see `RuntimeCache`.
        MissingRuntimeError: no GPU, or a package is missing.
    """
    _gpu_target()
    running = running or Running()
    if rtx:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    if bool(import_runtime("polygraphy.config").USE_TENSORRT_RTX) != rtx:
        raise EngineError(
            "Polygraphy was imported for the other kind of engine, and a process can run only one. "
            f"Start again with POLYGRAPHY_USE_TENSORRT_RTX={int(rtx)}."
        )
    load_plugins(import_runtime("tensorrt_rtx" if rtx else "tensorrt"), running.plugins)
    backend = import_runtime("polygraphy.backend.trt")
    try:
        data = engine if isinstance(engine, bytes) else Path(engine).read_bytes()
    except OSError as error:
        raise EngineError(f"Cannot read engine {engine!s}: {error.strerror}.") from error
    store = RuntimeCache(running.runtime_cache) if running.runtime_cache and rtx else None
    load = backend.EngineFromBytes(data)
    opened = load if store is None else lambda: _context(load(), store)
    made = _runner_class(backend)(opened, name=name, weight_streaming_budget=running.weight_streaming_budget)
    made.runtime_cache = store
    return made


def _context(engine: Any, store: RuntimeCache) -> Any:
    """An execution context that compiles into a runtime cache."""
    return engine.create_execution_context(store.settings(engine))


def _runner_class(backend: Any) -> Any:
    class Runner(backend.TrtRunner):  # type: ignore[misc]
        runtime_cache: RuntimeCache | None = None
        _profile = 0

        def infer(self, feed_dict: Any, *args: Any, **kwargs: Any) -> Any:
            shapes = {name: tuple(array.shape) for name, array in feed_dict.items()}
            if (profile := fitting_profile(self.engine, shapes)) != self._profile:
                self.set_profile(profile)
                self._profile = profile
            return super().infer(feed_dict, *args, **kwargs)

        def deactivate(self) -> None:
            if self.runtime_cache is not None:
                self.runtime_cache.save()
            self._profile = 0
            super().deactivate()

    return Runner


def fitting_profile(engine: Any, shapes: Mapping[str, Sequence[int]]) -> int:
    """The first optimization profile of an engine that takes inputs of these shapes; 0 where there is but one.

    Raises:
        EngineError: none of several does.
    """
    count = int(engine.num_optimization_profiles)
    sized = {name: shape for name, shape in shapes.items() if not engine.is_shape_inference_io(name)}
    for profile in range(count if count > 1 else 0):
        ranges = {name: tuple(map(tuple, engine.get_tensor_profile_shape(name, profile))) for name in sized}
        if all(ShapeRange(min=r[0], opt=r[1], max=r[2]).takes(sized[name]) for name, r in ranges.items()):
            return profile
    if count > 1:
        given = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise EngineError(f"None of the engine's {count} optimization profiles takes {given}: build one that does.")
    return 0


BACKEND = Backend(
    name="trt",
    compiler="tensorrt",
    title="TensorRT",
    runtime="tensorrt",
    packages=("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    # NVIDIA's table of compute capabilities, from 7.5 on; which of them a version of TensorRT takes, its builder says.
    targets=("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"),
    needs_gpu=True,
    predicts=False,
    check_targets=check_targets,
    build=build,
    runner=runner,
    no_runtime_cache="`runtime_cache` is for engines of TensorRT-RTX, which compiles when an engine first runs; "
    "TensorRT compiles nothing then",
)
