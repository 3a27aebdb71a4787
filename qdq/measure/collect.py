"""Measure the tensors that a plan quantizes, and the largest magnitude of every float tensor.

Model + Plan + samples -> one Histogram per activation point, in the first pass the `Magnitude` of every float tensor ->
CalibrationTable -> table.json.
Each sample runs on one thread and several samples run at a time, so a table is bit-identical for every order of the
same samples, number of cores and split among processes, and no more than those few samples are in memory. Where the
model's inputs share an open leading dimension, a batch counts as the samples it holds: the table is the same for every
batch size. This module must not choose scales.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.core.nodes import leading_is_batch
from qdq.core.errors import InputError, StaleFileError
from qdq.core.progress import Progress
from qdq.core.resources import MemoryBudget
from qdq.measure.checkpoint import Checkpoint
from qdq.measure.histogram import BINS, Histogram
from qdq.measure.inference.inputs import read_anew
from qdq.measure.inference.magnitudes import Magnitude, WatchedSession
from qdq.measure.inference.memory import passes, peak, tensor_bytes
from qdq.measure.inference.samples import (
    Sample,
    counted,
    length,
    not_finite,
    overlapped,
    require_held,
    sample_sha256,
)
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable, TableFile, merged, samples_digest
from qdq.model.model import Model
from qdq.passes.rewrites import FLOAT_REWRITES
from qdq.plan.plan import Plan


def collect(
    model: Model,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    provider: str = "cpu",
    custom_ops: Sequence[str] = (),
    memory: int | None = None,
    threads: int | None = None,
    checkpoint: Checkpoint | None = None,
    shard: tuple[int, int] = (0, 1),
    on_progress: Progress | None = None,
) -> CalibrationTable:
    """Run the float model on every sample and count the values of the plan's activation points.

    A plan that quantizes nothing has a table too: of magnitudes, which say what may be FP16.

    Args:
        model: the prepared model that the plan was made for.
        plan: names the tensors.
        samples: input name -> array, or a batch of samples; shapes may differ; or what `as_samples` takes. Read one at
            a time; several times where
            the tensors do not fit the budget, else once (and the first sample twice); once more where a checkpoint is
            there to go on from.
        provider: ONNX Runtime provider, "cpu" or "cuda".
        custom_ops: ONNX Runtime custom operator libraries.
        memory: bytes for activations; see `memory.passes`.
        threads: samples at a time at most; None for one per core, as far as the budget allows.
        checkpoint: to go on from and to write to; the caller removes it once the table is written. The samples must
            then be re-iterable.
        shard: (i, n) where these samples are every n-th of all from the i-th on, so that messages count them right.
        on_progress: called with (samples done, samples in all or None, text); the text names the pass if there are
            several.

    Returns:
        The table, independent of the samples' order.

    Raises:
        InputError: no samples, samples that differ between passes, or a tensor inside the model that is NaN or infinite
            on a sample, empty on all, or of another shape than the file says.
        StaleFileError: the plan or the checkpoint belongs to something else.
    """
    plan.check(model)
    samples = read_anew(samples, model)
    names = list(dict.fromkeys(p.tensor for p in plan.activations))
    parts = checkpoint.load() if checkpoint else ()
    known = {name for part in parts for name in part.tensors}
    first, samples = _first(samples)
    check_same(parts, model, samples)
    layout = passes(model, [n for n in names if n not in known] or names, first, memory=memory, threads=threads)
    groups = [tuple(part.tensors) for part in parts] + [g for g in layout.groups if not (parts and known.issuperset(g))]
    tables: list[CalibrationTable] = []
    for number, group in enumerate(groups):
        start = parts[number] if number < len(parts) else CalibrationTable.empty(model)
        if number + 1 < len(parts):  # only the last one that a checkpoint holds may be incomplete
            tables.append(start)
            continue
        found = _one_pass(
            model,
            group,
            _runner(model, group, ranges=not number, provider=provider, custom_ops=custom_ops, threads=1),
            samples,
            start,
            threads=layout.threads,
            room=layout.room,
            label=f"calibrating, pass {number + 1} of {len(groups)}" if len(groups) > 1 else "calibrating",
            before=tables,
            checkpoint=checkpoint,
            shard=shard,
            on_progress=on_progress,
        )
        if tables and tables[0].samples != found.samples:
            raise InputError(
                "The samples differ from one reading to the next, but calibration needs several passes over the same "
                "ones. Let the source yield the same samples each time (seed its random numbers), or raise --memory."
            )
        tables.append(found)
    tensors = {name: h for table in tables for name, h in table.tensors.items()}
    if empty := sorted(n for n, h in tensors.items() if not h.samples and n not in model.inner_tensors):
        raise InputError(
            f"Tensor {empty[0]!r} of the float model holds no values on any sample, so its range is not known. Give "
            "samples in which it has some, or exclude the nodes that read it."
        )
    return replace(tables[0], samples_sha256=samples_digest(tables[0].samples), tensors=tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A sample to run, by its number, and the bytes that its activations take."""

    index: int
    sample: Sample
    needs: int


