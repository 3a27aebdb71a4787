"""Cores, and memory that is shared by what runs at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from engines.core.documents import byte_count
from qdq.core.errors import InputError

DEFAULT_BYTES = 4 << 30  # for the activations of all samples that run at a time, or half of the free memory if less

_GIVEN: ContextVar[int | None] = ContextVar("memory budget in bytes", default=None)

T = TypeVar("T")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 800M, 2G, 1.5GiB.

    Raises:
        InputError: it is no size.
    """
    try:
        return byte_count(text)
    except ValueError:
        raise InputError(f"--memory is {text!r}: it must be a size such as 800M, 2G or 1.5GiB.") from None


@contextmanager
def within(memory: int | None) -> Iterator[None]:
    """Everything that runs samples inside keeps to this many bytes, whichever stage it is; None changes nothing."""
    token = _GIVEN.set(_GIVEN.get() if memory is None else memory)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def given_bytes() -> int | None:
    """The budget of `within`, None where none is given."""
    return _GIVEN.get()


def said_bytes(size: int) -> str:
    """Bytes in words.

    >>> said_bytes(123456789), said_bytes(7_000)
    ('123 MB', '0.007 MB')
    """
    return f"{size / 1e6:.3g} MB"


def default_bytes() -> int:
    """The budget of `within`; else DEFAULT_BYTES, or half of the memory that is free now if that is less and known."""
    if (given := _GIVEN.get()) is not None:
        return given
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return DEFAULT_BYTES
    free = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    return min(DEFAULT_BYTES, free.get("MemAvailable", 2 * DEFAULT_BYTES) // 2)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Call `work` on each item, one per core at a time; raises what a call raises."""
    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(work, items):
            pass


class MemoryBudget:
    """Memory that threads share: whoever needs more than is left waits."""

    def __init__(self, total: int) -> None:
        """Bytes in all."""
        self._total = self._left = total
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Hold some bytes; who needs more than there are in all works alone."""
        size = min(size, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()
