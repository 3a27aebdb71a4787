"""Measure the ranges of the tensors that a plan quantizes.

Model + Plan + samples -> one Histogram per activation point -> CalibrationTable -> table.json.
Each sample runs on one thread and several samples run at a time, so a table is bit-identical for every order of the
same samples, number of cores and split among processes, and no more than those few samples are in memory. This module
must not choose scales.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from qdq.checkpoint import Checkpoint
from qdq.errors import InputError, StaleFileError
from qdq.footprint import passes
from qdq.graph import Model
from qdq.observers import BINS, Histogram
from qdq.plan import Plan
from qdq.table import CalibrationTable, merged, samples_digest
from qdq.tap import Sample, Tap, counted, length, overlapped

__all__ = ["CalibrationTable", "Progress", "collect", "key"]

Progress = Callable[[int, int | None, str], None]


def collect(
    model: Model,
    plan: Plan,
    samples: Iterable[Sample],
    *,
    samples_sha256: str = "",
    provider: str = "cpu",
    custom_ops: Sequence[str] = (),
    memory: int | None = None,
    threads: int | None = None,
    checkpoint: Checkpoint | None = None,
    shard: tuple[int, int] = (0, 1),
    on_progress: Progress | None = None,
) -> CalibrationTable:
    """Run the float model on every sample and count the values of the plan's activation points.

    Args:
        model: the prepared model that the plan was made for.
        plan: names the tensors.
        samples: input name -> array; shapes may differ. Read one at a time; several times where the tensors do not fit
            the budget, else once (and the first sample twice).
        samples_sha256: identifies the samples in the table; "" has it computed.
        provider: ONNX Runtime provider, "cpu" or "cuda".
        custom_ops: ONNX Runtime custom operator libraries.
        memory: bytes for activations; see `footprint.passes`.
        threads: samples at a time at most; None for one per core, as far as the budget allows.
        checkpoint: to go on from and to write to; the caller removes it once the table is written.
        shard: (i, n) where these samples are every n-th of all from the i-th on, so that messages count them right.
        on_progress: called with (samples done, samples in all or None, text); the text names the pass if there are
            several.

    Returns:
        The table, independent of the samples' order.

    Raises:
        InputError: no samples, samples that differ between passes, or a tensor that is empty, NaN or infinite inside
            the model.
        StaleFileError: the plan or the checkpoint belongs to something else.
    """
    plan.check(model)
    names = list(dict.fromkeys(p.tensor for p in plan.activations))
    parts = checkpoint.load() if checkpoint else ()
    known = {name for part in parts for name in part.tensors}
    first, samples = _first(samples)
    layout = passes(model, [n for n in names if n not in known] or names, first, memory=memory, threads=threads)
    groups = [tuple(part.tensors) for part in parts] + [g for g in layout.groups if not known.issuperset(g) or not g]
    tables: list[CalibrationTable] = []
    for number, group in enumerate(groups):
        start = parts[number] if number < len(parts) else _empty(model)
        if number + 1 < len(parts):  # only the last one that a checkpoint holds may be incomplete
            tables.append(start)
            continue
        found = _one_pass(
            Tap(model, group, provider=provider, custom_ops=custom_ops, threads=1),
            samples,
            start,
            threads=layout.threads,
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
    return replace(
        tables[0],
        samples_sha256=samples_sha256 or samples_digest(tables[0].samples),
        tensors={name: h for table in tables for name, h in table.tensors.items()},
    )


def _one_pass(
    tap: Tap,
    samples: Iterable[Sample],
    start: CalibrationTable,
    *,
    threads: int,
    label: str,
    before: Sequence[CalibrationTable],
    checkpoint: Checkpoint | None,
    shard: tuple[int, int],
    on_progress: Progress | None,
) -> CalibrationTable:
    """The table of one group of tensors; samples that `start` holds are not run again."""
    total = length(samples)
    table, held = start, Counter(start.samples)
    lock = threading.Lock()

    def look(numbered: tuple[int, Sample]) -> CalibrationTable | None:
        index, sample = numbered
        digest = sample_sha256(sample)
        with lock:
            if held[digest]:
                held[digest] -= 1
                return None
        tensors = {}
        values = tap(sample)
        while values:
            name, array = values.popitem()
            try:
                tensors[name] = Histogram.of(array)
            except ValueError as error:
                where = f"Sample {shard[0] + index * shard[1]} makes tensor {name!r} of the float model hold {error}"
                raise InputError(
                    f"{where}: calibration needs finite values. Check the sample and how it was normalised, or exclude "
                    "the nodes that read the tensor."
                ) from None
        return replace(start, count=1, tensors=tensors, samples=(digest,))

    for done, seen in enumerate(overlapped(look, counted(samples), threads), 1):
        if seen is not None:
            table = merged([table, seen]) if table.count else seen
            if checkpoint is not None and checkpoint.due:
                checkpoint.write([*before, table])
        if on_progress is not None:
            on_progress(done, total, label)
    if held.total():
        raise StaleFileError(
            f"The unfinished calibration holds {held.total()} samples that are not among those given now. Delete its "
            "checkpoint to begin anew."
        )
    return table


def _empty(model: Model) -> CalibrationTable:
    return CalibrationTable(model_sha256=model.sha256, samples_sha256="", count=0, tensors={})


def _first(samples: Iterable[Sample]) -> tuple[Sample, Iterable[Sample]]:
    """The first sample, and all of them.

    Raises:
        InputError: there is none.
    """
    iterator = iter(samples)
    _, first = next(counted(iterator))
    return first, itertools.chain([first], iterator) if iterator is samples else samples


def sample_sha256(sample: Sample) -> str:
    """SHA-256 of one sample's input names, dtypes, shapes and values, as `calib_data` has it."""
    digest = hashlib.sha256()
    for name, array in sorted(sample.items()):
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.asarray(little_endian, order="C").data)
    return digest.hexdigest()


def key(
    model: Model, plan: Plan, samples_sha256: str, *, provider: str = "cpu", custom_ops: Sequence[str] = ()
) -> dict[str, object]:
    """What a table depends on: for a `Checkpoint`."""
    from importlib.metadata import PackageNotFoundError, version

    runtimes = {}
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            runtimes[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "model": model.sha256,
        "plan": plan.sha256,
        "samples": samples_sha256,
        "provider": provider,
        "custom operators": sorted(map(str, custom_ops)),
        "bins": BINS,
        "runtime": runtimes,
    }
