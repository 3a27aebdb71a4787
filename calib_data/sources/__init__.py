"""Where samples come from: one file per form of `--data`, found by itself; each defines `FORM`.

Flow: ``form_of`` asks each form whether a path is its own -> Form.open -> Source.read(indices) yields (where, arrays)
for those samples only -> Samples checks each. Source.shapes(indices) tells their shapes, from file headers if possible.
A source must not check values against the model, nor hold more than one sample.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from calib_data.validation import Array, DataError, InputSpec
from calib_data.volumes.case import Cases


class RawSample(NamedTuple):
    """One sample as read, not yet checked; ``where`` names it in messages."""

    where: str
    arrays: Mapping[str, Array]


class SampleShapes(NamedTuple):
    """The shape of each array of one sample."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]


class Source(Protocol):
    """Samples in a fixed order; ``count`` is None where only reading tells. ``read`` starts afresh at each call."""

    @property
    def count(self) -> int | None:
        """Number of samples."""

    def read(self, indices: range) -> Iterator[RawSample]:
        """Yield the samples at these ascending indices; indices beyond the last sample are ignored."""

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """Yield the shapes of the same samples, without reading values where the form allows."""


class ArrayForm(NamedTuple):
    """Shape and dtype of an array of one sample."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form of DATA.

    Attributes:
        says: what the user gives, for messages and help: "a folder of .npz or .npy files".
        owns: whether a text is of this form; looks at names, and at files only as far as it must.
        open: the source of a text that it owns, for a model's inputs.
        arrays: name -> shape and dtype of each array of one sample of such a text, whatever a model's inputs are; none
            where they have no names.
        last: asked only where no other form owns the text, for it takes what others may know better.

    `open` and `arrays` raise DataError where what is there is no sample, or does not fit.
    """

    says: str
    owns: Callable[[str], bool]
    open: Callable[[str, Sequence[InputSpec]], Source]
    arrays: Callable[[str], Mapping[str, ArrayForm]]
    last: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageForm:
    """One form of DATA that holds images, which a recipe's `volume:` turns into samples (`calib_data.volumes`).

    Attributes:
        says, owns, last: as of `Form`.
        cases: the images of a text that it owns.
    """

    says: str
    owns: Callable[[str], bool]
    cases: Callable[[str], Cases]
    last: bool = False


def forms() -> list[Form | ImageForm]:
    """Every form, in the order in which they are asked."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found: list[Form | ImageForm] = [importlib.import_module(f"{__name__}.{name}").FORM for name in names]
    return sorted(found, key=lambda form: form.last)


def listed() -> str:
    """The forms of DATA in words."""
    *some, last = (form.says for form in forms())
    return f"{', '.join(some)}, or {last}"


def form_of(source: str) -> Form | ImageForm:
    """The form that owns a text.

    Raises:
        DataError: none does.
    """
    if form := next((form for form in forms() if form.owns(source)), None):
        return form
    raise DataError(
        f"{'Cannot read' if Path(source).exists() else 'No such file or folder:'} {source}. Samples are {listed()}. "
        "Check the path, or convert the data."
    )
