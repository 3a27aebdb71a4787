"""What a model takes, and samples checked against it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from calib_data import DataError, InputSpec, Samples
from calib_data.sources.function import PythonFunction
from qdq.core.errors import ModelError
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model


def input_specs(model: Model) -> tuple[InputSpec, ...]:
    """What a sample of the model must hold.

    Raises:
        ModelError: an input is no tensor of known rank.
        DataError: an input has a type that samples cannot have.
    """
    for info in model.inputs:
        if info.shape is None:
            raise ModelError(
                f"Input {info.name!r} of the model has no known rank, so no sample can be checked against it. "
                "Export the model with a rank for every input; dimensions may be dynamic."
            )
    return tuple(InputSpec(name=i.name, dtype=i.dtype, shape=i.shape or ()) for i in model.inputs)


def as_samples(samples: Iterable[Sample], model: Model) -> Samples:
    """Samples that are checked as they are read, from those of `calib_data` or from any list of dicts.

    Raises:
        DataError: an iterator that can be read only once.
    """
    if isinstance(samples, Samples):
        return samples
    if isinstance(samples, Iterator):
        raise DataError(
            "The samples are an iterator, which can be read only once. Give a list, or calib_data's Samples."
        )
    held = list(samples)
    source = PythonFunction(where="samples in memory", function=lambda: held, count=len(held))
    return Samples(inputs=input_specs(model), source=source, indices=range(len(held)), origin="memory")