Run = Callable[[Sample], tuple[dict[str, npt.NDArray[np.floating]], Mapping[str, Magnitude]]]


def _runner(model: Model, tensors: Sequence[str], *, ranges: bool, **options: Any) -> Run:
    """What runs a sample in a pass over some tensors: it gives these, and the magnitudes of all tensors if asked to."""
    if ranges:
        return WatchedSession(model, tensors, **options)
    session = Session(model, tensors, in_order=True, **options)
    return lambda sample: (session(sample), {})


def _one_pass(
    model: Model,
    group: Sequence[str],
    run: Run,
    samples: Iterable[Sample],
    start: CalibrationTable,
    *,
    threads: int,
    room: int,
    label: str,
    before: Sequence[CalibrationTable],
    checkpoint: Checkpoint | None,
    shard: tuple[int, int],
    on_progress: Progress | None,
) -> CalibrationTable:
    """The table of one group of tensors; samples that `start` holds are not run again.

    As many run at a time as have room together, by their shapes.
    """
    total = length(samples)
    budget = MemoryBudget(room)
    table, held = start, Counter(start.samples)
    lock = threading.Lock()
    batch = batch_dimension(model)

    def sized() -> Iterator[_Work]:
        for index, sample in counted(samples):
            require_held(model, sample, shard[0] + index * shard[1])
            needs = peak(model, tensor_bytes(model, sample), group, model.graph.node)
            yield _Work(index=index, sample=sample, needs=needs)

    def look(work: _Work) -> CalibrationTable | None:
        index, sample = work.index, work.sample
        digests = Counter(_digests(sample, batch))
        with lock:
            if known := digests & held:
                held.subtract(known)
        if known == digests:
            return None
        if known:
            raise StaleFileError(
                "The unfinished calibration holds some samples of a batch but not all: the batches are others now. "
                "Give the samples in the same batches, or delete its checkpoint to begin anew."
            )
        tensors = dict.fromkeys(group, Histogram.nothing())  # of bodies that no run reaches it stays
        with budget.taken(work.needs):
            values, seen = run(sample)
            while values:
                name, array = values.popitem()
                if name not in model.inner_tensors:  # of these it has the values of all runs of a body
                    _require_stated(model, name, array.shape)
                try:
                    tensors[name] = Histogram.of(*_by_sample(model, name, array, batch, digests.total()))
                except ValueError as error:
                    raise not_finite(name, shard[0] + index * shard[1], str(error)) from None
                del array
        return replace(
            start,
            count=digests.total(),
            tensors=tensors,
            samples=tuple(sorted(digests.elements())),
            samples_sha256=samples_digest(digests.elements()),
            ranges={name: found.amax for name, found in seen.items()},
            not_finite=frozenset(name for name, found in seen.items() if not found.finite),
        )

    for done, seen in enumerate(overlapped(look, sized(), threads), 1):
        if seen is not None:
            table = merged([table, seen]) if table.count else seen
            if checkpoint is not None and checkpoint.due:
                checkpoint.write([*before, table])
        if on_progress is not None:
            on_progress(done, total, label)
    if held.total():
        raise StaleFileError(
            "The samples differ from one reading to the next, so the unfinished calibration cannot be continued: let "
            "the source yield the same samples each time (seed its random numbers), and delete its checkpoint."
        )
    return table


