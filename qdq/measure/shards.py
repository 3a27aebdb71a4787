"""Calibrate on many processes or machines: every shard of the samples gives a table, and tables merge exactly.

model file + plan + source of samples -> shards -> any `concurrent.futures.Executor` -> merged table, as on one process.
A shard whose worker died is tried again, on a new pool where the pool broke. This module must not know how samples are
stored; Dask is imported only to connect to a cluster.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qdq.core.child import as_child, without_ctrl_c
from qdq.core.errors import InputError, MissingRuntimeError, StaleFileError
from qdq.core.progress import Progress
from qdq.core.resources import cores
from qdq.measure.checkpoint import Checkpoint
from qdq.measure.collect import check_same, collect
from qdq.measure.inference.samples import Sample
from qdq.measure.table import CalibrationTable, merged
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import prepare
from qdq.plan.plan import Plan

PER_WORKER = 4  # shards per worker: the more, the less a dead worker or a kill of the whole run costs
CONNECT_S = 10.0  # to wait for a Dask scheduler
TRIES = 4  # rounds in which workers died and nothing was done, before giving up

R = TypeVar("R")


class Sharded(Protocol):
    """Samples that can be split, as `calib_data.Samples`."""

    def shard(self, i: int, n: int) -> Iterable[Sample]:
        """Every n-th sample from the i-th on; the n shards together are all samples, each once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Where the shards run.

    Attributes:
        open: opens an executor; called again where the last one broke.
        workers: how many shards run at a time.
        threads: samples at a time in each.
        lost: what the executor raises for a worker that died, besides BrokenExecutor.
    """

    open: Callable[[], AbstractContextManager[Executor]]
    workers: int
    threads: int
    lost: tuple[type[BaseException], ...] = ()


def local_pool(workers: int) -> Pool:
    """Processes of this machine, which share its cores.

    Raises:
        InputError: not at least one.
    """
    if workers < 1:
        raise InputError(f"--workers is {workers}: it must be at least 1.")

    @contextmanager
    def start() -> Iterator[Executor]:
        context = get_context("spawn")  # fork would copy ONNX Runtime's locks
        others = set(active_children())
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=as_child, initargs=(os.getpid(),)
        ) as executor:
            try:
                with without_ctrl_c():
                    for _ in range(workers):  # a process each
                        executor.submit(os.getpid)
                yield executor
            except BaseException:
                # A shard may take minutes. No future is cancelled: the executor's thread fails on one that is, and then
                # nobody empties the pipe in which the jobs wait for the workers.
                for child in set(active_children()) - others:
                    child.kill()
                raise

    return Pool(open=start, workers=workers, threads=max(1, cores() // workers))


def dask_pool(address: str) -> Pool:
    """The workers of a Dask cluster; they need qdq, and the samples under the same paths.

    Args:
        address: of the scheduler, such as tcp://host:8786.

    Raises:
        MissingRuntimeError: Dask is not installed.
        InputError: no scheduler answers there, or it has no workers.
    """
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        raise MissingRuntimeError(
            "--cluster needs Dask, which is not installed. Install it with: pip install 'qdq[distributed]'"
        ) from None

    @contextmanager
    def connect() -> Iterator[Executor]:
        client = distributed.Client(address, set_as_default=False)
        with client, client.get_executor(pure=False) as executor:
            try:
                yield executor
            except BaseException:
                executor.shutdown(wait=False)  # cancels; else the end waits for every shard
                raise

    async def greet() -> None:  # a Client that nobody answers waits 20 s more when it is freed, and prints a traceback
        comm = await distributed.comm.connect(address, timeout=CONNECT_S)
        await comm.close()

    try:
        asyncio.run(greet())
        with distributed.Client(address, timeout=CONNECT_S, set_as_default=False) as client:
            workers = sum(client.nthreads().values())
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"No Dask scheduler answers at {address}: {' '.join(str(error).split())[:200].rstrip('.')}. Start one with "
            "`dask scheduler`, and give its address as tcp://HOST:8786."
        ) from None
    if not workers:
        raise InputError(f"The Dask cluster at {address} has no workers. Start some with `dask worker {address}`.")
    return Pool(open=connect, workers=workers, threads=1, lost=(distributed.scheduler.KilledWorker,))


def collect_shards(
    model_path: Path | str,
    plan: Plan,
    source: Callable[[], Sharded],
    pool: Pool,
    *,
    total: int | None,
    provider: str = "cpu",
    custom_ops: Sequence[str] = (),
    memory: int | None = None,
    checkpoint: Checkpoint | None = None,
    on_progress: Progress | None = None,
) -> CalibrationTable:
    """The table of `collect`, from many workers; `provider` and `custom_ops` are as there.

    Args:
        model_path: the float model's file; each worker reads and prepares it.
        plan: made for it.
        source: opens the samples anew in each worker; must be picklable (a function of a module, `functools.partial`).
        pool: where.
        total: how many samples there are; None where only reading them tells.
        memory: bytes for activations of each worker.
        checkpoint: receives every shard that is done.

    Returns:
        The same table, bit by bit.

    Raises:
        InputError: as `collect`, or shards whose workers died TRIES times in a row.
        StaleFileError: as `collect`, or a checkpoint of a calibration without workers.
    """
    parts = checkpoint.load() if checkpoint else ()
    state = checkpoint.state if checkpoint else {}
    if parts and "shards" not in state:
        raise StaleFileError(
            "The unfinished calibration here was begun without workers: repeat that command, or delete its checkpoint."
        )
    model = plan.form(prepared(Path(model_path))) if parts else None
    given = check_same(parts, model, source().shard(0, 1)) if model is not None else ""
    count = int(state.get("shards", min(total or pool.workers * PER_WORKER, pool.workers * PER_WORKER)))
    done = set(state.get("done", ()))
    table = parts[0] if parts else None
    job = _Job(
        model_path=Path(model_path).absolute(),
        plan=plan,
        source=source,
        provider=provider,
        custom_ops=tuple(custom_ops),
        memory=memory,
        threads=pool.threads,
    )
    left = [i for i in range(count) if i not in done]
    for index, shard in each_of(pool, partial(_measure, job, count), left, what="shards of samples"):
        table = merged([table, shard]) if table and shard.count else table or shard
        done.add(index)
        if checkpoint is not None:
            checkpoint.write([table], {"shards": count, "done": sorted(done)})
        if on_progress is not None:
            on_progress(len(done), count, "calibrating, shards")
    assert table is not None
    if not table.count:
        raise InputError("There are no samples: calibration needs at least one.")
    if given not in ("", table.samples_sha256):
        raise StaleFileError(
            "The samples changed their order while the calibration was interrupted, so that some were counted twice. "
            "Delete its checkpoint and begin anew."
        )
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What every worker is told."""

    model_path: Path
    plan: Plan
    source: Callable[[], Sharded]
    provider: str
    custom_ops: tuple[str, ...]
    memory: int | None
    threads: int


