"""Random samples, for an explicit ``--random-data`` only: they calibrate nothing real."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calib_data.samples import Samples
from calib_data.sources import RawSample, SampleShapes
from calib_data.validation import Array, DataError, InputSpec

MOST = 1 << 32  # elements of one array: 16 GiB in FP32


def random_samples(
    inputs: Sequence[InputSpec], n: int, *, seed: int, sizes: Mapping[str | tuple[str, int], int] | None = None
) -> Samples:
    """Make n samples: floats from the standard normal distribution, integers 0 to 7, bools 0 or 1.

    Args:
        inputs: what the model takes.
        n: how many samples.
        seed: sample i depends on the seed and i alone.
        sizes: size of each dynamic dimension, by the dimension's name or by (input name, axis), which goes first.
            A dynamic leading dimension defaults to 1.

    Raises:
        DataError: n is below one, a dynamic dimension has no size, or an array would be too large.
    """
    if n < 1:
        raise DataError(f"Cannot make {n} random samples: at least one is needed.")
    sizes = sizes or {}
    dims = {}
    for spec in inputs:
        shape: list[int] = []
        for axis, dim in enumerate(spec.shape):
            size = dim if isinstance(dim, int) else sizes.get((spec.name, axis), sizes.get(dim or "", int(axis == 0)))
            if size < 1 and dim != 0:
                raise DataError(
                    f"Cannot make random data for {spec.name!r}: axis {axis} ({dim or 'unnamed'}) of its shape "
                    f"{spec.shape} is dynamic and no size is given. Give the whole shape with --shape {spec.name}:..."
                )
            shape.append(size)
        dims[spec.name] = tuple(shape)
        if math.prod(shape) > MOST:
            raise DataError(
                f"Cannot make random data for {spec.name!r}: an array of shape {dims[spec.name]} has more than {MOST} "
                "elements. Give a smaller --shape, or another model where the size is fixed."
            )
    source = RandomNumbers(inputs=tuple(inputs), dims=dims, count=n, seed=seed)
    return Samples(inputs=tuple(inputs), source=source, indices=range(n), origin=f"{n} random samples, seed {seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomNumbers:
    """Random samples, for an explicit ``--random-data`` only. Sample i depends on the seed and i alone."""

    inputs: Sequence[InputSpec]
    dims: Mapping[str, tuple[int, ...]]
    count: int
    seed: int

    def read(self, indices: range) -> Iterator[RawSample]:
        """Floats from the standard normal distribution, integers 0 to 7, bools by a fair coin."""
        for i in indices:
            rng = np.random.default_rng((self.seed, i))
            arrays: dict[str, Array] = {}
            for spec in self.inputs:
                dtype, shape = np.dtype(spec.dtype), self.dims[spec.name]
                high = 2 if dtype.kind == "b" else 8
                values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, high, shape)
                arrays[spec.name] = np.asarray(values, dtype)
            yield RawSample(f"random sample {i}", arrays)

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """The shapes that were asked for."""
        return (SampleShapes(f"random sample {i}", self.dims) for i in indices)
