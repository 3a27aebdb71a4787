"""Weights rounded by other processes or machines: the same bytes, whoever computes them.

    with spread(pool, model file): ...   `solve` inside has the weights of a large model rounded by the pool's workers
    Task -> a worker, which reads its weight from the model file -> QTensor -> the store of the process that asked

A task holds the second moments of the weight's inputs, 8 bytes times the square of their number; the result one byte a
weight. As many tasks are on their way as `AHEAD` times the workers, so that neither grows with the model. A task whose
worker died is given to another. It must not choose scales of data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from qdq.core.arrays import Floats, Singles
from qdq.core.errors import InputError
from qdq.core.qtensor import QTensor
from qdq.measure.shards import Pool, each_of, prepared
from qdq.model.external import release
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.equalize.carriers import scaled
from qdq.solve.rounding import ROUNDINGS
from qdq.solve.trained import weight_codes
from qdq.solve.weights import quantize_weight

AHEAD = 2  # tasks on their way, for each worker

_HERE: ContextVar[Spread | None] = ContextVar("workers that round weights", default=None)
_FORMED: dict[tuple[Path, str], Model] = {}  # in a worker: the last model, in the form of its plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One weight.

    Attributes:
        reader: a node that multiplies by it.
        divisor: (channels,) what the node's data are divided by, or None.
        factor: (output channels,) what its output is multiplied by, or None.
        moments: (groups, columns, columns) of its inputs, or None.
    """

    reader: WeightedNode
    divisor: Singles | None
    factor: Floats | None
    moments: Floats | None


def rounded(model: Model, settings: Settings, task: Task) -> QTensor:
    """The codes and scales of a weight, by settings in which everything is decided."""
    reader, rounding = task.reader, settings.rounding
    values = scaled(model.array(reader.weight), reader, task.divisor, task.factor)
    if reader.trained and (own := weight_codes(model, reader, values)) is not None:
        return own
    if task.moments is None and ROUNDINGS[rounding].needs_moments:  # as well as can be without them
        rounding = "clip" if reader.spec.block else "nearest"
    made = quantize_weight(
        values,
        reader.spec,
        outputs=reader.output_axis,
        rounding=rounding,
        moments=task.moments,
        damping=settings.damping,
        act_order=settings.act_order,
    )
    release(values)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Where weights are rounded.

    Attributes:
        pool: its workers have this version of qdq, and see the model file under the same path.
        model_path: the float model's file.
    """

    pool: Pool
    model_path: Path

    def each(self, model: Model, plan: Plan, tasks: Sequence[Callable[[], Task]]) -> Iterator[tuple[int, QTensor]]:
        """Some weights by their index, as they come; a task is made when it is its turn.

        Raises:
            InputError: the workers died several times in a row, or have another version or model.
        """
        work = partial(_rounded, self.model_path, model.sha256, plan, version("qdq"))
        ahead = AHEAD * self.pool.workers
        yield from each_of(
            self.pool, work, range(len(tasks)), what="weights", told=lambda index: tasks[index](), ahead=ahead
        )


@contextmanager
def spread(pool: Pool | None, model_path: Path) -> Iterator[None]:
    """Every large model that is solved inside has its weights rounded by a pool; None changes nothing."""
    found = _HERE.get() if pool is None else Spread(pool=pool, model_path=model_path.absolute())
    token = _HERE.set(found)
    try:
        yield
    finally:
        _HERE.reset(token)


def workers() -> Spread | None:
    """Where `spread` says that weights are rounded; None for this process."""
    return _HERE.get()


def _rounded(path: Path, sha256: str, plan: Plan, made_by: str, task: Task) -> QTensor:
    """In a worker."""
    if version("qdq") != made_by:
        raise InputError(f"A worker has qdq {version('qdq')}, and {made_by} is needed: install the same version there.")
    if (key := (path, plan.sha256)) not in _FORMED:
        _FORMED.clear()
        _FORMED[key] = plan.form(prepared(path))
    model = _FORMED[key]
    if model.sha256 != sha256:
        raise InputError(f"A worker reads another model at {path}: it must see the same file under the same path.")
    return rounded(model, plan.settings, task)
