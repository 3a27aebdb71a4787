"""What equalization looks at: the channels of a data tensor, and of the weights that read it. Chooses nothing.

Samples -> `look` -> ranges and vectors of channels, in a file: those of a wide model exceed any memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats, Singles, along_widest, part
from qdq.core.disk.spill import Spill, Spilled
from qdq.core.progress import Progress
from qdq.core.qtensor import CHUNK, QParams
from qdq.measure import second_moments
from qdq.measure.inference.memory import groups_of
from qdq.measure.inference.samples import Sample, counted, require_finite
from qdq.measure.inference.session import Session
from qdq.measure.statistics import ChannelRange, union
from qdq.model.model import Model
from qdq.plan.plan import Plan, Point
from qdq.plan.weighted_node import WeightedNode

ROWS = 8192  # channel vectors looked at per tensor, over all samples
TURNS = 3  # parts of the samples, each held out once


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """One tensor whose channels are divided before it is quantized.

    Attributes:
        scale: (channels,) float32 divisors.
        params: quantization of the divided tensor.
        gain_db: predicted fall of the error at the consumers' outputs.
    """

    scale: Singles
    params: QParams
    gain_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleChannels:
    """What one sample shows of a tensor's channels.

    Attributes:
        ends: (2, channels) the exact range of each: its smallest and its largest values.
        rows: (vectors, channels) some of the channel vectors.
    """

    ends: Spilled
    rows: Spilled

    @property
    def limits(self) -> ChannelRange:
        """The exact range of each channel."""
        low, high = self.ends.read().astype(np.float64)
        return ChannelRange(low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Some samples held out: the ranges of the others, and the (vectors, channels) float64 of those held out."""

    limits: ChannelRange
    held: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """What samples show of one tensor's channels, as a `Statistic`; the samples' order does not show."""

    parts: tuple[SampleChannels, ...]

    def merge(self, other: Channels) -> Channels:
        """What both show."""
        return Channels(parts=(*self.parts, *other.parts))

    @property
    def limits(self) -> ChannelRange:
        """The exact range of each channel."""
        return reduce(ChannelRange.merge, (each.limits for each in self.parts))

    @property
    def count(self) -> int:
        """How many channel vectors there are."""
        return sum(each.rows.shape[0] for each in self.parts)

    @property
    def single(self) -> bool:
        """Whether a sample shows one vector, such as the means of all positions before a classifier."""
        return self.count <= len(self.parts)

    def rows(self) -> Iterator[Floats]:
        """(vectors, channels) arrays of about CHUNK values each, which together are all channel vectors."""
        return _rows(self.parts)

    def turns(self) -> list[Turn]:
        """Every sample held out once, in `TURNS` parts that differ as much as possible; none of fewer samples.

        The samples are cut along the direction in which the peaks of their channels vary most (`along_widest`).
        """
        if len(self.parts) < TURNS:
            return []
        parts = sorted(self.parts, key=lambda each: each.rows.sha256)
        peaks = np.array([np.maximum(-limits.low, limits.high) for limits in (each.limits for each in parts)])
        peaks = (peaks - peaks.mean(axis=0)) / np.maximum(peaks.max(axis=0), np.finfo(np.float64).tiny)
        order = [parts[i] for i in along_widest(peaks)]
        cuts = [part(len(order), turn, TURNS) for turn in range(TURNS)]
        return [
            Turn(
                limits=Channels(parts=(*order[: cut.start], *order[cut.stop :])).limits,
                held=np.concatenate([*_rows(order[cut])]),
            )
            for cut in cuts
        ]


