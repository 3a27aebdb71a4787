"""Runs an engine on this machine's NVIDIA GPU, compares it with ONNX Runtime and prints one page.

    python tools/gpu_check.py model.int8.onnx                       build for this GPU, run, compare
    python tools/gpu_check.py model.engine --reference model.onnx   load, run, compare
    options: --backend rtx|trt  --data sample.npz  --shape input:1,3,224,224  --runs 200

Model or engine -> Polygraphy's TrtRunner -> `engines.compare` against ONNX Runtime -> latency (CUDA graph if possible).
Exit codes: 0 done, 1 outputs differ, 2 bad input, 3 no GPU or a missing runtime. Without --data the input is random.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines.backends import doctor
from engines.backends.backend import DEFAULT, backend_named, backends
from engines.backends.compiler import Engine, ShapeRange
from engines.core import onnx_runtime as ort
from engines.core.errors import EngineError, MissingRuntimeError
from engines.verify.compare import compare
from engines.verify.report import Limits

WARM_UP = 20


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an ONNX file, or a built engine")
    parser.add_argument("--reference", type=Path, help="ONNX file to compare with (default: the model itself)")
    parser.add_argument("--backend", choices=tuple(backends()), default=DEFAULT)
    parser.add_argument("--data", type=Path, help=".npz with one array per input")
    parser.add_argument("--shape", action="append", default=[], help="input:1,3,224,224 for a dynamic input")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--min-sqnr-db", type=float, default=20.0)
    return parser.parse_args(argv)


def sample_for(session: Any, shapes: dict[str, tuple[int, ...]], data: Path | None) -> dict[str, np.ndarray]:
    """One sample: from a file, or random values in the type and shape of each input."""
    if data is not None:
        with np.load(data, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    rng = np.random.default_rng(0)
    sample = {}
    for info in session.get_inputs():
        shape = shapes.get(info.name) or tuple(d if isinstance(d, int) else 1 for d in info.shape)
        kind = info.type.removeprefix("tensor(").removesuffix(")")
        dtype = np.dtype({"float": "float32", "double": "float64", "float16": "float16"}.get(kind, kind))
        values = rng.normal(size=shape) if dtype.kind == "f" else rng.integers(0, 2, size=shape)
        sample[info.name] = values.astype(dtype)
    return sample


def engine_for(model: Path, backend: str, target: str, shapes: dict[str, ShapeRange]) -> Engine | None:
    """The engine built from an ONNX file, or None for a file that is an engine already."""
    if model.suffix != ".onnx":
        return None
    build = backend_named(backend).build
    return build(model, targets=(target,), shapes=shapes, timing_cache=None, on_progress=None)


def median_ms(launch: Callable[[], Any], synchronize: Callable[[], Any], runs: int) -> float:
    """Median wall time of one launch and its synchronization."""
    times = []
    for i in range(WARM_UP + runs):
        start = time.perf_counter()
        launch()
        synchronize()
        if i >= WARM_UP:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def graph_launcher(launch: Callable[[], Any], stream: int) -> Callable[[], Any] | None:
    """A function that replays one inference as a CUDA graph, or None where it cannot be captured.

    Source: CUDA driver API, cuStreamBeginCapture_v2 (mode 1: thread local), cuGraphInstantiateWithFlags, cuGraphLaunch.
    """
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    handle, graph, executable = ctypes.c_void_p(stream), ctypes.c_void_p(), ctypes.c_void_p()
    if cuda.cuStreamBeginCapture_v2(handle, 1) != 0:
        return None
    launched = launch()
    if cuda.cuStreamEndCapture(handle, ctypes.byref(graph)) != 0 or not launched:
        return None
    if cuda.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)) != 0:
        return None
    return lambda: cuda.cuGraphLaunch(executable, handle)


def latency(runner: Any, sample: dict[str, np.ndarray], runs: int) -> list[str]:
    """Lines about time and memory of one engine; data stays on the GPU between the runs."""
    with runner:
        runner.infer(sample)  # allocates the buffers and sets their addresses
        context, engine, stream = runner.context, runner.engine, runner.stream

        def launch() -> Any:
            return context.execute_async_v3(stream.ptr)

        lines = [
            f"latency      {median_ms(launch, stream.synchronize, runs):.3f} ms (median of {runs}, without copies)"
        ]
        replay = graph_launcher(launch, stream.ptr)
        if replay:
            lines.append(f"CUDA graph   {median_ms(replay, stream.synchronize, runs):.3f} ms")
        else:
            lines.append("CUDA graph   this engine cannot be captured")
        lines.append(f"activations  {engine.device_memory_size_v2 / 2**20:.1f} MiB on the GPU")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Does the check; returns the exit code."""
    options = arguments(argv)
    try:
        cards = doctor.gpus()
        if not cards:
            raise MissingRuntimeError("No NVIDIA GPU or driver found here: run this on a machine with one.")
        reference = options.reference or options.model
        if reference.suffix != ".onnx":
            raise EngineError(f"{options.model} is an engine: name the ONNX file to compare with (--reference).")
        shapes = {n: tuple(int(d) for d in s.split(",")) for n, _, s in (x.rpartition(":") for x in options.shape)}
        session = ort.session(reference)
        sample = sample_for(session, shapes, options.data)
        ranges = {info.name: ShapeRange.fixed(sample[info.name].shape) for info in session.get_inputs()}
        engine = engine_for(options.model, options.backend, cards[0].target, ranges)
        data = engine.data if engine else options.model.read_bytes()
        runner = backend_named(options.backend).runner(data)
        limits = Limits(min_sqnr_db=options.min_sqnr_db)
        names = ("onnxruntime", options.backend)
        report = compare(session, runner, [sample], limits=limits, model=reference, names=names)
        print(f"GPU          {cards[0].name} ({cards[0].target}, {cards[0].memory_bytes / 2**30:.0f} GiB)")
        print(f"engine       {options.model.name}, {options.backend}, {len(data) / 2**20:.1f} MiB")
        if engine:
            print(f"kernels      {engine.table.kernels}, weights {engine.table.weight_bytes / 2**20:.1f} MiB")
        print(
            "input        "
            + (options.data.name if options.data else "random values: says nothing about accuracy on data")
        )
        print("\n".join(latency(runner, sample, options.runs)))
        for output in report.outputs:
            said = "identical" if output.identical else "not identical"
            if output.sqnr_db is not None and not output.identical:
                said = (
                    f"SQNR {output.sqnr_db:.1f} dB, cosine {output.cosine:.6f}, "
                    f"largest error {output.max_abs_error:.3g}"
                )
            print(f"output       {output.name}: {said}")
        print("outcome      " + ("passed" if report.passed else "FAILED: " + " ".join(report.failures)))
        return 0 if report.passed else 1
    except EngineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"Cannot read {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
