"""Example inputs for a module whose factory gives none: the first sample of the data, or values of given shapes.

data, names of `forward` -> `of_data` -> candidates, the likeliest first -> whoever runs them takes the first that runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from calib_data import DataError, InputSpec, open_samples
from calib_data.elements import Elements, as_array, named
from calib_data.sources import Form, ImageForm, form_of
from calib_data.validation import NUMERIC
from qdq.core.errors import InputError

Example = Mapping[str, np.ndarray]
LABELS = ("label", "labels", "target", "targets")  # that a forward takes to compute a loss, which no engine does
RANKS = range(6, 0, -1)  # of an array without a name


def of_data(data: str, volume: Any, needed: Sequence[str], accepted: Collection[str] | None) -> Iterator[Example]:
    """Candidates from the first sample of a source.

    Args:
        data: text of --data.
        volume: recipe's block where data are images.
        needed: names that `forward` must get, in order.
        accepted: all names that it takes; None for any.

    Raises:
        DataError: the source cannot be read.
        InputError: no name fits.
    """
    form = form_of(data)
    if isinstance(form, ImageForm):
        rank = len(volume.axes if volume else "cxyz") + 1
        spec = InputSpec(name=needed[0] if needed else "input", dtype="float32", shape=(None,) * rank)
        yield from islice(iter(open_samples(data, [spec], volume=volume)), 1)
        return
    first, item = _first(form, data, needed or ["input"])
    fitting = {
        n: a for n, a in first.items() if n in needed or ((accepted is None or n in accepted) and n not in LABELS)
    }
    if not fitting:
        raise InputError(
            f"The first sample of {data} has {', '.join(map(repr, first)) or 'no values'}, and the module's forward "
            f"takes {', '.join(map(repr, accepted or needed))}. Give samples under these names, or example inputs: a "
            "factory that returns (module, example_inputs)."
        )
    batched = {name: array[None] for name, array in fitting.items()}
    yield from (batched, fitting) if item else (fitting, batched)


def of_shapes(shapes: Mapping[str, Sequence[int]]) -> Iterator[Example]:
    """Random values of given shapes: floats, and then whole numbers, 0 and 1, as of tokens or masks."""
    rng = np.random.default_rng(0)
    yield {name: rng.normal(size=tuple(shape)).astype(np.float32) for name, shape in shapes.items()}
    yield {name: rng.integers(0, 2, tuple(shape)) for name, shape in shapes.items()}


def _first(form: Form, data: str, needed: Sequence[str]) -> tuple[dict[str, np.ndarray], bool]:
    """The arrays of the first sample by name, and whether they rather are an item without a batch axis.

    Names of files and the like, which lie beside them in many samples, are no example of an input.
    """
    arrays = {name: a for name, a in form.arrays(data).items() if a.dtype.kind in NUMERIC}
    if arrays:
        specs = [InputSpec(name=n, dtype=str(a.dtype), shape=(None,) * len(a.shape)) for n, a in arrays.items()]
        source = form.open(data, specs)
    else:
        source = _unnamed(form, data, needed[0])
    if isinstance(source, Elements):
        element = source.first()
        values, _ = named(element, list(arrays) or needed, data)
        return {n: as_array(v, n, data) for n, v in values.items()}, source.reading.items
    found = [dict(sample.arrays) for sample in islice(source.read(range(1)), 1)]
    return found[0] if found else {}, bool(arrays) and data.endswith(".npz")


def _unnamed(form: Form, data: str, name: str) -> Any:
    """The source of arrays without a name, or of tuples; of the highest rank that it can have."""
    for rank in RANKS:
        try:
            source = form.open(data, [InputSpec(name=name, dtype="float32", shape=(None,) * rank)])
            if not isinstance(source, Elements):
                next(source.read(range(1)), None)
            return source
        except DataError:
            if rank == RANKS[-1]:
                raise
    raise AssertionError("the last rank gives a source or raises")
