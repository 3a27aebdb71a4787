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
from types import TracebackType

import numpy as np
import numpy.typing as npt

from engines.backends.compiler import Engine
from engines.timing.driver import Driver
from engines.timing.loaded import LoadedEngine
from engines.timing.timer import Arrays, Load, Timing

WARM_UP = 3  # inferences before anything is timed: the first compiles and loads kernels
ROUND_US = 100_000.0  # of GPU time in one round, at most
INTERVALS = 128  # in one round, at most: events are read after it
QUEUED = 500  # kernels in the driver's queue, at most, where they are launched one by one; it takes about 1000
BUSY_BYTES = 256 << 20
BUSY_S = 0.02  # of light work before the first round: clocks of an idle GPU take that long to rise
FIRST_LEAD_US, LEAD, TRIES = 2_000.0, 1.5, 4  # how long the GPU is kept busy before a round; more, where it was late


@dataclass(slots=True, kw_only=True)
class _Ready:
    """One load that can be timed: what puts an interval into the stream, and the intervals so far.

    `queued` is what an interval takes of the driver's queue, `usual_us` about how long it is.
    """

    enqueue: Callable[[], None]
    inferences: int
    queued: int
    graph: bool
    usual_us: float = 0.0
    us: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)


class EventTimer:
    """A `Timer` on a GPU of this machine."""

    def __init__(self, driver: Driver) -> None:
        """On the GPU and the stream of an open driver."""
        self._driver = driver

    def outputs(self, engine: Engine, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """As of `Timer`."""
        with LoadedEngine(self._driver, engine, inputs) as loaded:
            return loaded.outputs()

    def times(self, loads: Sequence[Load], *, seconds: float, rest_s: float = 0.0) -> list[Timing]:
        """As of `Timer`."""
        with ExitStack() as held:
            ready = [self._ready(held.enter_context(LoadedEngine(self._driver, x.engine)), x) for x in loads]
            events = held.enter_context(_Events(self._driver))
            busy = held.enter_context(_Busy(self._driver, events))
            for each in ready:
                each.usual_us = events.around(each.enqueue)
            if rest_s:
                time.sleep(rest_s)
            busy.keep(BUSY_S * 1e6)
            self._rounds(ready, busy, events, seconds)
        return [Timing(us=tuple(r.us), at_s=tuple(r.at_s), graph=r.graph) for r in ready]

    def _ready(self, loaded: LoadedEngine, load: Load) -> _Ready:
        """Warmed up and captured."""
        for _ in range(WARM_UP):
            loaded.run()
        graph = loaded.graph(load.repeats)
        if graph is not None:
            return _Ready(enqueue=lambda: self._driver.replay(graph), inferences=load.repeats, queued=1, graph=True)

        def enqueue() -> None:
            for _ in range(load.repeats):
                loaded.launch()

        queued = load.repeats * (1 if loaded.runtime_graph else max(load.engine.table.kernels, 1))
        return _Ready(enqueue=enqueue, inferences=load.repeats, queued=queued, graph=loaded.runtime_graph)

    def _rounds(self, ready: Sequence[_Ready], busy: _Busy, events: _Events, seconds: float) -> None:
        """Rounds until the GPU was busy with them for so many seconds; each begins with another load."""
        base, lead_us, overtaken, turn, done_s = events[0], FIRST_LEAD_US, 0, 0, 0.0
        while done_s < seconds:
            order = [ready[(turn + i) % len(ready)] for i in range(len(ready))]
            began = time.perf_counter()
            busy.keep(lead_us)
            if not turn:
                self._driver.record(base)
            intervals = self._queue(order, events)
            late = self._driver.reached(intervals[-1].first)
            queueing_us = (time.perf_counter() - began) * 1e6
            self._driver.synchronize()
            if late and overtaken < TRIES:  # the GPU waited for the host inside these intervals
                overtaken, lead_us = overtaken + 1, max(2 * lead_us, LEAD * queueing_us)
                continue
            turn += 1
            for each in intervals:
                each.ready.us.append(self._driver.elapsed_us(each.first, each.second) / each.ready.inferences)
                each.ready.at_s.append(self._driver.elapsed_us(base, each.first) / 1e6)
            done_s = self._driver.elapsed_us(base, intervals[-1].second) / 1e6

    def _queue(self, order: Sequence[_Ready], events: _Events) -> list[_Interval]:
        """Puts some intervals of each load into the stream."""
        found: list[_Interval] = []
        for ready in order:
            most = min(INTERVALS, QUEUED // ready.queued) // len(order)
            for _ in range(max(1, min(most, math.ceil(ROUND_US / len(order) / ready.usual_us)))):
                interval = _Interval(ready=ready, first=events[2 * len(found) + 1], second=events[2 * len(found) + 2])
                self._driver.record(interval.first)
                ready.enqueue()
                self._driver.record(interval.second)
                found.append(interval)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Interval:
    """Two events and what was between them."""

    ready: _Ready
    first: int
    second: int


class _Events(AbstractContextManager["_Events"]):
    """Events by number, made when they are first asked for."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._made = driver, list[int]()

    def __getitem__(self, number: int) -> int:
        while len(self._made) <= number:
            self._made.append(self._driver.event())
        return self._made[number]

    def around(self, enqueue: Callable[[], None]) -> float:
        """Microseconds of what is put into the stream, roughly, and 1 at least; the second of two times."""
        for _ in range(2):
            self._driver.record(self[1])
            enqueue()
            self._driver.record(self[2])
            self._driver.synchronize()
        return max(self._driver.elapsed_us(self[1], self[2]), 1.0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in self._made:
            self._driver.destroy_event(event)


class _Busy(AbstractContextManager["_Busy"]):
    """Light work for the GPU of about a given length: zeros written to memory."""

    def __init__(self, driver: Driver, events: _Events) -> None:
        self._driver = driver
        self._size = min(BUSY_BYTES, driver.free_bytes() // 8)
        self._address = driver.allocate(self._size)
        self._us = events.around(self._fill)

    def keep(self, us: float) -> None:
        """Keeps the GPU busy for so many microseconds, from when the stream comes to it."""
        for _ in range(math.ceil(us / self._us)):
            self._fill()

    def _fill(self) -> None:
        self._driver.fill(self._address, self._size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.free(self._address)
