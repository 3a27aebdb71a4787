"""How elements are drawn from what a user has: a Dataset, a DataLoader, a list, a generator.

anything -> `reading_of` -> `Reading`: how many elements, and those at some indices, in the same order each time.
No library is imported to know one of its objects: what an object has decides. Must not look into elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from calib_data.validation import DataError

MOST = 10_000
"""Elements that are drawn of what tells no length, before it is taken for endless."""

Draw = Callable[[range], Iterator[tuple[int, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Elements in a fixed order.

    Attributes:
        count: how many; None where only reading tells.
        draw: the elements at ascending indices, each with its index.
        rows: of each element how many items were collated into it; empty where elements are items, or it is not known.
        batched: whether elements are batches.
        items: whether elements rather have no batch axis: those of a Dataset.
        random_access: whether `draw` reads what it gives and nothing else.
    """

    count: int | None
    draw: Draw
    rows: Sequence[int] = ()
    batched: bool = False
    items: bool = False
    random_access: bool = False


def reading_of(thing: object, where: str, limit: int | None = None) -> Reading:
    """How to read a thing.

    Args:
        thing: a torch DataLoader or Dataset, a datasets.Dataset, a sequence or another iterable; a mapping is one
            element.
        where: what messages call it.
        limit: elements that are needed at most; where it is given, a thing may be endless, or read only once.

    Raises:
        DataError: nothing can be read from it, or it can be read only once and no limit is given.
    """
    if isinstance(thing, Mapping):
        if split := next((key for key, value in thing.items() if _indexed(value) and _is_dataset(value)), None):
            raise DataError(
                f"{where} holds several data sets: {', '.join(map(str, thing))}. Give one: data[{split!r}]."
            )
        return _of_sequence([thing])
    if isinstance(thing, str | bytes):
        raise DataError(f"{where} is text; a Dataset, a DataLoader or an iterable of dicts or tuples is needed.")
    if _is_loader(thing):
        return _of_loader(thing, where, limit)
    if isinstance(thing, Iterator):
        if limit is None:
            raise DataError(
                f"{where} is a {type(thing).__name__}, an iterator, which can be read only once, and does not end by "
                "itself. Give a list, a Dataset or a DataLoader; or say how many samples to hold in memory: "
                "calib_data.Stream(samples, limit=64)."
            )
        return _of_sequence(list(itertools.islice(thing, limit)))
    length = _length(thing)
    if _indexed(thing) and not _iterable_only(thing):
        return _of_sequence(thing, length) if length is not None else _of_iterable(_Counted(thing), where, None, limit)
    if isinstance(thing, Iterable):
        return _of_iterable(thing, where, length, limit)
    raise DataError(
        f"{where} is a {type(thing).__name__}; samples are needed: a Dataset, a DataLoader or an iterable of dicts or "
        "tuples."
    )


def _of_sequence(thing: Any, length: int | None = None) -> Reading:
    """By index."""
    count = len(thing) if length is None else length

    def draw(indices: range) -> Iterator[tuple[int, Any]]:
        for i in indices:
            if i >= count:
                return
            yield i, thing[i]

    return Reading(count=count, draw=draw, items=_is_dataset(thing), random_access=True)


def _of_iterable(thing: Iterable[Any], where: str, length: int | None, limit: int | None) -> Reading:
    """From the start, each time."""
    most = length if length is not None else limit

    def draw(indices: range) -> Iterator[tuple[int, Any]]:
        drawn = enumerate(thing if most is None else itertools.islice(thing, most))
        for i, element in drawn:
            if most is None and i >= MOST:
                raise DataError(
                    f"{where} tells no length and gave more than {MOST} samples: it may be endless. Let it end, give "
                    "it a length (__len__), or say how many to take: --max-samples N, or calib_data.Stream(samples, "
                    "limit=N)."
                )
            if i in indices:
                yield i, element
            if indices and i >= indices[-1]:
                return

    return Reading(count=length, draw=draw)


def _of_loader(loader: Any, where: str, limit: int | None) -> Reading:
    """A DataLoader: over items with an index in one order, drawn now; over a stream as it comes."""
    data, length = loader.dataset, _length(loader)
    if _iterable_only(data):
        made = _of_iterable(loader, where, length, limit)
        return Reading(count=made.count, draw=made.draw, batched=loader.batch_size is not None)
    chosen = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    most = length if length is not None else limit
    order = list(itertools.islice(chosen, MOST + 1 if most is None else most))
    if most is None and len(order) > MOST:
        raise DataError(f"The sampler of {where} tells no length and gave more than {MOST} samples: it may be endless.")

    def draw(indices: range) -> Iterator[tuple[int, Any]]:
        for i in indices:
            if i >= len(order):
                return
            yield i, loader.collate_fn(_items(data, order[i]) if loader.batch_sampler is not None else data[order[i]])

    batched = loader.batch_sampler is not None
    rows = [len(each) for each in order] if batched else []
    return Reading(count=len(order), draw=draw, rows=rows, batched=batched, items=not batched, random_access=True)


def _items(data: Any, indices: Sequence[Any]) -> list[Any]:
    """Several items, all at once where the data set can."""
    if callable(getattr(data, "__getitems__", None)):
        return list(data.__getitems__(indices))
    return [data[i] for i in indices]


class _Counted:
    """What has an index and no length, from 0 to its IndexError."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __iter__(self) -> Iterator[Any]:
        for i in itertools.count():
            try:
                element = self.thing[i]
            except IndexError:
                return
            yield element


def _is_loader(thing: object) -> bool:
    return all(hasattr(thing, name) for name in ("dataset", "collate_fn", "batch_sampler", "sampler"))


def _is_dataset(thing: object) -> bool:
    return hasattr(thing, "column_names") or any(c.__name__ == "Dataset" for c in type(thing).__mro__)


def _indexed(thing: object) -> bool:
    return hasattr(type(thing), "__getitem__")


def _iterable_only(thing: object) -> bool:
    """Whether a data set is read from its start; torch's class of that kind has an index that raises."""
    return any(c.__name__ == "IterableDataset" for c in type(thing).__mro__) or not _indexed(thing)


def _length(thing: Any) -> int | None:
    """Its length, None where it tells none, or has one that it cannot know."""
    with suppress(TypeError, NotImplementedError, AttributeError):
        return len(thing)
    return None