def _rows(parts: Sequence[SampleChannels]) -> Iterator[Floats]:
    """The rows of some samples in one order, so that sums over them are the same whatever that of the samples."""
    whole = sorted((each.rows for each in parts), key=lambda rows: rows.sha256)
    some: list[Singles] = []
    step = left = max(1, CHUNK // max(1, whole[0].shape[1]))
    for rows in whole:
        start = 0
        while start < rows.shape[0]:
            some.append(rows.read(start, start + left))
            start, left = start + len(some[-1]), left - len(some[-1])
            if not left:
                yield np.concatenate(some).astype(np.float64)
                some, left = [], step
    if some:
        yield np.concatenate(some).astype(np.float64)


def data_readers(point: Point, nodes: Mapping[str, WeightedNode]) -> list[WeightedNode]:
    """The weighted nodes that multiply an activation's channels, if they are all that reads its codes.

    Every one is a Conv, or every one a Gemm or MatMul without transA, and all of as many channels; none for any other
    activation, or where it is tied to another.
    """
    readers = [nodes[name] for name, index in point.uses if name in nodes and index == 0]
    plain = len(readers) == len(point.uses) and not any(node.data_transposed for node in readers)
    return readers if plain and point.tie is None and len({(n.channel_axis, n.channels) for n in readers}) == 1 else []


def candidates(plan: Plan, nodes: Mapping[str, WeightedNode]) -> dict[str, list[WeightedNode]]:
    """Activation tensors that may be equalized -> all that reads them.

    Every reader is a Conv without groups or a depthwise one, or every one a Gemm or MatMul without transA; no weight is
    shared with another tensor or a table of words, or of codes that the model came with; the tensor is no shortcut and
    is tied to no other.
    """
    fixed = {point.tie for point in plan.tables} | {point.tensor for point in plan.points if point.trained}
    reads: dict[str, set[str]] = {}
    for node in nodes.values():
        reads.setdefault(node.weight, set()).add(node.data)
    found = {point.tensor: data_readers(point, nodes) for point in plan.activations}
    return {
        tensor: readers
        for tensor, readers in found.items()
        if readers
        and tensor not in fixed
        and all(_whole(node) and reads[node.weight] == {tensor} and node.weight not in fixed for node in readers)
    }


def _whole(node: WeightedNode) -> bool:
    """Whether each output channel reads all input channels, or one."""
    return node.groups == 1 or node.shape[1] == 1


def look(
    model: Model, readers: Mapping[str, Sequence[WeightedNode]], samples: Iterable[Sample], on_progress: Progress | None
) -> dict[str, Channels]:
    """Tensor -> what samples, of which `second_moments.MAX_SAMPLES` at most are run, show of its channels.

    Those of a sample in which it has others than a reader multiplies do not count. `readers` are the nodes that
    multiply the channels of a tensor, one of them at least.
    """
    if not readers:
        return {}
    samples = second_moments.few(samples)
    each, spill = max(1, ROWS // len(samples)), Spill("channel vectors")

    def shown(values: Mapping[str, npt.NDArray[np.floating]], index: int) -> dict[str, Channels]:
        for tensor, array in values.items():
            require_finite(array, tensor, sorted(samples.chosen)[index])
        fitting = {t: array for t, array in values.items() if readers[t][0].takes(array.shape)}
        return {t: _one(spill, array, readers[t][0].channel_axis, each) for t, array in fitting.items()}

    def seen(group: Sequence[str]) -> Iterator[dict[str, Channels]]:
        session = Session(model, group, threads=second_moments.THREADS, in_order=True)
        for index, sample in counted(samples):
            yield shown(session(sample), index)  # the tensors are gone before the next run
            if on_progress is not None:
                on_progress(index + 1, len(samples), "channel ranges")

    return union(found for group in groups_of(model, readers, samples) for found in seen(group))


def _one(spill: Spill, values: npt.NDArray[np.floating], axis: int, each: int) -> Channels:
    """What one sample shows of a tensor, with `each` of its channel vectors; the values go to a file."""
    grid = values.reshape(*values.shape[:2], -1) if axis == 1 else values.reshape(-1, values.shape[-1], 1)
    positions = grid.shape[0] * grid.shape[2]
    picked = np.random.default_rng(positions).choice(positions, min(each, positions), replace=False)
    first, last = np.divmod(np.sort(picked), grid.shape[2])
    ends = np.stack([grid.min(axis=(0, 2)), grid.max(axis=(0, 2))]).astype(np.float32)
    rows = grid[first, :, last].astype(np.float32)
    return Channels(parts=(SampleChannels(ends=spill.put(ends), rows=spill.put(rows)),))
