"""How well quantized models do on some of the calibration samples.

samples -> ranked by hash -> those to fit on and those to judge by -> SQNR of the candidates, each sample run once in
float for all of them. Which samples are taken depends on the samples alone, not on their order. Only calibration
samples are seen here, never those that a report is made on. This module must not change a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from engines.core.arithmetic import stand_in
from engines.core.nodes import sized_by_values
from qdq.core.disk.spill import Spill, Spilled
from qdq.core.resources import given_bytes
from qdq.measure.inference.memory import at_once
from qdq.measure.inference.samples import Sample, counted, overlapped, sample_sha256
from qdq.measure.inference.session import Session
from qdq.model.model import Model

MOST_FIT = 8  # samples that corrections are fitted on, at most
AT_ONCE = 2  # candidates compared in one go, each with a session; one where there is a budget to keep
CHUNK = 1 << 18  # values compared at a time, which are copied in float64
MOST_HELD = 32  # samples that candidates are compared on, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Some of the samples, by index: `fit` to make something from, by hash, and `held` to judge it by.

    `split` gives two that have none in common, unless there is one sample only.
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


def ranked(samples: Iterable[Sample]) -> tuple[int, ...]:
    """The samples' indices, smallest hash first: taking the first k gives a selection independent of input order.

    Raises:
        InputError: there are none.
    """
    return tuple(index for _, index in sorted((sample_sha256(sample), index) for index, sample in counted(samples)))


def split(samples: Iterable[Sample]) -> Split:
    """Hold out a quarter of the samples, those with the smallest hashes.

    Raises:
        InputError: there are none.
    """
    order = ranked(samples)
    count = min(MOST_HELD, -(-len(order) // 4))
    held, fit = order[:count], order[count : count + MOST_FIT]
    return Split(samples=samples, fit=fit or held, held=frozenset(held))


def comparable(model: Model) -> list[str]:
    """The tensors that tell how well a candidate does: outputs of floats, or of other numbers where there are none.

    An error of labels is how far their indices are apart, which means little beside floats. Constants, texts and
    sequences are left out. Of outputs whose size depends on values, as boxes behind a NonMaxSuppression, one value more
    or less moves all others: they are left out where others are not so, else what they are chosen from counts.
    """
    kinds = {o.name: o.dtype for o in model.outputs if not model.is_constant(o.name)}
    floats = [name for name, kind in kinds.items() if "float" in kind]
    found = floats or [name for name, kind in kinds.items() if kind.startswith(("bool", "int", "uint"))]
    sized = sized_by_values(model.graph)
    return [name for name in found if name not in sized] or _chosen_from(model, sized) or found


def _chosen_from(model: Model, sized: Collection[str]) -> list[str]:
    """The computed float tensors that nodes read whose outputs have a size that depends on values."""
    read = (name for node in model.graph.node if any(name in sized for name in node.output) for name in node.input)
    made = (name for name in dict.fromkeys(read) if name not in sized and model.producer(name) is not None)
    return [name for name in made if (info := model.info(name)) is not None and "float" in info.dtype]


def in_its_types(model: Model, tensors: Iterable[str], *, threads: int = 0) -> Session:
    """A session of a Q/DQ model that computes in the float types of its file; see `engines.core.arithmetic`."""
    return Session(model.replace(stand_in(model.proto)), tensors, threads=threads, called="the Q/DQ model")


_Expected = Callable[[int, Sample, Collection[str]], dict[str, np.ndarray]]


class HeldOutScore:
    """Compares models with the float model on some samples.

    Candidates are computed in their own types (`engines.core.arithmetic`), the float model as it is: beside them, or,
    where there is a budget to keep, once and before them, its outputs in a file.
    """

    def __init__(self, model: Model, held: Split) -> None:
        """Of the prepared float model."""
        self._model, self._outputs, self._held = model, comparable(model), held
        self._threads = at_once(model, held.holding(), copies=2)  # a Q/DQ model has more tensors beside each other
        self._kept: list[dict[str, Spilled]] = []  # by sample

    def sqnr_db(self, candidate: Model) -> float:
        """See `sqnrs_db`."""
        return self.sqnrs_db([candidate])[0]

    def sqnrs_db(self, candidates: Iterable[Model]) -> list[float]:
        """Signal to quantization noise ratio of each model, over all outputs and samples.

        10 log10(sum y^2 / sum (y - candidate's y)^2); infinite if they are equal, -infinite if the candidate's are not
        finite.
        """
        signals, noises = self.energies(candidates)
        return [decibels(signals, each) for each in noises]

    def energies(self, candidates: Iterable[Model]) -> tuple[list[float], list[list[float]]]:
        """Of each sample the energy of the float outputs; of each model that of its error, sample by sample.

        Infinite where a candidate's outputs are not finite. The samples are in the order in which they are read. Of
        candidates that are made as they are asked for, AT_ONCE are there at a time.
        """
        if not self._outputs:
            return [0.0], [[0.0] for _ in candidates]
        signals, noises, left = list[float](), list[list[float]](), iter(candidates)
        while some := list(islice(left, AT_ONCE if given_bytes() is None else 1)):
            found, more = self._by_sample(some)
            signals, noises = signals or found, noises + more
            del some  # before the next are made
        return signals, noises

    def compared(self, candidate: Model) -> Iterator[tuple[Sample, dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Each sample with a candidate's outputs and the float model's, in the order in which samples are read."""
        outputs = [name for name in self._outputs if name in candidate.names()]
        expected = self._beside() if given_bytes() is None else self._before()
        session = in_its_types(candidate, outputs, threads=1)

        def compare(item: tuple[int, Sample]) -> tuple[Sample, dict[str, np.ndarray], dict[str, np.ndarray]]:
            found = session(item[1])
            return item[1], found, expected(*item, outputs)

        yield from overlapped(compare, enumerate(self._held.holding()), self._threads)

    def _by_sample(self, candidates: Sequence[Model]) -> tuple[list[float], list[list[float]]]:
        """The same of few candidates, in one go."""
        lost = {name for name in self._outputs for each in candidates if name not in each.names()}
        outputs = [name for name in self._outputs if name not in lost]
        expected = self._beside() if given_bytes() is None else self._before()
        taps = [in_its_types(candidate, outputs, threads=1) for candidate in candidates]

        def compare(item: tuple[int, Sample]) -> list[float]:
            found = [session(item[1]) for session in taps]
            wanted = expected(*item, outputs)  # not in memory while the others run
            both = [energies(wanted, values) for values in found]
            return [both[0][0], *(noise for _, noise in both)]

        each = list(overlapped(compare, enumerate(self._held.holding()), self._threads))
        found, *noises = ([*values] for values in zip(*each, strict=True))
        return found, noises

    def _beside(self) -> _Expected:
        """The float outputs of a sample, computed as they are asked for."""
        whole = Session(self._model, self._outputs, threads=1)
        return lambda _, sample, names: {name: value for name, value in whole(sample).items() if name in names}

    def _before(self) -> _Expected:
        """The same from a file, written at the first call."""
        if not self._kept:
            whole, spill = Session(self._model, self._outputs, threads=1), Spill("outputs of the float model")
            for sample in self._held.holding():
                self._kept.append({name: spill.put(value) for name, value in whole(sample).items()})
        return lambda number, _, names: {n: kept.read() for n, kept in self._kept[number].items() if n in names}


def energies(
    expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], *, signal: bool = True
) -> tuple[float, float]:
    """Of one sample: sum y^2 and sum (y - found)^2 over all finite outputs y, in float64; infinite if not finite.

    What is not finite in the float model, as the logarithm of a masked probability, is left out. An output of another
    shape, which depends on values, counts as one of zeros. Without `signal` the first sum is left out, as 0.
    """
    signals, noises = [], []
    for name, output in expected.items():
        other = found[name].ravel() if found[name].shape == output.shape else None
        for start in range(0, output.size, CHUNK):
            part = slice(start, start + CHUNK)
            finite = np.isfinite(output.ravel()[part])
            y = output.ravel()[part][finite].astype(np.float64)
            if signal:
                signals.append(float(np.sum(y**2)))
            noises.append(float(np.sum((y - (0.0 if other is None else other[part][finite])) ** 2)))
    return _sum(signals), _sum(noises)


def decibels(signals: Sequence[float], noises: Sequence[float]) -> float:
    """10 log10 of the ratio of the sums; infinite without noise, -infinite where a noise is not finite."""
    signal, noise = _sum(signals), _sum(noises)
    if not math.isfinite(noise):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def clearly_less(after: Sequence[float], before: Sequence[float], *, least_db: float, certainty: float) -> bool:
    """Whether the sum of a candidate's noises, one of each sample, is less than that before by more than chance.

    It must fall by `least_db`, and the sum of the differences must be over `certainty` of its standard errors, so that
    a few samples that speak for one candidate do not decide; one alone proves nothing. With 0 the sum alone decides.
    """
    if not math.isfinite(_sum(before)):
        return math.isfinite(_sum(after))
    if not math.isfinite(_sum(after)) or _sum(after) > _sum(before) * 10 ** (-least_db / 10):
        return False
    if not certainty or len(after) < 2:
        return not certainty
    gains = np.sort(np.subtract(before, after))  # sorted, so that the samples' order does not touch the last bits
    return bool(gains.sum() > certainty * gains.std(ddof=1) * math.sqrt(gains.size))


def _sum(values: Sequence[float]) -> float:
    """Their sum whatever their order; infinite if one is not finite."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.inf
