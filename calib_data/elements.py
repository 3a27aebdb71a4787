"""Samples of what a user's own Python gives: dicts by name, tuples by position, batches cut to the model's.

anything -> `reading.reading_of` -> elements -> names, arrays -> rows in the model's batch -> samples.
Must not convert values: `validation` does. What is left out of each element is said in `left_out`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calib_data.reading import Reading, reading_of
from calib_data.sources import RawSample, SampleShapes
from calib_data.users_code import ENDINGS, said, users_code
from calib_data.validation import Array, DataError, InputSpec

Hook = Callable[[Any], Any]

_LIMIT: ContextVar[int | None] = ContextVar("most samples of a source", default=None)


@contextmanager
def limiting(count: int) -> Iterator[None]:
    """Of every source that is opened meanwhile, the first samples only."""
    token = _LIMIT.set(count)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def limited_to() -> int | None:
    """How many samples of a source are used at most; None for all."""
    return _LIMIT.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Where samples in memory come from, and what is done to each: in place of them wherever samples are given.

        quantize("unet.onnx", Stream(loader, limit=64, preprocess=lambda batch: batch["image"] / 255))

    Attributes:
        source: a DataLoader, a Dataset, a datasets.Dataset, or any iterable.
        limit: most samples that are used; needed where the source can be read only once, or does not end.
        preprocess: element of the source -> dict, tuple or array that the model gets.
        collate: list of elements -> one sample with a batch axis; it gets as many as the model's batch has, 1 where
            that is open.
    """

    source: Any
    limit: int | None = None
    preprocess: Hook | None = None
    collate: Hook | None = None

    def __init__(
        self, source: Any, *, limit: int | None = None, preprocess: Hook | None = None, collate: Hook | None = None
    ) -> None:
        """See the class.

        Raises:
            DataError: the limit is below 1.
        """
        if limit is not None and limit < 1:
            raise DataError(f"Cannot use {limit} samples: at least one is needed. Raise the limit or omit it.")
        for name, value in (("source", source), ("limit", limit), ("preprocess", preprocess), ("collate", collate)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """A source of samples, of elements that are drawn in a fixed order.

    Attributes:
        where: what messages call it.
        inputs: of the model.
        reading: of the elements.
        stream: with the hooks.
        form: what is made of the first element.
        left_out: what is not used of each element, in sentences; "" where all is.
        path: file of the user's code, whose lines messages name; None where there is none.
    """

    where: str
    inputs: Sequence[InputSpec]
    reading: Reading
    stream: Stream
    form: Form
    left_out: str
    path: Path | None = None

    @classmethod
    def open(
        cls,
        stream: Stream,
        inputs: Sequence[InputSpec],
        where: str,
        reading: Reading | None = None,
        path: Path | None = None,
    ) -> Elements:
        """Look at the first element, which decides what a sample is.

        Args:
            stream: with the hooks.
            inputs: of the model.
            where: what messages call it.
            reading: of the stream's elements, where that is known.
            path: file of the user's code.

        Raises:
            DataError: there is none, it does not fit the inputs, or it is another each time.
        """
        with users_code(None, f"The samples of {where} cannot be read"):
            reading = reading or reading_of(stream.source, where, stream.limit)
        size = _batch_of(inputs)
        empty = Form(kind="whole", size=size, on_rows=frozenset())
        made = cls(where=where, inputs=inputs, reading=reading, stream=stream, form=empty, left_out="", path=path)
        first = made.first()
        if first is None:
            return made
        arrays, notes = made._named(first, f"{where}, sample 0")
        if reading.random_access:
            again, _ = made._named(made.first(), f"{where}, sample 0")
            if any(not _same(arrays[name], again[name]) for name in arrays):
                raise DataError(
                    f"{where} gives another sample 0 each time it is read: random augmentation is on. Samples must be "
                    "what the model gets at inference: use the transforms of evaluation."
                )
        form = _form(arrays, inputs, reading, collated=stream.collate is not None, where=where)
        if left := form.left(reading):
            notes.append(f"The last {left} rows are no whole batch of {form.size}: they are left out.")
        return dataclasses.replace(made, form=form, left_out=" ".join(notes))

    def first(self) -> Any:
        """The first element after the hooks; None where there is none."""
        return next(self._elements(range(self.form.size if self.stream.collate else 1)), None)

    @property
    def count(self) -> int | None:
        """Number of samples; None where only reading tells."""
        found = self.form.count(self.reading)
        limit = self.stream.limit
        return limit and min(found, limit) if found is not None and limit else found

    def read(self, indices: range) -> Iterator[RawSample]:
        """The samples at these ascending indices."""

        for i, arrays in self._samples(indices):
            if self.stream.limit is not None and i >= self.stream.limit:
                return
            yield RawSample(f"{self.where}, sample {i}", arrays)

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """Their shapes; there is no header to read."""

        for where, arrays in self.read(indices):
            yield SampleShapes(where, {name: array.shape for name, array in arrays.items()})

    def _samples(self, indices: range) -> Iterator[tuple[int, dict[str, Array]]]:
        if self.form.kind == "whole" and self.stream.collate is None:
            for i, element in self._drawn(indices):
                yield i, self._named(element, f"{self.where}, sample {i}")[0]
            return
        if self.form.kind == "item" and self.form.size == 1 and self.stream.collate is None:
            for i, element in self._drawn(indices):
                arrays = self._named(element, f"{self.where}, sample {i}")[0]
                yield i, {n: a[None] if n in self.form.on_rows else a for n, a in arrays.items()}
            return
        for i, sample in enumerate(self._grouped()):
            if i in indices:
                yield i, sample
            if indices and i >= indices[-1]:
                return

    def _grouped(self) -> Iterator[dict[str, Array]]:
        """All samples, whose rows are those of elements."""
        whole, form, held = range(1 << 40), self.form, []
        for number, element in enumerate(self._elements(whole)):
            arrays, _ = self._named(element, f"{self.where}, sample {number}")
            if form.kind == "whole":
                yield arrays
                continue
            for row in form.rows(arrays):
                held.append(row)
                if len(held) == form.size:
                    yield form.joined(held)
                    held = []

    def _elements(self, indices: range) -> Iterator[Any]:
        """Elements after the hooks: of a `collate`, those that it makes of the model's batch."""
        collate, held = self.stream.collate, []
        for _, element in self._drawn(indices):
            if collate is None:
                yield element
                continue
            held.append(element)
            if len(held) == self.form.size:
                with users_code(None, f"collate failed on {self.where}"):
                    made = collate(held)
                yield made
                held = []

    def _drawn(self, indices: range) -> Iterator[tuple[int, Any]]:
        """Elements after `preprocess`; whatever the user's code raises says where."""
        doing = f"The data source {self.where} failed"
        with users_code(self.path, doing):
            drawn = self.reading.draw(indices)
        while True:
            with users_code(self.path, doing):
                try:
                    i, element = next(drawn)
                except StopIteration:
                    return
            if self.stream.preprocess is not None:
                with users_code(None, f"preprocess failed on {self.where}, sample {i}"):
                    element = self.stream.preprocess(element)
            yield i, element

    def _named(self, element: object, where: str) -> tuple[dict[str, Array], list[str]]:
        values, notes = named(element, [spec.name for spec in self.inputs], where)
        return {name: as_array(value, name, where) for name, value in values.items()}, notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What elements are to the model.

    Attributes:
        kind: whole: samples; item: samples without the batch axis; batch: rows of samples; cut: samples along one
            more axis.
        size: rows of a sample.
        on_rows: inputs that have rows; the others are the same for all rows of an element.
    """

    kind: str
    size: int
    on_rows: frozenset[str]

    def rows(self, arrays: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        """The rows of an element, each with its axis; of `cut` whole samples."""
        if self.kind == "item":
            yield {n: a[None] if n in self.on_rows else a for n, a in arrays.items()}
            return
        count = min(arrays[name].shape[0] for name in self.on_rows)
        for i in range(count):
            at: Any = i if self.kind == "cut" else slice(i, i + 1)
            yield {n: a[at] if n in self.on_rows else a for n, a in arrays.items()}

    def joined(self, rows: Sequence[dict[str, Array]]) -> dict[str, Array]:
        """A sample of rows."""
        if len(rows) == 1:
            return rows[0]
        return {n: np.concatenate([row[n] for row in rows]) if n in self.on_rows else a for n, a in rows[0].items()}

    def count(self, reading: Reading) -> int | None:
        """How many samples there are; None where only reading tells."""
        if self.kind == "whole":
            return reading.count
        total = reading.count if self.kind == "item" else sum(reading.rows) if reading.rows else None
        return None if total is None else total // self.size

    def left(self, reading: Reading) -> int:
        """How many rows fill no sample, as far as that is known."""
        total = reading.count if self.kind == "item" else sum(reading.rows)
        return (total or 0) % self.size if self.kind != "whole" else 0


def named(element: object, names: Sequence[str], where: str) -> tuple[dict[str, Any], list[str]]:
    """The values of an element by the names of a model's inputs, and notes of what is left out.

    Args:
        element: a mapping or dataclass by name, a tuple or list by position, or the value of a single input.
        names: of the inputs.
        where: what messages call it.

    Raises:
        DataError: it has too few values, or is one value for several inputs.
    """
    if dataclasses.is_dataclass(element) and not isinstance(element, type | Mapping):
        element = {f.name: getattr(element, f.name) for f in dataclasses.fields(element)}
    elif hasattr(element, "_fields") and set(names) <= set(element._fields):
        element = element._asdict()  # type: ignore[attr-defined]
    elif not isinstance(element, Mapping) and callable(getattr(element, "keys", None)):
        element = {key: element[key] for key in element.keys()}  # type: ignore[attr-defined, index]  # noqa: SIM118
    if isinstance(element, Mapping):
        found = {str(key): value for key, value in element.items()}
        if set(names) <= found.keys():
            extra = [key for key in found if key not in names]
            note = [f"Not used of each sample, for the model has no such input: {', '.join(map(repr, extra))}."]
            return {name: found[name] for name in names}, note if extra else []
        return found, []  # whose names are refused when the sample is checked
    if isinstance(element, tuple | list) and element and not all(isinstance(v, int | float | bool) for v in element):
        if isinstance(element[0], Mapping) or (
            len(names) > 1 and isinstance(element[0], tuple | list) and len(element[0]) >= len(names)
        ):
            values, notes = named(element[0], names, where)
            return values, [*notes, *_behind(element, 1)]
        if len(element) < len(names):
            raise DataError(
                f"{where} has {len(element)} values and the model {len(names)} inputs: {', '.join(names)}. Give a "
                "value for each, in this order, or a dict by name."
            )
        return dict(zip(names, element, strict=False)), _behind(element, len(names))
    if len(names) != 1:
        raise DataError(
            f"{where} is a {type(element).__name__} and the model has {len(names)} inputs: {', '.join(names)}. Give a "
            "dict of input name -> array, or a tuple in this order."
        )
    return {names[0]: element}, []


def as_array(value: Any, name: str, where: str) -> Array:
    """A value as an array: a tensor with gradients, on another device, sparse or in BF16 too.

    Raises:
        DataError: it is none.
    """
    try:
        if callable(getattr(value, "detach", None)) and callable(getattr(value, "cpu", None)):
            value = value.detach()
            if str(getattr(value, "layout", "torch.strided")) != "torch.strided":
                value = value.to_dense()
            value = value.cpu().resolve_conj().resolve_neg() if hasattr(value, "resolve_conj") else value.cpu()
            if any(word in str(value.dtype) for word in ("bfloat16", "float8")):  # that NumPy does not know
                value = value.float()
            value = value.numpy()
        array = np.asarray(value)
        return array.astype(np.float32) if array.dtype.kind == "V" and not array.dtype.names else array
    except ENDINGS as error:  # an object may bring its own way to become an array
        raise DataError(
            f"{name!r} in {where} is not an array: {said(error)}. Give a numpy array or a tensor."
        ) from error


def _behind(element: Sequence[Any], count: int) -> list[str]:
    """A note of the values behind the first ones."""
    if len(element) <= count:
        return []
    what = f"value {count + 1}" if len(element) == count + 1 else f"values {count + 1} to {len(element)}"
    return [f"Not used of each sample: {what}, behind the model's inputs (such as labels)."]


def _batch_of(inputs: Sequence[InputSpec]) -> int:
    """The batch that a model fixes; 1 where it is open."""
    sizes = [spec.shape[0] for spec in inputs if spec.shape]
    return next((n for n in sizes if isinstance(n, int) and n > 0), 1) if sizes else 1


def _form(
    arrays: Mapping[str, Array], inputs: Sequence[InputSpec], reading: Reading, *, collated: bool, where: str
) -> Form:
    """What elements like this one are to the model."""
    more = {s.name: arrays[s.name].ndim - len(s.shape) for s in inputs if s.name in arrays}
    size, whole = _batch_of(inputs), Form(kind="whole", size=_batch_of(inputs), on_rows=frozenset())
    if collated or len(more) < len(inputs):  # whose names are refused
        return whole
    if items := frozenset(name for name, n in more.items() if n == -1):
        return Form(kind="item", size=size, on_rows=items) if max(more.values()) <= 0 else whole
    if cut := frozenset(name for name, n in more.items() if n == 1):
        return Form(kind="cut", size=1, on_rows=cut) if min(more.values()) >= 0 else whole
    leading = {s.name: s.shape[0] for s in inputs if s.shape and arrays[s.name].ndim}
    open_ = [name for name, n in leading.items() if not isinstance(n, int) or n == size]
    if any(more.values()) or not open_:
        return whole
    count = arrays[open_[0]].shape[0]
    on_rows = frozenset(name for name in open_ if arrays[name].shape[0] == count)
    fixed = any(isinstance(leading[name], int) for name in on_rows)
    collated_here = reading.batched and len(on_rows) == len(open_) and (not reading.rows or reading.rows[0] == count)
    if collated_here or (fixed and count != size and (count % size == 0)):
        return Form(kind="batch", size=size, on_rows=on_rows)
    return whole


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
