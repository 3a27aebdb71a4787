"""TensorRT 10.16 and 11.x on an NVIDIA GPU: compile for the GPU of this machine, and run engines.

model -> compiled (strongly typed, timing cache) -> inspector JSON -> `Engine` with its `LayerTable`; `runner` runs it.
Must not set precision flags or a calibrator: TensorRT 11 has none, and the Q/DQ nodes say it all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from engines.backends.backend import Backend
from engines.backends.compiler import Engine, OnProgress, ShapeRange, compile_model
from engines.backends.doctor import gpus
from engines.backends.layers import LayerTable, table_from_inspector
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
    timing_cache: Path | None = None,
    directory: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Engine:
    """Compiles an engine for the GPU of this machine. Arguments and errors as of `backend.Build`.

    The timing cache is read if it exists, then written: the next build chooses the same kernels, faster.
    """
    target = _gpu_target()
    check_targets(load_graph(model), targets)
    trt = import_runtime("tensorrt")
    caches: list[tuple[Any, Any]] = []  # the configuration, and the cache that it needs alive

    def configure(config: Any) -> None:
        if timing_cache is not None:
            cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b"")
            config.set_timing_cache(cache, False)
            caches.append((config, cache))

    compiled = compile_model(
        trt, model, shapes=shapes or {}, configure=configure, directory=directory, on_progress=on_progress
    )
    for config, _ in caches:
        write_atomic(timing_cache or Path(), bytes(config.get_timing_cache().serialize()))
    return Engine(data=compiled.data, table=inspect(trt, compiled.data, target=target, backend="trt"))


def inspect(trt: Any, data: bytes, *, target: str, backend: str) -> LayerTable:
    """The layer table of a serialized engine, read through the inspector of `tensorrt` or `tensorrt_rtx` on its GPU.

    Raises:
        BuildError: the engine does not belong to this version or this GPU, or was built without DETAILED verbosity.
    """
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
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


def runner(engine: Path | str | bytes, *, rtx: bool = False, name: str = "engine") -> Any:
    """A Polygraphy `TrtRunner` of a built engine.

    Args:
        engine: path or bytes.
        rtx: the engine is TensorRT-RTX's. One process runs one kind: Polygraphy reads the choice once, at import.
        name: shown in reports.

    Raises:
        EngineError: the file cannot be read, or this process has chosen the other kind.
        MissingRuntimeError: no GPU, or a package is missing.
    """
    _gpu_target()
    if rtx:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    if bool(import_runtime("polygraphy.config").USE_TENSORRT_RTX) != rtx:
        raise EngineError(
            "Polygraphy was imported for the other kind of engine, and a process can run only one. "
            f"Start again with POLYGRAPHY_USE_TENSORRT_RTX={int(rtx)}."
        )
    import_runtime("tensorrt_rtx" if rtx else "tensorrt")
    backend = import_runtime("polygraphy.backend.trt")
    try:
        data = engine if isinstance(engine, bytes) else Path(engine).read_bytes()
    except OSError as error:
        raise EngineError(f"Cannot read engine {engine!s}: {error.strerror}.") from error
    return backend.TrtRunner(backend.EngineFromBytes(data), name=name)


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
)
