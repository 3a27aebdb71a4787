"""What a result depends on that is computed from samples: for the keys of `core.disk.cache`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from calib_data import Samples
from engines.core.files import sha256_file
from qdq.core.disk.cache import hashed
from qdq.measure.inference.samples import Sample, sample_sha256
from qdq.measure.inference.session import libraries


def seen(samples: Samples | Iterable[Sample] | None) -> tuple[str, ...]:
    """The samples in their order, and the custom operators that are registered; the samples are read."""
    data = "" if samples is None else hashed(samples, lambda: _in_order(samples))
    return (data, *sorted(map(sha256_file, libraries())))


def _in_order(samples: Iterable[Sample]) -> str:
    return hashlib.sha256("".join(sample_sha256(sample) for sample in samples).encode()).hexdigest()
