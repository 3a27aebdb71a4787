"""Compilers in processes of their own: several models at once, and a model that crashes one compiler affects no other.

Job (an ONNX file, GPUs, shapes) -> a free worker -> Price, or the compiler's refusal
A worker is started when there is work for it, and ends with this process. It must not search, nor keep prices.
"""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from engines.backends.backend import DEFAULT, backend_named
from engines.backends.compiler import ShapeRange
from engines.backends.layers import SYNCHRONIZATION, LayerTable
from engines.core.errors import BuildError, EngineError, MissingRuntimeError, import_runtime
from engines.cost.gpus import Gpu
from engines.cost.predict import Cost, EngineWork, engine_work
from qdq.build.cost import Kernel, Price
from qdq.build.engine import compile_engine
from qdq.build.recipe import Recipe
from qdq.core.child import without_ctrl_c

_READY = b"ready"
_START = (
    "import sys; sys.path[:] = {path!r}; from qdq.core.child import as_child; as_child({parent}); "
    "from qdq.build.processes import serve; serve({answers}, {backend!r})"
)
TRIES = 2  # of a job whose worker died: it may have been killed for another's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An ONNX file to compile by a backend for each GPU, at fixed shapes."""

    path: Path
    gpus: tuple[Gpu, ...]
    shapes: Mapping[str, ShapeRange]
    backend: str = DEFAULT


def price_of(job: Job) -> Price:
    """Compile and price in this process; microseconds are the mean over the GPUs.

    Where FP16 products may accumulate in either type, the price under the other assumption is that of the same kernels.

    Raises:
        BuildError: the compiler's refusal.
    """
    engines: dict[str, tuple[EngineWork, tuple[str, ...]]] = {}
    for target in dict.fromkeys(gpu.target for gpu in job.gpus):
        recipe = Recipe().compiled_by(job.backend, (target,))
        table = compile_engine(job.path, recipe=recipe, shapes=job.shapes, locate=False).table
        engines[target] = engine_work(job.path, table, shapes=job.shapes), signatures(table)
    price, others = _priced(job.gpus, engines), [gpu.other_accumulation() for gpu in job.gpus]
    if not any(others):
        return price
    swapped = [other or gpu for gpu, other in zip(job.gpus, others, strict=True)]
    return replace(price, other=_priced(swapped, engines))


def _priced(gpus: Sequence[Gpu], engines: Mapping[str, tuple[EngineWork, tuple[str, ...]]]) -> Price:
    """The mean over GPUs; its errors are the largest of theirs, and not known if one is not.

    `engines` are target -> work and signatures of the kernels.
    """
    kernels: list[Kernel] = []
    costs: list[Cost] = []
    for gpu in gpus:
        work, texts = engines[gpu.target]
        costs.append(cost := work.on(gpu))
        for kernel, text in zip(cost.kernels, texts, strict=True):
            us = kernel.us / len(gpus)
            kernels.append(Kernel(us=us, macs=kernel.macs, bytes=kernel.bytes, nodes=kernel.onnx_nodes, signature=text))
    return Price(
        us=math.fsum(k.us for k in kernels),
        kernels=tuple(kernels),
        error=_largest(cost.error for cost in costs),
        ratio_error=_largest(cost.ratio_error for cost in costs),
    )


def _largest(errors: Iterable[float | None]) -> float | None:
    every = list(errors)
    known = [error for error in every if error is not None]
    return max(known) if known and len(known) == len(every) else None


def signatures(table: LayerTable) -> tuple[str, ...]:
    """What each kernel is, without the compiler's numbering: kind, types and shapes in and out, ONNX nodes."""
    found = []
    for layer in table.layers:
        if layer.kind in SYNCHRONIZATION:
            continue
        ends = (layer.inputs, layer.outputs)
        reads, writes = (" ".join(sorted(f"{t.dtype}{list(t.shape)}" for t in tensors)) for tensors in ends)
        found.append(f"{layer.kind} {reads} -> {writes} | {' '.join(sorted(layer.onnx_nodes))}")
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class _Worker:
    """A process, which takes jobs from its standard input, and the pipe that its answers come from."""

    process: subprocess.Popen[bytes]
    answers: BinaryIO

    def ask(self, job: Job) -> Price | BuildError:
        assert self.process.stdin
        pickle.dump(job, self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.answers)
        return answer if isinstance(answer, Price) else BuildError(answer[0], nodes=answer[1])

    def end(self) -> int:
        """Its exit code, once its input has ended."""
        self.process.communicate()
        self.answers.close()
        return self.process.returncode


class Workers:
    """A number of processes, each with the compiler of a backend; `close` ends them."""

    def __init__(self, count: int, backend: str = DEFAULT) -> None:
        """Start none yet."""
        self.count, self._backend = count, backend
        self._threads = ThreadPoolExecutor(count)
        self._free: SimpleQueue[_Worker | None] = SimpleQueue()
        self._running: set[_Worker] = set()
        self._stopped = False
        for _ in range(count):
            self._free.put(None)

    def __call__(self, jobs: Sequence[Job]) -> list[Price | BuildError]:
        """The price of each, or why it has none; of a worker that died, that."""
        return list(self._threads.map(self._one, jobs))

    def _one(self, job: Job) -> Price | BuildError:
        worker: _Worker | None = self._free.get()
        code = 0
        try:
            for _ in range(TRIES):
                if self._stopped:
                    break
                worker = worker or _started(self._backend)
                self._running.add(worker)
                try:
                    return worker.ask(job)
                except (EOFError, OSError, pickle.UnpicklingError):
                    self._running.discard(worker)
                    code, worker = worker.end(), None
            return BuildError(f"The compiler's process died with exit code {code} on this model.")
        finally:
            self._free.put(worker)

    def close(self, *, now: bool = False) -> None:
        """End the processes; what is being compiled is waited for, unless they are to end `now`."""
        self._stopped = now
        for worker in tuple(self._running) if now else ():
            worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self.count):
            if idle := self._free.get():
                idle.end()


def _started(backend: str) -> _Worker:
    """A worker that is ready. Not by `multiprocessing`, which would import the user's program again.

    Raises:
        MissingRuntimeError: it does not start.
    """
    source, answers = os.pipe()
    command = [sys.executable, "-c", _START.format(path=sys.path, parent=os.getpid(), answers=answers, backend=backend)]
    try:
        with without_ctrl_c():
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(answers,))
    except OSError as error:
        os.close(source)
        raise MissingRuntimeError(f"Cannot start a compiler's process ({sys.executable}): {error}.") from error
    finally:
        os.close(answers)
    worker = _Worker(process, os.fdopen(source, "rb"))
    if worker.answers.read(len(_READY)) != _READY:
        raise MissingRuntimeError(f"A compiler's process ended with exit code {worker.end()} before it was ready.")
    return worker


def serve(answers: int, backend: str) -> None:
    """What a worker does: jobs from standard input, prices to a pipe, until the input ends."""
    out = os.fdopen(answers, "wb")
    import_runtime(backend_named(backend).runtime)
    out.write(_READY)
    out.flush()
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Price | tuple[str, tuple[str, ...]] = price_of(job)
        except EngineError as error:
            answer = str(error), getattr(error, "nodes", ())
        pickle.dump(answer, out)
        out.flush()
