"""The whole job: candidates planned, one table measured for all of them, trials run, the sensitivity of the model.

model + samples -> `Candidates` -> calibration table -> `Runner`, here or on a pool -> `sensitivity`
What is done of an unfinished table lies beside the output, and the same command goes on with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib_data import Samples
from engines.core.errors import EngineError
from qdq.assemble.tables import measured
from qdq.core.disk.cache import program, remembered
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.core.resources import given_bytes
from qdq.measure.collect import collect
from qdq.measure.inference.kept import seen
from qdq.measure.inference.samples import sample_sha256
from qdq.measure.shards import Pool, Sharded, collect_shards
from qdq.measure.table import CalibrationTable, samples_digest
from qdq.model.as_bytes import identity
from qdq.model.model import Model
from qdq.plan.choice import FLOAT, choice
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.measure import sensitivity
from qdq.tune.sensitivity.run import Job, Runner, here, on_pool
from qdq.tune.sensitivity.table import Sensitivity
from qdq.tune.sensitivity.unit import Value

USUAL = ("int8", "fp8", "w4a8", "int4", FLOAT)  # candidates, of which those are taken that all targets have


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric beside the noise: its name, and what computes it of one sample; picklable for a pool."""

    name: str
    value: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Where trials run, and what opens the samples there."""

    pool: Pool
    source: Callable[[], Sharded]


def beside(output: Path) -> Path:
    """The file that keeps what is done of an unfinished table."""
    return output.with_name(f".{output.name}.checkpoint")


def possible(settings: Settings, targets: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """The candidates to measure.

    Args:
        settings: say the compiler.
        targets: that all of them must run on.
        texts: as asked for; none takes those of USUAL that the compiler and every target have kernels for.

    Raises:
        EngineError: the compiler, or a target, has no kernels for one that was asked for.
        InputError: an unknown one.
    """
    found = []
    for text in texts or USUAL:
        row = choice(text).row
        formats = {f for f in (row.data, row.weight, row.compute_format, row.convolution) if f}
        try:
            settings.profile.require_formats(formats, targets)
        except EngineError:
            if texts:
                raise
            continue
        found.append(text)
    return tuple(found)


def find(
    model_path: Path,
    prepared: Model,
    samples: Samples,
    *,
    settings: Settings,
    texts: Sequence[str],
    unquantized_type: str = "auto",
    metric: Metric | None = None,
    workers: Workers | None = None,
    table: CalibrationTable | None = None,
    custom_ops: tuple[str, ...] = (),
    output: Path | None = None,
    on_progress: Progress | None = None,
) -> Sensitivity:
    """The error of each group of a model in each candidate at its outputs.

    Args:
        model_path: the float model's file, for workers.
        prepared: what was loaded of it.
        samples: that ranges are measured on, and outputs computed.
        settings: what candidates share; see `Candidates.of`, as for the two below.
        texts: candidates.
        unquantized_type: of the candidate `float`.
        metric: beside the noise.
        workers: a pool; None: this process.
        table: of `Candidates.measuring`, where it is measured already.
        custom_ops: paths of libraries for ONNX Runtime.
        output: file that the table will be written to: what is done so far is kept beside it until it is.

    Raises:
        InputError: see `Candidates.of`, `sensitivity`.
        StaleFileError: an unfinished table of something else lies beside the output.
    """
    candidates = Candidates.of(prepared, settings, texts, unquantized_type)
    if not candidates.groups:
        raise InputError(f"Nothing to measure: no candidate quantizes anything. {candidates.measuring.why_nothing}")
    decided = (settings.to_mapping(), candidates.texts, candidates.unquantized_type, metric and metric.name)

    def make() -> Sensitivity:
        ranges = table or _table(model_path, candidates, samples, workers, custom_ops, on_progress)
        hashes = [sample_sha256(sample) for sample in samples]
        value = metric.value if metric else None
        if workers is None:
            units = here(candidates, ranges, samples, value=value)
        else:
            job = Job(
                model_path=model_path.absolute(),
                settings=settings,
                texts=candidates.texts,
                unquantized_type=candidates.unquantized_type,
                table=ranges,
                source=workers.source,
                value=value,
                custom_ops=custom_ops,
                memory=given_bytes(),
            )
            units = on_pool(job, workers.pool, len(hashes))
        key = {
            "model": prepared.sha256,
            "samples": samples_digest(hashes),
            "order of samples": _digest(hashes),
            "settings": _digest(decided),
            "program": program(),
        }
        runner = Runner(units=units, path=beside(output) if output else None, key=key, on_progress=on_progress)
        return sensitivity(candidates, runner, hashes, metric=metric.name if metric else "")

    return remembered(
        "sensitivity",
        lambda: (*identity(prepared), *seen(samples), decided),
        make,
        pack=lambda made: {"table": made.to_json().encode()},
        unpack=lambda parts: Sensitivity.from_json(parts["table"]),
    )


def _table(
    model_path: Path,
    candidates: Candidates,
    samples: Samples,
    workers: Workers | None,
    custom_ops: tuple[str, ...],
    on_progress: Progress | None,
) -> CalibrationTable:
    def collected(plan: Plan, progress: Progress | None) -> CalibrationTable:
        if workers is None:
            return collect(candidates.model, plan, samples, custom_ops=custom_ops, on_progress=progress)
        return collect_shards(
            model_path,
            plan,
            workers.source,
            workers.pool,
            total=samples.len_or_none(),
            custom_ops=custom_ops,
            memory=given_bytes(),
            on_progress=progress,
        )

    return measured(candidates.model, candidates.measuring, samples, by=collected, on_progress=on_progress)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
