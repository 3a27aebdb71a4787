"""Open samples, iterate over them checked, shard them, fingerprint them.

Flow: open_samples(source, inputs) -> Samples -> for each pass: read one sample, check it, hand it over.
Shapes for optimization profiles come from file headers, the fingerprint from a pass over the values.
It must not read ahead, keep samples, or fall back to random data.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calib_data.elements import limited_to
from calib_data.sources import ImageForm, Source, form_of
from calib_data.validation import Array, DataError, InputSpec, check_names, check_sample, check_shapes
from calib_data.volumes.samples import open_cases
from calib_data.volumes.spec import VolumeSpec, volume_spec

BEYOND_ANY = 1 << 40  # stands for the number of samples where it is unknown: more than anyone has


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeBounds:
    """Shapes of one input over the samples: elementwise ``min`` and ``max``, and ``opt``, the most common."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples of a source, checked one by one as they are read; each iteration reads them afresh.

    ``indices`` are those of the source that belong here; they may run beyond the end of a source of unknown length.
    """

    inputs: tuple[InputSpec, ...]
    source: Source
    indices: range
    origin: str

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """Yield each sample: input name -> array of the model's dtype and rank, finite or -inf.

        Raises:
            DataError: a sample is unreadable or not what the model needs, or there is none.
        """
        empty = True
        for where, arrays in self.source.read(self.indices):
            empty = False
            yield check_sample(arrays, self.inputs, where)
        if empty:
            self._refuse_empty()

    def __len__(self) -> int:
        """Number of samples.

        Raises:
            TypeError: it is not known without reading them; ``len_or_none`` gives None then.
        """
        if (count := self.len_or_none()) is None:
            raise TypeError(f"the number of samples of {self.origin} is not known before they are read")
        return count

    def len_or_none(self) -> int | None:
        """Number of samples, or None where only reading them tells."""
        return None if self.source.count is None else len(self.indices)

    def shard(self, i: int, n: int) -> Samples:
        """Every n-th sample, starting at the i-th; the n shards together are all samples, each once.

        Raises:
            ValueError: not 0 <= i < n.
        """
        if not 0 <= i < n:
            raise ValueError(f"Shard {i} of {n} does not exist: 0 <= i < n is needed.")
        return replace(self, indices=self.indices[i::n])

    def shapes(self) -> dict[str, ShapeBounds]:
        """Input name -> its shapes over the samples, from file headers where there are files.

        ``opt`` are the shapes that most samples have together, of equally common ones the largest: they fit each other,
        and order does not matter.

        Raises:
            DataError: a file is unreadable, a shape is not what the model takes, or there are no samples.
        """
        seen: Counter[tuple[tuple[str, tuple[int, ...]], ...]] = Counter()
        for where, shapes in self.source.shapes(self.indices):
            key = tuple(sorted(shapes.items()))
            if key not in seen:
                check_names(shapes.keys(), self.inputs, where)
                check_shapes(shapes, self.inputs, where)
            seen[key] += 1
        if not seen:
            self._refuse_empty()
            return {}
        usual = max(seen, key=lambda key: (seen[key], sum(math.prod(shape) for _, shape in key), key))
        return {name: _range_of([dict(key)[name] for key in seen], opt) for name, opt in usual}

    def sha256(self) -> str:
        """Fingerprint of what the model will see: hexadecimal SHA-256 over the sorted SHA-256 of each sample.

        A sample's hash covers its input names, dtypes, shapes and values, after conversion to the model's dtypes. It
        does not depend on file names, on the form of storage, or on the order of the samples.

        Raises:
            DataError: as in iteration.
        """
        return hashlib.sha256(b"".join(sorted(_sample_sha256(sample) for sample in self))).hexdigest()

    def _refuse_empty(self) -> None:
        """Raise unless this is a shard that happens to lie beyond the last sample."""
        if self.indices.start == 0:
            raise DataError(
                f"No samples: {self.origin} yielded none; at least one is needed. A generator function must yield its "
                "samples anew at each call, not resume one that is used up."
            )


def open_samples(
    source: str | Path,
    inputs: Sequence[InputSpec],
    *,
    limit: int | None = None,
    volume: VolumeSpec | Mapping[str, object] | None = None,
    case_key: bytes | None = None,
) -> Samples:
    """Open calibration or evaluation samples. Files, but for the headers of a single one, are read by iteration.

    Args:
        source: in one of the forms that `calib_data.sources` has a file for.
        inputs: what the model takes.
        limit: use the first ``limit`` samples only; None: as `calib_data.elements.limiting` says, or all.
        volume: what is done to images, or the keys of such a block; for a source of images only.
        case_key: of the keys by which messages call images; None for one of this run.

    Raises:
        DataError: the source is missing, of no known form, empty, or does not fit the model's inputs.
    """
    if not inputs:
        raise DataError(f"Cannot use {source}: the model has no inputs to feed.")
    if limit is not None and limit < 1:
        raise DataError(f"Cannot use {limit} samples of {source}: at least one is needed. Raise the limit or omit it.")
    limit = limited_to() if limit is None else limit
    form, origin = form_of(str(source)), str(source)
    opened: Source
    if isinstance(form, ImageForm):
        opened, origin = (
            open_cases(form, origin, inputs, None if volume is None else volume_spec(volume), case_key),
            "what --data names",
        )
    elif volume is not None:
        raise DataError(
            f"Cannot use `volume:` on {source}: it holds arrays, which are given as the model gets them. Leave out "
            "`volume:` and --preprocess, or give images."
        )
    else:
        opened = form.open(origin, tuple(inputs))
    count = BEYOND_ANY if opened.count is None else opened.count
    return Samples(inputs=tuple(inputs), source=opened, indices=range(count)[:limit], origin=origin)


def _range_of(shapes: Sequence[tuple[int, ...]], opt: tuple[int, ...]) -> ShapeBounds:
    low, high = (tuple(int(size) for size in of(shapes, axis=0)) for of in (np.min, np.max))
    return ShapeBounds(min=low, opt=opt, max=high)


def _sample_sha256(sample: Mapping[str, Array]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(sample.items()):
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.asarray(little_endian, order="C").data)
    return digest.digest()