def each_of(
    pool: Pool,
    work: Callable[[Any], R],
    indices: Iterable[int],
    *,
    what: str,
    told: Callable[[int], object] = int,
    ahead: int | None = None,
) -> Iterator[tuple[int, R]]:
    """Some jobs by their index, each with its result as it comes; one whose worker died is tried again.

    Args:
        pool: where.
        work: does a job; picklable.
        indices: of the jobs.
        what: they are, for the message.
        told: what `work` is called with; made here when the job is handed out.
        ahead: jobs that are handed out at a time; None for all.

    Raises:
        InputError: the workers died TRIES times in a row without finishing any job.
    """
    left, barren = dict.fromkeys(indices), 0
    while left:
        barren += 1
        for index, result in _round(pool, work, list(left), told, ahead or len(left)):
            del left[index]
            barren = 0
            yield index, result
        if barren == TRIES:
            raise InputError(
                f"The workers of {len(left)} {what} died {TRIES} times in a row. Look at the workers' logs: "
                "mostly the memory of their machine is too small; lower --memory or use fewer workers."
            )


def _round(
    pool: Pool, work: Callable[[Any], R], left: Sequence[int], told: Callable[[int], object], ahead: int
) -> Iterator[tuple[int, R]]:
    """Run jobs, yielding each with its result; ends without those whose worker died."""
    futures: dict[Future[R], int] = {}
    lost: tuple[type[BaseException], ...] = (BrokenExecutor, CancelledError, *pool.lost)
    waiting = iter(left)

    with pool.open() as executor:

        def hand_out(count: int) -> None:
            with suppress(BrokenExecutor):  # a worker died already
                for i in islice(waiting, count):
                    futures[executor.submit(work, told(i))] = i

        hand_out(ahead)
        while futures:
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                index = futures.pop(future)
                with suppress(*lost):
                    result = future.result()
                    del future
                    yield index, result
                    del result
                hand_out(1)


def _measure(job: _Job, count: int, index: int) -> CalibrationTable:
    """In the worker: the table of one shard, without any tensor where there are fewer samples than shards."""
    model = job.plan.form(prepared(job.model_path))
    shard = job.source().shard(index, count)
    if next(iter(shard), None) is None:
        return CalibrationTable.empty(model)
    return collect(
        model,
        job.plan,
        shard,
        provider=job.provider,
        custom_ops=job.custom_ops,
        memory=job.memory,
        threads=job.threads,
        shard=(index, count),
    )


@lru_cache(maxsize=1)
def prepared(path: Path) -> Model:
    """In a worker: the model of a file, prepared once."""
    return prepare(load(path))
