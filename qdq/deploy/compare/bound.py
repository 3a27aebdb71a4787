"""What `--min-metric` asks of a plan: a metric of `compare`, against labels or the float model, or a user's function.

NAME=VALUE, model, first sample -> `Bound`, whose counting takes samples with both models' outputs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calib_data.sources.function import function_of
from calib_data.users_code import users_code
from engines.verify.meaning import FirstSample, meanings
from qdq.assemble.held_out import comparable
from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import METRICS, Metric, metric, next_tokens
from qdq.deploy.compare.task import Task
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.tune.sensitivity.mixed.goal import Bound, Counting

Outputs = Mapping[str, np.ndarray]
NEEDED = "a function of three mappings, outputs, the float model's outputs and the sample, that gives a finite number"
MEND = "It must give a finite number and not end Python. Mend it."


def bounds(
    wanted: Mapping[str, float], model: Model, first: Sample, labels: str = "", class_axis: int | None = None
) -> tuple[Bound, ...]:
    """Of each metric that must reach a value, how it is counted.

    Args:
        wanted: a metric's name, or FILE.py:FUNCTION, -> value.
        model: the prepared float model; metrics are of its first output of numbers.
        first: a sample; each metric counts the float model's outputs for it, so that one that fails does so here.
        labels: as of `Task`; "" compares with the float model.
        class_axis: axis of the classes; None is what the graph and the outputs tell.

    Raises:
        InputError: an unknown metric, one of whole volumes or of masked tokens, a model without such an output, labels
            that it lacks, or what `Metric.add` says of the sample.
        DataError: a file of a function that is missing or cannot be imported, or a function that fails.
    """
    if not wanted:
        return ()
    if not (outputs := comparable(model)):
        raise InputError(f"--min-metric {next(iter(wanted))} needs an output of numbers, and the model has none.")
    fed = {each.name: first[each.name] for each in model.inputs}
    seen = FirstSample(
        inputs={key: np.shape(array) for key, array in fed.items()},
        outputs=Session(model, outputs, threads=1)(fed),
    )
    found = tuple(_bound(name, value, model, first, seen, labels, class_axis) for name, value in wanted.items())
    for each in found:
        each.counting().add(first, seen.outputs, seen.outputs)
    return found


def _bound(
    name: str,
    value: float,
    model: Model,
    first: Sample,
    seen: FirstSample,
    labels: str,
    class_axis: int | None,
) -> Bound:
    if ".py:" in name:
        function, path = function_of(name, of=f"--min-metric {name}", needed=NEEDED, fix=MEND)
        of_function = partial(_OfFunction, function, name, path)
        return Bound(name=name, value=value, higher_is_better=True, counting=of_function)
    known = [each for each, kind in METRICS.items() if not (kind.of_volumes or kind.masks)]
    kind = METRICS[choose(name, known, "metric")]
    output = next(iter(seen.outputs))
    task = Task(metric=name, labels=labels)
    tokens, axis = task.source(model), -1
    if task.array and task.array not in first:
        raise InputError(
            f"--min-metric {name} is scored against labels {task.array!r}, and the samples hold {', '.join(first)}. "
            "Save the labels beside the inputs, or leave out --metric-labels to compare with the float model."
        )
    if kind.has_classes:
        meant = meanings(model.proto, seen, task="classification", class_axis=class_axis)[output]
        axis = -1 if meant.axis is None else meant.axis
    counting = partial(_OfOutput.of, task, tokens, output, axis)
    return Bound(name=name, value=value, higher_is_better=kind.higher_is_better, counting=counting)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfOutput(Counting):
    """A metric of `compare`."""

    metric: Metric
    output: str
    array: str
    tokens: str

    @classmethod
    def of(cls, task: Task, tokens: str, output: str, axis: int) -> _OfOutput:
        return cls(metric=metric(task.metric, axis=axis), output=output, array=task.array, tokens=tokens)

    def add(self, sample: Sample, found: Outputs, expected: Outputs) -> None:
        labels = next_tokens(sample[self.tokens]) if self.tokens else sample[self.array] if self.array else None
        if labels is not None or found[self.output].shape == expected[self.output].shape:
            self.metric.add(found[self.output], expected[self.output], labels)

    @property
    def value(self) -> float:
        return self.metric.value


class _OfFunction(Counting):
    """The mean over samples of what a function says of outputs, the float model's outputs, and the sample."""

    def __init__(self, function: Callable[..., Any], name: str, path: Path) -> None:
        self._function, self._name, self._path = function, name, path
        self._values: list[float] = []

    def add(self, sample: Sample, found: Outputs, expected: Outputs) -> None:
        with users_code(self._path, f"--min-metric {self._name} failed", MEND):
            value = self._function(*map(_shown, (found, expected, sample)))
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"--min-metric {self._name} gave {value!r}: it must be {NEEDED}.")
        self._values.append(number)

    @property
    def value(self) -> float:
        return math.fsum(self._values) / len(self._values) if self._values else math.nan


def _shown(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Views that cannot be written to: the float model's outputs are kept for other plans, samples for other passes."""
    found = {name: np.asarray(array).view() for name, array in arrays.items()}
    for view in found.values():
        view.flags.writeable = False
    return found
