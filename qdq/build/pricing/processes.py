"""Compilers in processes of their own: several models at once, and a model that crashes one compiler affects no other.

Job (an ONNX file, targets, shapes) -> a free worker -> the work of each target's kernels, or the compiler's refusal
A worker is started when there is work for it, and ends with this process. It must not search, price nor remember.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from engines.backends.backend import DEFAULT, backend_named
from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError, EngineError, MissingRuntimeError, import_runtime
from engines.cost.predict import EngineWork, engine_work
from qdq.build.engine import compile_engine
from qdq.build.recipe import Recipe
from qdq.core.child import without_ctrl_c

_READY = b"ready"
_START = (
    "import sys; sys.path[:] = {path!r}; from qdq.core.child import as_child; as_child({parent}); "
    "from qdq.build.pricing.processes import serve; serve({answers}, {backend!r})"
)
TRIES = 2  # of a job whose worker died: it may have been killed for another's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An ONNX file to compile by a backend for each target, at fixed shapes."""

    path: Path
    targets: tuple[str, ...]
    shapes: Mapping[str, ShapeRange]
    backend: str = DEFAULT


Works = dict[str, EngineWork]
"""Target -> the work of the kernels of its engine."""


def works_of(job: Job) -> Works:
    """Compile in this process.

    Raises:
        BuildError: the compiler's refusal.
    """
    found = {}
    for target in job.targets:
        recipe = Recipe().compiled_by(job.backend, (target,))
        table = compile_engine(job.path, recipe=recipe, shapes=job.shapes, locate=False).table
        found[target] = engine_work(job.path, table, shapes=job.shapes)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Worker:
    """A process, which takes jobs from its standard input, and the pipe that its answers come from."""

    process: subprocess.Popen[bytes]
    answers: BinaryIO

    def ask(self, job: Job) -> Works | BuildError:
        assert self.process.stdin
        pickle.dump(job, self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.answers)
        return answer if isinstance(answer, dict) else BuildError(answer[0], nodes=answer[1])

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

    def __call__(self, jobs: Sequence[Job]) -> list[Works | BuildError]:
        """The work of each, or why there is none; of a worker that died, that."""
        return list(self._threads.map(self._one, jobs))

    def begin(self, job: Job) -> Future[Works | BuildError]:
        """One job, in its turn; its file must stay until it is done."""
        return self._threads.submit(self._one, job)

    def _one(self, job: Job) -> Works | BuildError:
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
    """What a worker does: jobs from standard input, answers to a pipe, until the input ends."""
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
            answer: Works | tuple[str, tuple[str, ...]] = works_of(job)
        except EngineError as error:
            answer = str(error), getattr(error, "nodes", ())
        pickle.dump(answer, out)
        out.flush()
