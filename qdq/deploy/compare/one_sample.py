"""A metric of one sample at a time, against the float model: what `qdq sensitivity` has beside the noise.

name + first sample -> the output and axis that it is of -> `value_of`, bound to them, which a process can be given
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from engines.verify.meaning import FirstSample, meanings
from qdq.assemble.held_out import comparable
from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import METRICS, metric
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.tune.sensitivity.find import Metric


def names() -> Sequence[str]:
    """The metrics that can be told of one sample without labels."""
    return [n for n, kind in METRICS.items() if not (kind.needs_labels or kind.of_volumes or kind.masks)]


def of_samples(name: str, model: Model, first: Sample) -> Metric:
    """A metric of the first output of numbers.

    Args:
        name: one of `names`.
        model: the prepared float model.
        first: a sample, whose outputs tell the axis of classes.

    Raises:
        InputError: an unknown metric, or a model without such an output.
    """
    choose(name, names(), "metric")
    outputs = comparable(model)
    if not outputs:
        raise InputError(f"--metric {name} needs an output of numbers, and the model has none.")
    of, axis = outputs[0], -1
    if METRICS[name].has_classes:
        found = Session(model, [of], threads=1)(first)
        seen = FirstSample(inputs={key: np.shape(value) for key, value in first.items()}, outputs=found)
        meant = meanings(model.proto, seen, task="classification")[of]
        axis = -1 if meant.axis is None else meant.axis
    return Metric(name=name, value=partial(value_of, name, of, axis))


def value_of(
    name: str, output: str, axis: int, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> float:
    """A metric of one sample."""
    counting = metric(name, axis=axis)
    counting.add(found[output], expected[output], None)
    return counting.value
