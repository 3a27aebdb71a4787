"""Run a model in stages on a few samples: each computes some wanted tensors from what the stages before have left.

Model + wanted tensors of each stage -> the nodes of each -> `run` one after the other -> the wanted tensors per sample.
Between stages the constants may change, and a tensor that is kept may be moved (`add`): so a model whose layers are
corrected one after the other is run once in all, not once per layer. Of each sample only the tensors that later stages
read are kept, in memory up to a limit and beyond it in files. This module must not know what is corrected.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from engines.core.files import Scratch
from qdq.core.resources import cores, default_bytes
from qdq.measure.inference.partitioned import excerpt
from qdq.measure.inference.samples import Sample, overlapped
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.model.nodes import reads

SHARE = 4  # of `default_bytes`: one part for what is kept between stages, the others for the stage that runs
_TYPES = frozenset(np.dtype(code).name for code in "efdbBhHiIqQ?")  # what a tensor that is kept may be

Array = npt.NDArray[Any]
R = TypeVar("R")


class Stages:
    """A model cut into stages, and what is kept of each sample between them. A context manager: it may hold files."""

    def __init__(
        self,
        model: Model,
        wanted: Sequence[Collection[str]],
        samples: Iterable[Sample],
        *,
        memory: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Cut the model up and take the samples' inputs over; nothing is run yet.

        The tensors `wanted` of a stage depend on none of a later stage. The samples are few, for all that is needed of
        them is kept: in memory up to a share of `default_bytes`, and to `memory` bytes. `threads` samples run at a
        time, None for one per core.
        """
        self._threads = threads or cores()
        self._wanted = [frozenset(names) for names in wanted]
        self._fixed = _fixed(model)
        self._groups = _groups(model, self._wanted, self._fixed)
        self._last: dict[str, int] = {}  # tensor -> the last stage that reads it
        nodes = model.graph.node
        for stage, group in enumerate(self._groups):
            self._last.update((n, stage) for index in group for n in reads(nodes[index]))
        self._next = 0  # the stage to run
        self._files = ExitStack()
        self._kept = _Kept(min(default_bytes() // SHARE, math.inf if memory is None else memory), self._files)
        fed = [i.name for i in model.inputs if i.name in self._last]
        self._samples = 0
        for number, sample in enumerate(samples):
            self._kept.put(number, {name: np.asarray(sample[name]) for name in fed})
            self._samples = number + 1

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the files."""
        self._files.close()

    def run(self, model: Model, look: Callable[[Mapping[str, Array]], R]) -> list[R]:
        """Run the next stage of the model, whose constants may be others now, on every sample.

        `look` is called with the wanted tensors of each sample, on its own thread; what it returns is returned.
        """
        stage = self._next
        session, inputs, left = self._session(model)
        self._next += 1
        ended = [name for name in inputs if self._last[name] <= stage]

        def one(number: int) -> R:
            found = session({name: self._kept.get(number, name) for name in inputs})
            self._kept.drop(number, ended)
            self._kept.put(number, {name: found[name] for name in left})
            return look({name: found[name] for name in self._wanted[stage]})

        return list(overlapped(one, range(self._samples), self._threads))

    def next_nodes(self, model: Model) -> list[NodeProto]:
        """The nodes of the stage that is run next, as the model has them."""
        return [model.graph.node[index] for index in self._groups[self._next]]

    def held(self, number: int) -> dict[str, Array]:
        """What is kept of a sample now; the arrays stay valid when a later stage drops them."""
        return self._kept.of(number)

    def tried(self, model: Model, number: int) -> dict[str, Array]:
        """The wanted tensors of the next stage for one sample; nothing is kept of them, and the stage is still next."""
        session, inputs, _ = self._session(model)
        found = session({name: self._kept.get(number, name) for name in inputs})
        return {name: found[name] for name in self._wanted[self._next]}

    def _session(self, model: Model) -> tuple[Session, list[str], set[str]]:
        """Of the next stage: its session, the tensors that it reads, and those that later stages read of it."""
        stage, group = self._next, self.next_nodes(model)
        made = {name for node in group for name in node.output if name}
        left = {name for name in made - self._fixed if self._last.get(name, -1) > stage}
        used = {name for node in group for name in reads(node)}
        inputs = sorted(used - made - model.initializers.keys())
        types = {name: self._kept.get(0, name).dtype for name in inputs}
        part = excerpt(model, group, types)
        part.graph.initializer.extend(model.initializers[name] for name in sorted(used & model.initializers.keys()))
        wanted = [*self._wanted[stage], *sorted(left - self._wanted[stage])]
        return Session(model.replace(part), wanted, threads=1), inputs, left

    def add(self, tensor: str, values: Array, *, axis: int) -> None:
        """Add (channels,) values along an axis of a tensor of a stage that was run, if later stages read it."""
        if self._last.get(tensor, -1) >= self._next:
            for number in range(self._samples):
                old = self._kept.get(number, tensor)
                wide = np.float64 if old.dtype == np.float64 else np.float32
                shape = [-1 if i == axis % old.ndim else 1 for i in range(old.ndim)]
                moved = (old + values.astype(wide).reshape(shape)).astype(old.dtype, copy=False)
                self._kept.drop(number, [tensor])
                self._kept.put(number, {tensor: moved})


def can_stage(model: Model) -> bool:
    """Whether every tensor that could be kept between stages has a type that numpy and ONNX Runtime both know."""
    infos = (model.info(name) for node in model.graph.node for name in (*node.input, *node.output) if name)
    constants = model.initializers
    return all(info is None or info.name in constants or info.dtype in _TYPES for info in infos)


def _fixed(model: Model) -> frozenset[str]:
    """Constants, and what is computed of constants alone: each stage does that anew, so that it need not be kept."""
    fixed: set[str] = set(model.initializers)
    for node in model.graph.node:
        if (read := reads(node)) and fixed.issuperset(read):
            fixed.update(name for name in node.output if name)
    return frozenset(fixed)


def _groups(model: Model, wanted: Sequence[Collection[str]], fixed: Collection[str]) -> list[list[int]]:
    """The indices of each stage's nodes, in the order of the graph; only those of `fixed` tensors are in several."""
    nodes = model.graph.node
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    made: set[int] = set()
    groups = []
    for names in wanted:
        group: set[int] = set()
        stack = list(names)
        while stack:
            index = producer.get(stack.pop())
            if index is None or index in made or index in group:
                continue
            group.add(index)
            stack.extend(reads(nodes[index]))
        groups.append(sorted(group))
        made.update(index for index in group if not set(nodes[index].output).issubset(fixed))
    return groups


class _Kept:
    """Tensors of each sample; may be used from several threads at once."""

    def __init__(self, room: float, files: ExitStack) -> None:
        self._room, self._files = room, files
        self._folder: Path | None = None
        self._count = 0
        self._lock = threading.Lock()
        self._values: dict[tuple[int, str], Array] = {}
        self._paths: dict[tuple[int, str], Path] = {}

    def put(self, sample: int, values: Mapping[str, Array]) -> None:
        for name, array in values.items():
            with self._lock:
                fits = array.nbytes <= self._room
                self._room -= array.nbytes if fits else 0
            self._values[sample, name] = array if fits else self._mapped((sample, name), array)

    def get(self, sample: int, name: str) -> Array:
        return self._values[sample, name]

    def of(self, sample: int) -> dict[str, Array]:
        return {name: array for (number, name), array in self._values.items() if number == sample}

    def drop(self, sample: int, names: Iterable[str]) -> None:
        for name in names:
            array, path = self._values.pop((sample, name)), self._paths.pop((sample, name), None)
            if path is not None:
                path.unlink()
            else:
                with self._lock:
                    self._room += array.nbytes

    def _mapped(self, key: tuple[int, str], array: Array) -> Array:
        with self._lock:
            if self._folder is None:
                self._folder = self._files.enter_context(Scratch())
            path = self._folder / str(self._count)
            self._count += 1
            self._paths[key] = path
        np.ascontiguousarray(array).tofile(path)
        return np.memmap(path, array.dtype, mode="r", shape=array.shape)
