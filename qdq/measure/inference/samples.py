"""Samples: what one is, several at a time in order, how many, and which."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from qdq.core.errors import InputError
from qdq.model.model import Model


def sample_sha256(sample: Sample) -> str:
    """SHA-256 of one sample's input names, dtypes, shapes and values, as `calib_data` has it."""
    digest = hashlib.sha256()
    for name, array in sorted(sample.items()):
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.asarray(little_endian, order="C").data)
    return digest.hexdigest()


Sample = Mapping[str, npt.NDArray[Any]]

T = TypeVar("T")
R = TypeVar("R")


def overlapped(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`work(item)` of each item in the order of the items, on several threads; reads one item ahead, keeps none.

    Items are read on the caller's thread; `threads` calls at a time.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            del item
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def not_finite(tensor: str, index: int, what: str = "NaN or infinity") -> InputError:
    """What to raise where a stage reads a tensor of the float model that a sample, by its number, makes unfit."""
    return InputError(
        f"Sample {index} makes tensor {tensor!r} of the float model hold {what}: calibration needs finite values. "
        "Check the sample and how it was normalised, or exclude the nodes that read the tensor."
    )


def require_finite(values: npt.NDArray[Any], tensor: str, index: int) -> None:
    """Refuse values that are not finite, with `not_finite`."""
    if not np.isfinite(values).all():
        raise not_finite(tensor, index)


def require_held(model: Model, sample: Sample, index: int) -> None:
    """Refuse a sample, by its number, of another value than a model computes with in place of an input."""
    for name, value in model.held_inputs.items():
        if name in sample and np.asarray(sample[name]).item() != value:
            raise InputError(
                f"Sample {index} has {np.asarray(sample[name]).item()} as input {name!r}, which the plan, or --hold, "
                f"holds at {value}. Give samples of that value, or make a plan for the other one."
            )


def counted(samples: Iterable[Sample]) -> Iterator[tuple[int, Sample]]:
    """Number the samples and refuse none at all.

    Raises:
        InputError: there is no sample.
    """
    index = -1
    for index, sample in enumerate(samples):
        yield index, sample
    if index < 0:
        raise InputError(
            "There are no samples: calibration needs at least one. Give --data a folder or file with samples of real "
            "inputs."
        )


def length(samples: Iterable[Sample]) -> int | None:
    """How many samples there are, None where only counting would tell."""
    try:
        return len(samples)  # type: ignore[arg-type]
    except TypeError:
        return None
