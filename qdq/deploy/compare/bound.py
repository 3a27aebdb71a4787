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


def bounds(wanted: Mapping[str, float], model: Model, first: Sample, labels: str = "") -> tuple[Bound, ...]:
    """Of each metric that must reach a value, how it is counted.

    Args:
        wanted: a metric's name, or FILE.py:FUNCTION, -> value.
        model: the prepared float model; metrics are of its first output of numbers.
        first: a sample, whose outputs tell the axis of classes.
        labels: as of `Task`; "" compares with the float model.

    Raises:
        InputError: an unknown metric, one of whole volumes, a model without such an output, or labels that it lacks.
        DataError: a file of a function that is missing or cannot be imported.
    """
    return tuple(_bound(name, value, model, first, labels) for name, value in wanted.items())


def _bound(name: str, value: float, model: Model, first: Sample, labels: str) -> Bound:
    if ".py:" in name:
        function, path = function_of(name)
        of_function = partial(_OfFunction, function, name, path)
        return Bound(name=name, value=value, higher_is_better=True, counting=of_function)
    known = [each for each, kind in METRICS.items() if not kind.of_volumes]
    kind = METRICS[choose(name, known, "metric")]
    outputs = comparable(model)
    if not outputs:
        raise InputError(f"--min-metric {name} needs an output of numbers, and the model has none.")
    task = Task(metric=name, labels=labels)
    tokens, axis = task.source(model), -1
    if task.array and task.array not in first:
        raise InputError(
            f"--min-metric {name} is scored against labels {task.array!r}, and the samples hold {', '.join(first)}. "
            "Save the labels beside the inputs, or leave out --labels to compare with the float model."
        )
    if kind.has_classes:
        fed = {each.name: first[each.name] for each in model.inputs}
        seen = FirstSample(
            inputs={key: np.shape(array) for key, array in fed.items()},
            outputs=Session(model, outputs[:1], threads=1)(fed),
        )
        meant = meanings(model.proto, seen, task="classification")[outputs[0]]
        axis = -1 if meant.axis is None else meant.axis
    counting = partial(_OfOutput.of, task, tokens, outputs[0], axis)
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
        with users_code(self._path, f"--min-metric {self._name} failed"):
            value = self._function(dict(found), dict(expected), dict(sample))
        try:
            self._values.append(float(value))
        except (TypeError, ValueError):
            raise InputError(
                f"--min-metric {self._name} gave {value!r}: it must give a number of three mappings: the outputs, the "
                "float model's outputs, and the sample's arrays."
            ) from None

    @property
    def value(self) -> float:
        return math.fsum(self._values) / len(self._values) if self._values else math.nan
