"""Trials on samples, here or on a pool of processes or machines; what is done is kept in a file until all is.

tasks + numbers of samples -> those that are not known yet -> `Unit`s -> what each shows, by task and sample.
A figure depends on its sample and trial alone, so it does not matter who computes it, in which order, or how often a
worker died. This module must not add figures up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar

from engines.core.documents import Document
from engines.core.files import unfinished
from qdq.core.errors import InputError, StaleFileError
from qdq.core.files import read_document, write_text
from qdq.core.progress import Progress
from qdq.core.resources import cores, within
from qdq.measure.checkpoint import EVERY_S, SHARE
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import registered
from qdq.measure.shards import PER_WORKER, Pool, Sharded, each_of, prepared
from qdq.measure.table import CalibrationTable
from qdq.plan.settings import Settings
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.unit import Seen, Task, Unit, Value

Found = tuple[Task, dict[int, Seen], dict[int, float]]


class SensitivityPart(Document, frozen=True, kw_only=True):
    """What is known of an unfinished table: figures as hexadecimal text, "" for none.

    Attributes:
        key: what they depend on.
        tasks: "group candidate whole sample" -> noise, near, value.
        signals: number of a sample -> energy of its float outputs.
    """

    FORMAT: ClassVar[str] = "qdq.sensitivity-part/1"
    MAKE: ClassVar[str] = "qdq sensitivity"

    key: dict[str, str]
    tasks: dict[str, tuple[str, ...]]
    signals: dict[str, str]


@dataclass(slots=True, kw_only=True)
class Runner:
    """Runs trials; what it knows it does not run again.

    Attributes:
        units: runs tasks on the samples of some numbers, giving each task's figures as they come.
        path: of the file that keeps them; None keeps none.
        key: what the figures depend on.
        on_progress: called with (tasks done, tasks in all, text).
    """

    units: Callable[[Sequence[Task], Sequence[int]], Iterable[Found]]
    path: Path | None = None
    key: Mapping[str, str] = field(default_factory=dict)
    on_progress: Progress | None = None
    signals: dict[int, float] = field(default_factory=dict)
    _known: dict[tuple[Task, int], Seen] = field(default_factory=dict)
    _due: float = 0.0

    def __post_init__(self) -> None:
        """Take over what an unfinished run has left.

        Raises:
            StaleFileError: it is of another model, other samples or candidates.
            InputError: it is damaged.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            part = read_document(self.path, SensitivityPart, "unfinished sensitivity table")
            self._known = {_key(name): _seen(values) for name, values in part.tasks.items()}
            self.signals = {int(number): float.fromhex(text) for number, text in part.signals.items()}
        except (InputError, ValueError) as error:
            raise InputError(f"Cannot go on with {self.path}: {error} Delete it to begin anew.") from None
        if odd := [name for name in {**part.key, **self.key} if part.key.get(name) != self.key.get(name)]:
            raise StaleFileError(
                f"An unfinished sensitivity table lies in {self.path}, of another {', '.join(odd)}. Repeat the command "
                "that began it, delete that file to begin anew, or write the table elsewhere."
            )

    def run(self, tasks: Sequence[Task], numbers: Sequence[int]) -> None:
        """Know what some tasks show on the samples of some numbers."""
        left = [task for task in tasks if any(self.seen(task, number) is None for number in numbers)]
        missing = [number for number in numbers if any(self.seen(task, number) is None for task in left)]
        done, total = 0, len(left) * len(missing)
        if not left:
            return
        for task, seen, signals in self.units(left, missing):
            self._known.update(((task, number), each) for number, each in seen.items())
            self.signals.update(signals)
            done += len(seen)
            self._keep()
            if self.on_progress is not None:
                self.on_progress(done, total, "measuring groups")
        self._keep(now=True)

    def seen(self, task: Task, number: int) -> Seen | None:
        """What a task shows on a sample; up to the probes also where it was run to the outputs."""
        found = self._known.get((task, number))
        if found is None and not task.whole:
            whole = self._known.get((Task(group=task.group, candidate=task.candidate, whole=True), number))
            return None if whole is None else Seen(noise=None, near=whole.near) if whole.near is not None else whole
        return found

    def _keep(self, *, now: bool = False) -> None:
        if self.path is None or (time.monotonic() < self._due and not now):
            return
        began = time.monotonic()
        part = SensitivityPart(
            key=dict(self.key),
            tasks={_name(*place): _texts(seen) for place, seen in sorted(self._known.items(), key=str)},
            signals={str(number): energy.hex() for number, energy in sorted(self.signals.items())},
        )
        write_text(self.path, part.to_json(), resumed=True)
        ended = time.monotonic()
        self._due = ended + max(EVERY_S, SHARE * (ended - began))


