"""What a model takes, and samples checked against it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

from calib_data import InputSpec, Samples, Stream
from calib_data.elements import Elements
from calib_data.samples import BEYOND_ANY
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


def as_samples(samples: object, model: Model) -> Samples:
    """Samples that are checked as they are read, from what a user has in memory.

    What is not used of each element, such as labels, is said in a warning.

    Args:
        samples: those of `calib_data`; a `calib_data.Stream`; or what that takes as its source: a list of dicts, a
            DataLoader, a Dataset or another iterable.
        model: that takes them.

    Raises:
        DataError: it can be read only once, may be endless, or does not fit the model.
    """
    if isinstance(samples, Samples):
        return samples
    stream = samples if isinstance(samples, Stream) else Stream(samples)
    specs = input_specs(model)
    source = Elements.open(stream, specs, "samples in memory")
    if source.left_out:
        warnings.warn(source.left_out, stacklevel=2)
    count = stream.limit or BEYOND_ANY if source.count is None else source.count
    return Samples(inputs=specs, source=source, indices=range(count), origin="memory")


def read_anew(samples: Iterable[Sample], model: Model) -> Iterable[Sample]:
    """Samples as they are where they are dicts in a list, or an iterator of such; else as `as_samples` has them."""
    return samples if isinstance(samples, Samples | list | tuple | Iterator) else as_samples(samples, model)
