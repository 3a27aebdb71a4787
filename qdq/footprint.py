"""How much memory a model's activations take, and how to measure many tensors within a budget.

Model + sample -> bytes of each tensor -> peak of those alive at once -> passes over the samples, threads per pass.
Sizes are estimates from shapes: dynamic dimensions that no input names count as the largest one that does. This module
must not run anything.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdq.errors import InputError
from qdq.graph import Model
from qdq.proto import needed, reads

if TYPE_CHECKING:  # tap stands above
    from qdq.tap import Sample

DEFAULT_BYTES = 4 << 30  # for the activations of all samples that run at a time, or half of the free memory if less
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How the samples are run: each group of tensors is one pass over them.

    Attributes:
        groups: tensor names; together all, each once.
        threads: samples at a time.
        bytes_each: estimated bytes of one sample's activations in the largest pass.
    """

    groups: tuple[tuple[str, ...], ...]
    threads: int
    bytes_each: int


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 800M, 2G, 1.5GiB.

    Raises:
        InputError: it is no size.

    >>> parse_bytes("2 GiB"), parse_bytes("0.5k")
    (2147483648, 500)
    """
    body = text.strip().lower().removesuffix("b")
    number = body.rstrip("kmgi ")
    unit = body[len(number) :].strip()
    try:
        size = float(number) * _UNITS[unit]
        if not 1 <= size < math.inf:
            raise ValueError
        return int(size)
    except (ValueError, KeyError):
        raise InputError(f"--memory is {text!r}: it must be a size such as 800M, 2G or 1.5GiB.") from None


def default_bytes() -> int:
    """DEFAULT_BYTES, or half of the memory that is free now where that is less and known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return DEFAULT_BYTES
    free = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    return min(DEFAULT_BYTES, free.get("MemAvailable", 2 * DEFAULT_BYTES) // 2)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Room:
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


def passes(
    model: Model, names: Sequence[str], sample: Sample, *, memory: int | None = None, threads: int | None = None
) -> Passes:
    """Group tensors so that the activations of a pass fit the budget.

    Args:
        model: the prepared model.
        names: tensors to measure; outputs of the session, so that each lives until the run ends.
        sample: the shapes count.
        memory: budget in bytes; None for `default_bytes`.
        threads: samples at a time at most; None for one per core. Fewer where the budget is small.

    Returns:
        One group where all fit; a tensor that exceeds the budget by itself gets a pass of its own.
    """
    budget = default_bytes() if memory is None else memory
    sizes = tensor_bytes(model, sample)
    whole = peak(model, sizes, names)
    most = threads or cores()
    if whole <= budget:
        return Passes(groups=(tuple(names),), threads=max(1, min(most, budget // max(whole, 1))), bytes_each=whole)
    groups: list[list[str]] = []
    largest = 0
    for name in names:
        if groups and (found := peak(model, sizes, [*groups[-1], name])) <= budget:
            groups[-1].append(name)
        else:
            groups.append([name])
            found = peak(model, sizes, [name])
        largest = max(largest, found)
    return Passes(groups=tuple(map(tuple, groups)), threads=1, bytes_each=largest)


def tensor_bytes(model: Model, sample: Sample) -> dict[str, int]:
    """Bytes of every computed tensor for one sample's shapes."""
    bound: dict[str, int] = {}
    for fed in model.inputs:
        for dim, size in zip(fed.shape or (), np.shape(sample[fed.name]), strict=False):
            if isinstance(dim, str):
                bound[dim] = size
    unknown = max((size for fed in model.inputs for size in np.shape(sample[fed.name])), default=1)
    sizes = {}
    for name in (output for node in model.graph.node for output in node.output if output):
        info = model.info(name)
        if info is None or info.shape is None:  # the rank is not even known: as large as the largest input
            sizes[name] = max((np.asarray(sample[i.name]).nbytes for i in model.inputs), default=1)
            continue
        dims = [d if isinstance(d, int) else bound.get(d or "", unknown) for d in info.shape]
        sizes[name] = math.prod(dims) * (8 if info.dtype in ("float64", "int64", "uint64") else 4)
    return sizes


def peak(model: Model, sizes: Mapping[str, int], kept: Sequence[str]) -> int:
    """Bytes of the activations alive at once, at most: each from its node to its last reader, `kept` ones to the end.

    Nodes that no kept tensor needs are not run.
    """
    last: dict[str, int] = {}
    nodes = needed(model.graph.node, kept)
    for index, node in enumerate(nodes):
        last.update(dict.fromkeys(reads(node), index))
    ending: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in sizes and name not in kept:
            ending.setdefault(index, []).append(name)
    live = most = 0
    for index, node in enumerate(nodes):
        live += sum(sizes[o] for o in node.output if o)
        most = max(most, live)
        live -= sum(sizes[name] for name in ending.get(index, ()))
    return most
