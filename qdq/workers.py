"""Compilers in processes of their own: several models at once, and one that brings its compiler down harms no other.

Job (an ONNX file, GPUs, shapes) -> a free worker -> Price, or the compiler's refusal
A worker is started when there is work for it, and ends with this process. It must not search, nor keep prices.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from engines.compiler import ShapeRange
from engines.cost import Gpu, predict
from engines.errors import BuildError, MissingRuntimeError, import_runtime
from engines.layers import SYNCHRONIZATION, LayerTable
from qdq.build import compile_engine
from qdq.price import Kernel, Price
from qdq.recipe import Recipe

_READY = b"ready"
_START = "import sys; sys.path[:] = {path!r}; from qdq.workers import serve; serve()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An ONNX file to compile for each GPU, at fixed shapes."""

    path: Path
    gpus: tuple[Gpu, ...]
    shapes: Mapping[str, ShapeRange]


def price_of(job: Job) -> Price:
    """Compile and price in this process; microseconds are the mean over the GPUs.

    Raises:
        BuildError: the compiler's refusal.
    """
    kernels: list[Kernel] = []
    for gpu in job.gpus:
        table = compile_engine(job.path, recipe=Recipe(targets=(gpu.target,)), shapes=job.shapes).table
        cost = predict(job.path, table, gpu, shapes=job.shapes)
        for kernel, text in zip(cost.kernels, signatures(table), strict=True):
            us = kernel.us / len(job.gpus)
            kernels.append(Kernel(us=us, macs=kernel.macs, bytes=kernel.bytes, nodes=kernel.onnx_nodes, signature=text))
    return Price(us=math.fsum(k.us for k in kernels), kernels=tuple(kernels))


def signatures(table: LayerTable) -> tuple[str, ...]:
    """What each kernel is, without the compiler's numbering: kind, types and shapes in and out, ONNX nodes."""
    found = []
    for layer in table.layers:
        if layer.kind in SYNCHRONIZATION:
            continue
        reads, writes = (
            " ".join(sorted(f"{t.dtype}{list(t.shape)}" for t in tensors)) for tensors in (layer.inputs, layer.outputs)
        )
        found.append(f"{layer.kind} {reads} -> {writes} | {' '.join(sorted(layer.onnx_nodes))}")
    return tuple(found)


class Workers:
    """A number of processes, each with a compiler; `close` ends them."""

    def __init__(self, count: int) -> None:
        """Start none yet."""
        self.count = count
        self._threads = ThreadPoolExecutor(count)
        self._free: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def __call__(self, jobs: Sequence[Job]) -> list[Price | BuildError]:
        """The price of each, or why it has none; of a worker that died, that."""
        return list(self._threads.map(self._one, jobs))

    def _one(self, job: Job) -> Price | BuildError:
        process = self._free.get()
        try:
            process = process or _started()
            assert process.stdin and process.stdout
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            assert process
            process.communicate()
            code, process = process.returncode, None
            return BuildError(f"The compiler's process died with exit code {code} on this model.")
        finally:
            self._free.put(process)
        return answer if isinstance(answer, Price) else BuildError(answer[0], nodes=answer[1])

    def close(self) -> None:
        """End the processes; what is being compiled is waited for."""
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self.count):
            if process := self._free.get():
                process.communicate()  # the end of its input ends it


def _started() -> subprocess.Popen[bytes]:
    """A worker that is ready. Not by `multiprocessing`, which would import the user's program again.

    Raises:
        MissingRuntimeError: it does not start.
    """
    command = [sys.executable, "-c", _START.format(path=sys.path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    if process.stdout.read(len(_READY)) != _READY:
        process.communicate()
        raise MissingRuntimeError(
            f"A compiler's process ended with exit code {process.returncode} before it was ready."
        )
    return process


def serve() -> None:
    """What a worker does: jobs in, prices out, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes nowhere near the answers
    import_runtime("tensorrt_rtx")
    out.write(_READY)
    out.flush()
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Price | tuple[str, tuple[str, ...]] = price_of(job)
        except BuildError as error:
            answer = str(error), error.nodes
        pickle.dump(answer, out)
        out.flush()
