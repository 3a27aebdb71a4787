"""Times of engines on the GPU of this machine: replays of captured graphs between events of the driver.

loads -> loaded, warmed up, captured -> rounds in turn, each behind work that keeps the GPU busy until all is queued
-> microseconds between the events around each replay. The host's clock only decides how much is queued at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engines.backends.backend import Running
from engines.backends.compiler import Engine
from engines.backends.trt import RuntimeCache
from engines.timing.driver import Driver
from engines.timing.loaded import LoadedEngine
from engines.timing.timer import Arrays, KernelTime, Load, Timing

WARM_UP = 3  # inferences before anything is timed: the first compiles and loads kernels
ROUND_US = 100_000.0  # of GPU time in one round, at most
INTERVALS = 128  # in one round, at most: events are read after it
QUEUED = 500  # kernels in the driver's queue, at most, where they are launched one by one; it takes about 1000
BUSY_BYTES = 256 << 20
BUSY_S = 0.02  # of light work before the first round: clocks of an idle GPU take that long to rise
FIRST_LEAD_US, LEAD, TRIES = 2_000.0, 1.5, 4  # how long the GPU is kept busy before a round; more, where it was late


class Stream(Protocol):
    """What this needs of a GPU: `engines.timing.driver.Driver` has it. Events and memory are whole numbers."""

    def event(self) -> int:
        """A new event with a time."""

    def record(self, event: int) -> None:
        """Puts an event into the stream."""

    def reached(self, event: int) -> bool:
        """Whether the GPU has come to an event."""

    def elapsed_us(self, first: int, second: int) -> float:
        """Microseconds of the GPU between two events that it has reached."""

    def destroy_event(self, event: int) -> None:
        """Gives an event back."""

    def synchronize(self) -> None:
        """Waits for the stream."""

    def free_bytes(self) -> int:
        """Memory that is free now."""

    def allocate(self, nbytes: int) -> int:
        """New memory."""

    def free(self, address: int) -> None:
        """Gives memory back."""

    def fill(self, address: int, nbytes: int) -> None:
        """Writes zeros, in the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What can be timed.

    Attributes:
        enqueue: puts it into the stream, once.
        inferences: that this is.
        queued: entries of the driver's queue that it takes.
        graph: whether it replays a captured graph.
    """

    enqueue: Callable[[], object]
    inferences: int = 1
    queued: int = 1
    graph: bool = True


class EventTimer:
    """A `Timer` on a GPU of this machine."""

    def __init__(self, driver: Driver, running: Running | None = None) -> None:
        """On the GPU and the stream of an open driver; `running` is what all engines need beside them.

        Raises:
            EngineError: see `RuntimeCache`.
        """
        self._driver, self._running = driver, running or Running()
        self._cache = RuntimeCache(self._running.runtime_cache) if self._running.runtime_cache else None

    def outputs(self, engine: Engine, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """As of `Timer`."""
        with self._loaded(engine, inputs) as loaded:
            found = loaded.outputs()
            self._keep()
            return found

    def kernel_times(self, engine: Engine, runs: int) -> list[KernelTime]:
        """As of `Timer`."""
        with self._loaded(engine) as loaded:
            found = loaded.kernel_times(runs)
            self._keep()
            return found

    def times(self, loads: Sequence[Load], *, seconds: float, rest_s: float = 0.0) -> list[Timing]:
        """As of `Timer`."""
        with ExitStack() as held:
            works = [self.ready(held.enter_context(self._loaded(x.engine)), x) for x in loads]
            self._keep()
            return timings(self._driver, works, seconds=seconds, rest_s=rest_s)

    def _loaded(self, engine: Engine, inputs: Arrays | None = None) -> LoadedEngine:
        return LoadedEngine(self._driver, engine, inputs, running=self._running, cache=self._cache)

    def _keep(self) -> None:
        """Writes what TensorRT-RTX compiled for the engines that ran."""
        if self._cache is not None:
            self._cache.save()

    def ready(self, loaded: LoadedEngine, load: Load) -> Work:
        """An engine that is loaded, warmed up and captured."""
        for _ in range(WARM_UP):
            loaded.run()
        graph = loaded.graph(load.repeats)
        if graph is not None:
            return Work(enqueue=partial(self._driver.replay, graph), inferences=load.repeats)

        def enqueue() -> None:
            for _ in range(load.repeats):
                loaded.launch()

        queued = load.repeats * (1 if loaded.runtime_graph else max(load.engine.table.kernels, 1))
        return Work(enqueue=enqueue, inferences=load.repeats, queued=queued, graph=loaded.runtime_graph)


def timings(stream: Stream, works: Sequence[Work], *, seconds: float, rest_s: float = 0.0) -> list[Timing]:
    """The times of each of several works that are warm, taking turns; arguments as of `Timer.times`."""
    ready = [_Ready(work=work) for work in works]
    with _Events(stream) as events, _Busy(stream, events) as busy:
        for each in ready:
            each.usual_us = events.around(each.work.enqueue)
        if rest_s:
            time.sleep(rest_s)
        busy.keep(BUSY_S * 1e6)
        _rounds(stream, ready, busy, events, seconds)
    return [Timing(us=tuple(r.us), at_s=tuple(r.at_s), graph=r.work.graph) for r in ready]


@dataclass(slots=True, kw_only=True)
class _Ready:
    """A work, about how long it is, and its intervals so far."""

    work: Work
    usual_us: float = 0.0
    us: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Interval:
    """Two events and what was between them."""

    ready: _Ready
    first: int
    second: int


def _rounds(stream: Stream, ready: Sequence[_Ready], busy: _Busy, events: _Events, seconds: float) -> None:
    """Rounds until the GPU was busy with them for so many seconds; each begins with another work."""
    base, lead_us, overtaken, turn, done_s = events[0], FIRST_LEAD_US, 0, 0, 0.0
    while done_s < seconds:
        order = [ready[(turn + i) % len(ready)] for i in range(len(ready))]
        began = time.perf_counter()
        busy.keep(lead_us)
        if not turn:
            stream.record(base)
        intervals = _queue(stream, order, events)
        late = stream.reached(intervals[-1].first)
        queueing_us = (time.perf_counter() - began) * 1e6
        stream.synchronize()
        if late and overtaken < TRIES:  # the GPU waited for the host inside these intervals
            overtaken, lead_us = overtaken + 1, max(2 * lead_us, LEAD * queueing_us)
            continue
        turn += 1
        for each in intervals:
            each.ready.us.append(stream.elapsed_us(each.first, each.second) / each.ready.work.inferences)
            each.ready.at_s.append(stream.elapsed_us(base, each.first) / 1e6)
        done_s = stream.elapsed_us(base, intervals[-1].second) / 1e6


def _queue(stream: Stream, order: Sequence[_Ready], events: _Events) -> list[_Interval]:
    """Puts some intervals of each work into the stream."""
    found: list[_Interval] = []
    for ready in order:
        most = min(INTERVALS, QUEUED // ready.work.queued) // len(order)
        for _ in range(max(1, min(most, math.ceil(ROUND_US / len(order) / ready.usual_us)))):
            interval = _Interval(ready=ready, first=events[2 * len(found) + 1], second=events[2 * len(found) + 2])
            stream.record(interval.first)
            ready.work.enqueue()
            stream.record(interval.second)
            found.append(interval)
    return found


class _Events(AbstractContextManager["_Events"]):
    """Events by number, made when they are first asked for."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._made = stream, list[int]()

    def __getitem__(self, number: int) -> int:
        while len(self._made) <= number:
            self._made.append(self._stream.event())
        return self._made[number]

    def around(self, enqueue: Callable[[], object]) -> float:
        """Microseconds of what is put into the stream, roughly, and 1 at least; the second of two times."""
        for _ in range(2):
            self._stream.record(self[1])
            enqueue()
            self._stream.record(self[2])
            self._stream.synchronize()
        return max(self._stream.elapsed_us(self[1], self[2]), 1.0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in self._made:
            self._stream.destroy_event(event)


class _Busy(AbstractContextManager["_Busy"]):
    """Light work for the GPU of about a given length: zeros written to memory."""

    def __init__(self, stream: Stream, events: _Events) -> None:
        self._stream = stream
        self._size = min(BUSY_BYTES, stream.free_bytes() // 8)
        self._address = stream.allocate(self._size)
        self._us = events.around(self._fill)

    def keep(self, us: float) -> None:
        """Keeps the GPU busy for so many microseconds, from when the stream comes to it."""
        for _ in range(math.ceil(us / self._us)):
            self._fill()

    def _fill(self) -> None:
        self._stream.fill(self._address, self._size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.free(self._address)