def _require_stated(model: Model, tensor: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the model's, which behind an unknown operator is what the file says.

    Raises:
        InputError: names both shapes.
    """
    info = model.info(tensor)
    stated = shape if info is None or info.shape is None else info.shape
    if len(stated) != len(shape) or any(isinstance(a, int) and a != b for a, b in zip(stated, shape, strict=True)):
        raise InputError(
            f"Tensor {tensor!r} has shape {list(shape)} on a sample, and {list(stated)} is what the model's file says "
            "or onnx infers from it. Leave that out of the file's value_info, or export the model again."
        )


def check_same(parts: Sequence[CalibrationTable], model: Model, samples: Iterable[Sample]) -> str:
    """Refuse to go on with tables of samples that are not among those given; reads the samples if there are tables.

    `parts` are what a checkpoint holds: of several, all but the last are complete. Returned is the digest of the
    re-iterable `samples`, "" if there are no tables.

    Raises:
        StaleFileError: says how many are missing.
    """
    if not parts:
        return ""
    batch = batch_dimension(model)
    given = Counter(digest for sample in samples for digest in _digests(sample, batch))
    for index, part in enumerate(parts):
        held = Counter(part.samples)
        if foreign := (held - given).total():
            raise StaleFileError(
                f"The unfinished calibration holds {foreign} samples that are not among those given now. Delete its "
                "checkpoint to begin anew."
            )
        if index + 1 < len(parts) and held != given:
            raise StaleFileError(
                f"The unfinished calibration has passes over {held.total()} samples, but {given.total()} are given "
                "now. Delete its checkpoint to begin anew."
            )
    return samples_digest(given.elements())


def batch_dimension(model: Model) -> str | None:
    """The name of the open leading dimension that all inputs share: a sample then holds as many as its size says."""
    if not leading_is_batch(model.graph):
        return None
    names = {fed.shape[0] if fed.shape else None for fed in model.inputs}
    return next((name for name in names if len(names) == 1 and isinstance(name, str)), None)


def _digests(sample: Sample, batch: str | None) -> Iterator[str]:
    """The hash of each sample of a batch, as it has by itself."""
    sizes = {np.shape(array)[0] for array in sample.values()} if batch else {1}
    count = sizes.pop() if len(sizes) == 1 else 1
    if count < 2:
        yield sample_sha256(sample)
    else:
        for index in range(count):
            yield sample_sha256({name: array[index : index + 1] for name, array in sample.items()})


def _by_sample(
    model: Model, tensor: str, array: npt.NDArray[np.floating], batch: str | None, count: int
) -> tuple[npt.NDArray[np.floating], int]:
    """A tensor with the samples one after the other in C order, and how many they are.

    Where no axis is the batch's alone, a Reshape has joined it with others behind it: C order already.
    """
    info = model.info(tensor)
    axes = [i for i, dim in enumerate((info.shape if info is not None else None) or ()) if dim == batch]
    if count > 1 and len(axes) == 1 and array.shape[axes[0]] == count:
        return np.moveaxis(array, axes[0], 0), count
    return array, count if array.size % count == 0 else 1


def _first(samples: Iterable[Sample]) -> tuple[Sample, Iterable[Sample]]:
    """The first sample, and all of them; an InputError where there is none."""
    iterator = iter(samples)
    _, first = next(counted(iterator))
    return first, itertools.chain([first], iterator) if iterator is samples else samples


def key(model: Model, plan: Plan, *, provider: str = "cpu", custom_ops: Sequence[str] = ()) -> dict[str, object]:
    """What a table depends on, but for the samples, which a table names one by one: for a `Checkpoint`.

    Of the plan these are the tensors to measure and the rewrites of the float model, whatever its settings are.
    """
    tensors = {point.tensor for point in plan.activations}
    rewrites = [(r.name, r.nodes) for r in plan.rewrites if r.name in FLOAT_REWRITES]
    runtimes = {}
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):
            runtimes[package] = version(package)
    return {
        "model": model.sha256,
        "plan": hashlib.sha256(repr((sorted(tensors), rewrites)).encode()).hexdigest(),
        "provider": provider,
        "custom operators": sorted(map(str, custom_ops)),
        "bins": BINS,
        "table": TableFile.FORMAT,
        "runtime": runtimes,
    }
