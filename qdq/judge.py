"""How well a quantized model does on calibration samples that were held out from what made it.

samples -> split by hash into fit and held -> float outputs once -> SQNR of every candidate.
The split depends on the samples alone, not on their order. Only calibration samples are seen here, never those that a
report is made on. This module must not change a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from qdq.calibrate import sample_sha256
from qdq.footprint import cores
from qdq.graph import Model
from qdq.tap import Sample, Tap, counted, overlapped

MOST_FIT = 8  # samples that corrections are fitted on, at most
MOST_HELD = 32  # samples that candidates are compared on, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Some of the samples, by index: `fit` to make something from, by hash, and `held` to judge it by.

    They have none in common, unless there is one sample only.
    """

    samples: Iterable[Sample]
    fit: tuple[int, ...]
    held: frozenset[int]

    def fitting(self) -> Iterator[Sample]:
        """Read the samples to fit."""
        return (sample for index, sample in enumerate(self.samples) if index in self.fit)

    def holding(self) -> Iterator[Sample]:
        """Read the samples to judge by."""
        return (sample for index, sample in enumerate(self.samples) if index in self.held)


def split(samples: Iterable[Sample]) -> Split:
    """Hold out a quarter of the samples, those with the smallest hashes.

    Args:
        samples: re-iterable.

    Raises:
        InputError: there are none.
    """
    order = sorted((sample_sha256(sample), index) for index, sample in counted(samples))
    count = min(MOST_HELD, -(-len(order) // 4))
    held = frozenset(index for _, index in order[:count])
    fit = tuple(index for _, index in order[count : count + MOST_FIT])
    return Split(samples=samples, fit=fit or tuple(held), held=held)


class Judge:
    """Compares models with the float model on held-out samples; the float outputs are computed with each candidate."""

    def __init__(self, model: Model, held: Split) -> None:
        """Open the float model.

        Args:
            model: the prepared float model.
            held: the samples.
        """
        self._outputs = [o.name for o in model.outputs if not model.is_constant(o.name)]
        self._float, self._held = Tap(model, self._outputs, threads=1), held

    def sqnr_db(self, candidate: Model) -> float:
        """Signal to quantization noise ratio over all outputs and held-out samples.

        10 log10(sum y^2 / sum (y - candidate's y)^2); infinite if they are equal, -infinite if the candidate's are not
        finite.
        """
        tap = Tap(candidate, self._outputs, threads=1)

        def compare(sample: Sample) -> tuple[float, float]:
            expected, found = self._float(sample), tap(sample)
            signal = noise = 0.0
            for name, array in expected.items():
                y = array.astype(np.float64)
                signal += float(np.sum(y**2))
                noise += float(np.sum((y - found[name].astype(np.float64)) ** 2))
            return signal, noise

        pairs = list(overlapped(compare, self._held.holding(), cores()))
        signal, noise = (math.fsum(values) for values in zip(*pairs, strict=True))
        if not math.isfinite(noise):
            return -math.inf
        return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
