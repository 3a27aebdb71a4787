"""Sizes in which samples differ: what an export leaves open where nobody says what stays open.

example by name, samples -> `differing` -> `Sizes`: the axes with a name each, and which samples show them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from calib_data import DataError, Samples
from qdq.core.errors import InputError, ModelError
from qdq.frontend.exported import Dynamic
from qdq.measure.inference.inputs import as_samples
from qdq.model.model import Model

Given = Iterable[Any] | Callable[[Model], Samples]
MOST = 64  # samples whose sizes are looked at
COMPARED = 4  # samples on which a file is compared, and those of the smallest and the largest sizes
WORDS: Mapping[tuple[int, int], str] = {  # rank, axis -> what the size is usually called
    (2, 1): "length",
    (3, 1): "length",
    (4, 2): "height",
    (4, 3): "width",
    (5, 2): "depth",
    (5, 3): "height",
    (5, 4): "width",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Where samples differ from each other or from the example, behind the batch.

    Attributes:
        axes: input -> axis -> name.
        ranges: input -> axis -> smallest and largest size.
        shown: indices of a sample of the smallest and of the largest sizes.
    """

    axes: Dynamic = field(default_factory=dict)
    ranges: Mapping[str, Mapping[int, tuple[int, int]]] = field(default_factory=dict)
    shown: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.axes)

    @property
    def text(self) -> str:
        """All axes with their ranges: "image axis 2 (24 to 40) and axis 3 (32 to 48)"."""
        return "; ".join(
            f"{name} {' and '.join(f'axis {axis} ({low} to {high})' for axis, (low, high) in each.items())}"
            for name, each in self.ranges.items()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person must know."""
        words = dict.fromkeys(word for each in self.axes.values() for word in each.values())
        return (f"Open, for the samples differ there: {self.text}, as {', '.join(words)}.",) if words else ()

    def without(self, others: Dynamic) -> Sizes:
        """Those that are in no others."""

        def left(held: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, Any]]:
            kept = {n: {a: v for a, v in each.items() if a not in others.get(n, {})} for n, each in held.items()}
            return {name: each for name, each in kept.items() if each}

        return Sizes(axes=left(self.axes), ranges=left(self.ranges), shown=self.shown)

    def with_batch(self, batch: Dynamic) -> dict[str, dict[int, str]]:
        """These axes and others."""
        return {name: {**batch.get(name, {}), **self.axes.get(name, {})} for name in {**batch, **self.axes}}

    def chosen(self, samples: Samples) -> Iterator[Mapping[str, np.ndarray]]:
        """The first samples, and those that show the sizes."""
        last = [i for i in self.shown if i >= COMPARED]
        others = (replace(samples, indices=samples.indices[i : i + 1]) for i in last)
        return chain(islice(samples, COMPARED), chain.from_iterable(others))


def differing(samples: Given, example: Mapping[str, np.ndarray], batched: Mapping[str, Mapping[int, str]]) -> Sizes:
    """Look at the shapes of the first samples.

    Args:
        samples: what `quantize` takes, or a function that opens them for a model; empty for none.
        example: of a module that has not been exported yet.
        batched: input -> axes that are not looked at.
    """
    if samples == ():
        return Sizes()
    model = _stand_in(example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is left out is said when they are opened for the file
            opened = samples(model) if callable(samples) else as_samples(samples, model)
            if not isinstance(opened, Samples):  # of a caller's own, which tells no sizes
                return Sizes()
            shapes = [found.shapes for found in opened.source.shapes(opened.indices[:MOST])]
    except (DataError, InputError, ModelError):  # said by whoever opens them for the file
        return Sizes()
    every = [{name: array.shape for name, array in example.items()}, *shapes]
    if any(len(each.get(name, ())) != array.ndim for each in every for name, array in example.items()):
        return Sizes()
    found = {
        (name, axis): sizes
        for name, array in example.items()
        for axis in range(array.ndim)
        if axis not in batched.get(name, {}) and len(set(sizes := tuple(int(each[name][axis]) for each in every))) > 1
    }
    if not found:
        return Sizes()
    volumes = [math.prod(each[name][axis] for name, axis in found) for each in shapes]
    return Sizes(
        axes=_named(found, {name: array.ndim for name, array in example.items()}),
        ranges=_by_input({key: (min(sizes), max(sizes)) for key, sizes in found.items()}),
        shown=tuple(sorted({int(np.argmin(volumes)), int(np.argmax(volumes))})),
    )


def options(axes: Dynamic) -> str:
    """The option that leaves these sizes open."""
    texts = (
        f"{name}:{','.join(f'{axis}={word}' for axis, word in sorted(each.items()))}" for name, each in axes.items()
    )
    return " ".join(f"--dynamic {text}" for text in texts)


def _named(found: Mapping[tuple[str, int], tuple[int, ...]], ranks: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """A name for each axis; those of several inputs that always have one size share it."""
    words: dict[tuple[int, tuple[int, ...]], str] = {}
    made = {}
    for (name, axis), sizes in found.items():
        if (axis, sizes) not in words:
            usual = WORDS.get((ranks[name], axis), f"{name}_{axis}")
            words[axis, sizes] = f"{name}_{axis}" if usual in words.values() else usual
        made[name, axis] = words[axis, sizes]
    return _by_input(made)


def _by_input(values: Mapping[tuple[str, int], Any]) -> dict[str, dict[int, Any]]:
    made: dict[str, dict[int, Any]] = {}
    for (name, axis), value in values.items():
        made.setdefault(name, {})[axis] = value
    return made


def _stand_in(example: Mapping[str, np.ndarray]) -> Model:
    """A model of the example's inputs in any size, as far as opening samples asks for one."""
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in example.items()
    ]
    graph = helper.make_graph([], "sizes", infos, [])
    return Model(proto=helper.make_model(graph), directory=Path(), sha256="")