def forget(path: Path) -> None:
    """Remove the file that kept what was done: the table is written."""
    for each in (path, unfinished(path)):
        with suppress(FileNotFoundError):
            each.unlink()


def _name(task: Task, number: int) -> str:
    return f"{task.group} {task.candidate} {int(task.whole)} {number}"


def _key(name: str) -> tuple[Task, int]:
    group, candidate, whole, number = map(int, name.split())
    return Task(group=group, candidate=candidate, whole=bool(whole)), number


def _texts(seen: Seen) -> tuple[str, ...]:
    return tuple("" if value is None else value.hex() for value in (seen.noise, seen.near, seen.value))


def _seen(texts: Sequence[str]) -> Seen:
    noise, near, value = (float.fromhex(text) if text else None for text in texts)
    return Seen(noise=noise, near=near, value=value)


def here(
    candidates: Candidates,
    table: CalibrationTable,
    samples: Iterable[Sample],
    *,
    value: Value | None = None,
    from_input: bool = False,
) -> Callable[[Sequence[Task], Sequence[int]], Iterable[Found]]:
    """What a `Runner` takes to run trials in this process; the samples are re-iterable."""

    def units(tasks: Sequence[Task], numbers: Sequence[int]) -> Iterable[Found]:
        unit = Unit(
            candidates=candidates, table=table, tasks=tasks, value=value, threads=cores(), from_input=from_input
        )
        chosen = set(numbers)
        return unit.run((number, sample) for number, sample in enumerate(samples) if number in chosen)

    return units


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every worker is told.

    Attributes:
        model_path: the float model's file, which each worker reads and prepares.
        settings: as of `Candidates.of`, as the two below.
        texts: the candidates.
        unquantized_type: that `float` has.
        table: that serves all of them.
        source: opens the samples anew; picklable.
        value: a metric, or None; picklable.
        custom_ops: paths of libraries.
        memory: bytes for each worker; None for the usual.
    """

    model_path: Path
    settings: Settings
    texts: tuple[str, ...]
    unquantized_type: str
    table: CalibrationTable
    source: Callable[[], Sharded]
    value: Value | None = None
    custom_ops: tuple[str, ...] = ()
    memory: int | None = None


def on_pool(job: Job, pool: Pool, total: int) -> Callable[[Sequence[Task], Sequence[int]], Iterable[Found]]:
    """What a `Runner` takes to run trials on a pool; `total` samples there are."""

    def units(tasks: Sequence[Task], numbers: Sequence[int]) -> Iterable[Found]:
        cuts = max(1, min(len({task.group for task in tasks}), -(-PER_WORKER * pool.workers // len(numbers))))
        order = sorted({task.group for task in tasks})
        parts = [set(order[i * len(order) // cuts : (i + 1) * len(order) // cuts]) for i in range(cuts)]
        jobs = [(tuple(t for t in tasks if t.group in some), number) for number in numbers for some in parts]
        work = partial(_unit, job, tuple(jobs), total)
        for _, found in each_of(pool, work, range(len(jobs)), what="parts of the sensitivity table"):
            yield from found

    return units


def _unit(job: Job, jobs: Sequence[tuple[tuple[Task, ...], int]], total: int, index: int) -> list[Found]:
    """In a worker: the figures of some tasks on one sample."""
    tasks, number = jobs[index]
    candidates = _candidates(job.model_path, json.dumps(job.settings.to_mapping()), job.texts, job.unquantized_type)
    unit = Unit(candidates=candidates, table=job.table, tasks=tasks, value=job.value)
    with within(job.memory), registered(job.custom_ops):
        return list(unit.run((number, sample) for sample in job.source().shard(number, total)))


@lru_cache(maxsize=1)
def _candidates(path: Path, settings: str, texts: tuple[str, ...], unquantized_type: str) -> Candidates:
    """Planned once in each worker."""
    return Candidates.of(prepared(path), Settings.from_mapping(json.loads(settings)), texts, unquantized_type)
