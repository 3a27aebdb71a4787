"""Some trials on some samples: what a process is given at a time.

samples -> one float pass, whose tensors that trials start from are kept -> each trial from them -> energies by sample
Each sample runs on one thread, so a figure depends on the sample and the trial alone, wherever and beside whatever else
it is computed. Of the samples as many are taken at a time as the memory holds the tensors of; what a single sample has
too much of lies in a file. It must not add anything up over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qdq.assemble.held_out import comparable, energies
from qdq.core.disk.spill import Spill, Spilled
from qdq.core.resources import default_bytes
from qdq.measure.inference import memory
from qdq.measure.inference.samples import Sample, overlapped
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable
from qdq.tune.sensitivity.behind import Behind, behind, whole
from qdq.tune.sensitivity.candidates import Candidates, outer_nodes

_WHAT = "tensors that trials start from"
SHARE = 2  # of what running a sample leaves of the memory: one part for what trials start from

Value = Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], float]
"""A metric of one sample: outputs, the float model's outputs -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A group in a candidate, by their numbers; `whole`: up to the outputs, else up to the probes."""

    group: int
    candidate: int
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a task shows on one sample.

    Attributes:
        noise: energy of the outputs' error; None where it was not run so far.
        near: the sum over the probes of noise over signal; None where there are none.
        value: of the metric; None where none is asked for, or the outputs were not computed.
    """

    noise: float | None
    near: float | None
    value: float | None = None


@dataclass(slots=True, kw_only=True)
class Unit:
    """The trials of one process.

    Attributes:
        candidates: of the model.
        table: that serves all of them.
        tasks: in the order in which they are run.
        value: a metric, or None.
        threads: samples at a time.
        from_input: run every trial from the input to the outputs, as a check of all that saves time.
    """

    candidates: Candidates
    table: CalibrationTable
    tasks: Sequence[Task]
    value: Value | None = None
    threads: int = 1
    from_input: bool = False

    def run(self, samples: Iterable[tuple[int, Sample]]) -> Iterator[tuple[Task, dict[int, Seen], dict[int, float]]]:
        """Each task with what it shows by the sample's number, and the energies of the float outputs.

        A task comes once for each of the batches that the samples are taken in.
        """
        left, model, starts = list[tuple[int, Sample]](), self.candidates.model, sorted(self._starts())
        room = each = 0
        for number, sample in samples:
            if not left:
                room = memory.left_bytes(model, [sample]) // SHARE
                sizes = memory.tensor_bytes(model, sample)
                each = max(1, sum(sizes.get(name, 0) for name in starts))
            left.append((number, sample))
            if len(left) >= max(1, room // each):
                yield from self._batch(left, starts, room)
                left = []
        if left:
            yield from self._batch(left, starts, room)

    def _batch(
        self, samples: Sequence[tuple[int, Sample]], starts: Sequence[str], room: int
    ) -> Iterator[tuple[Task, dict[int, Seen], dict[int, float]]]:
        model, first = self.candidates.model, samples[0][1]
        outputs, kept = comparable(model), _Kept(room)
        threads = max(1, min(self.threads, memory.at_once(model, [first], copies=2)))
        for names in memory.passes(model, starts, first, memory=default_bytes() - room).groups:
            session = Session(model, names, threads=1, in_order=True)
            for (number, _), found in zip(samples, overlapped(session, (s for _, s in samples), threads), strict=True):
                kept.put(number, found)
        numbers = [number for number, _ in samples]
        floats = {number: kept.get(number, outputs) for number in numbers}
        signals = {number: energies(found, found)[0] for number, found in floats.items()}
        del floats
        for task in self.tasks:
            look = self._look(task, kept, numbers[0], outputs)
            yield task, dict(zip(numbers, overlapped(look, numbers, threads), strict=True)), signals

    def _look(self, task: Task, kept: _Kept, first: int, outputs: Sequence[str]) -> Callable[[int], Seen]:
        """What runs a task on the sample of a number."""
        part = self._part(task)
        near = not task.whole and not part.last
        ends = list(part.outputs)
        wanted = list(part.probes) if near else list(dict.fromkeys((*ends, *part.probes)))
        session, inputs = part.session(wanted, kept.get(first, part.inputs), near=near)

        def look(number: int) -> Seen:
            found = session(kept.get(number, inputs))
            near_noise = kept.near(number, part.probes, found) if part.probes else None
            if near:
                return Seen(noise=None, near=near_noise)
            expected = kept.get(number, outputs)
            noise = energies({name: expected[name] for name in ends}, found, signal=False)[1]
            value = None if self.value is None else self.value({**expected, **found}, expected)
            return Seen(noise=noise, near=near_noise, value=value)

        return look

    def _part(self, task: Task) -> Behind:
        every = self.candidates
        group, text = every.groups[task.group], every.texts[task.candidate]
        trial = every.trial(group, text, self.table)
        outputs = comparable(every.model)
        if self.from_input:
            return whole(trial, outputs)
        return behind(trial, every.model, outer_nodes(every.model, every.affected(group, text)), outputs)

    def _starts(self) -> frozenset[str]:
        """The float tensors that the tasks start from, or compare with: those of the float model's own nodes there."""
        every, outputs = self.candidates, comparable(self.candidates.model)
        if self.from_input:
            return frozenset((*(fed.name for fed in every.model.inputs), *outputs))
        pairs = dict.fromkeys((task.group, task.candidate) for task in self.tasks)
        nodes = dict.fromkeys(every.affected(every.groups[g], every.texts[c]) for g, c in pairs)
        names = set(outputs)
        for some in nodes:
            part = behind(every.model, every.model, outer_nodes(every.model, some), outputs)
            names.update((*part.inputs, *part.probes))
        return frozenset(names)


class _Kept:
    """Tensors of samples, in memory up to some bytes and beyond in a file."""

    def __init__(self, room: int) -> None:
        self._room, self._spill = room, None if room > 0 else Spill(_WHAT)
        self._held: dict[tuple[int, str], np.ndarray | Spilled] = {}
        self._energies: dict[tuple[int, str], float] = {}

    def put(self, sample: int, values: Mapping[str, np.ndarray]) -> None:
        for name, array in values.items():
            if array.nbytes <= self._room:
                self._room -= array.nbytes
                self._held[sample, name] = array
            else:
                self._spill = self._spill or Spill(_WHAT)
                self._held[sample, name] = self._spill.put(array)

    def get(self, sample: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        found = {name: self._held[sample, name] for name in names}
        return {name: held.read() if isinstance(held, Spilled) else held for name, held in found.items()}

    def near(self, sample: int, names: Iterable[str], found: Mapping[str, np.ndarray]) -> float:
        """The sum over tensors of noise over signal."""
        ratios = []
        for name, array in self.get(sample, names).items():
            if (sample, name) not in self._energies:  # whoever else looks it up finds the same
                self._energies[sample, name] = energies({name: array}, {name: array})[0]
            noise = energies({name: array}, found, signal=False)[1]
            ratios.append(noise / max(self._energies[sample, name], 1e-300))
        return math.fsum(ratios) if all(map(math.isfinite, ratios)) else math.inf
