"""Second moments of the quantized inputs of weighted operators: what GPTQ needs to know about the data.

Weighted nodes + activation parameters + samples -> per weight the matrix sum(q q^T) over sampled input rows q.
q are integer codes less their zero point, so every sum is exact in float64 and independent of the samples' order.
A convolution's rows are its patches (im2col). This module must not keep activations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats, Singles
from qdq.core.disk.spill import mapped
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams, to_codes
from qdq.core.resources import default_bytes
from qdq.measure.inference.memory import groups_of, left_bytes
from qdq.measure.inference.samples import Sample, counted, length, require_finite
from qdq.measure.inference.session import Session
from qdq.model.external import release
from qdq.model.model import Model
from qdq.plan.weighted_node import Weight, WeightedNode, Window, by_weight

MAX_SAMPLES = 64  # more do not change the matrices visibly; those with the smallest hash are taken
ROWS_PER_COLUMN = 8  # input rows per weight column, over all samples
MIN_ROWS = 8192  # input rows per weight at least, over all samples
THREADS = 2  # of ONNX Runtime: with three and more the last bits of its convolutions depend on their number
FLOAT_BITS = 11  # of rows that stay float: products of 22 bits, so sums over samples of like size are exact in float64
CHUNK = 1 << 20  # values of rows that are coded at a time, and as few as this many rows
LEAST_ROWS = 256
BUDGET_BYTES = 1 << 30  # matrices held at once at most; more weights take further passes over the samples

Grams = dict[Weight, Floats]
_Values = Mapping[str, npt.NDArray[np.floating]]


def collect(
    model: Model,
    nodes: Iterable[WeightedNode],
    params: Mapping[str, QParams],
    samples: Iterable[Sample],
    *,
    most_columns: int | None = None,
    divisors: Mapping[str, Singles] = MappingProxyType({}),
    shrink: bool = False,
    on_progress: Progress | None = None,
) -> Grams:
    """Sum the second moments of the rows that each weight is multiplied with.

    Args:
        model: the prepared float model.
        nodes: that read the weights.
        params: activation tensor -> parameters, so that rows are what the integer kernel will see; rows of other
            tensors are in their own unit.
        samples: re-iterable; read twice or more when there are over MAX_SAMPLES or the matrices exceed their share of
            the memory. More than that share of them lie in files without a name, and are mapped.
        most_columns: inputs per output of the weights that are looked at; None for all.
        divisors: activation tensor -> (channels,) float32, what its channels are divided by before quantization.
        shrink: give back what `shrunk` makes of the sums, for weights of fewer than 8 bits: the errors of others are
            small beside those of the data even where H says nothing.

    Returns:
        Weight tensor and axis -> (groups, columns, columns) float64. Weights of more columns than `most_columns`,
        batched ones, and those that nodes of different groups share are left out.

    Raises:
        InputError: no samples, one that makes a tensor that a node reads hold NaN or infinity, or no room on the disk.
    """
    weights = {key: readers for key, readers in by_weight(nodes).items() if has_matrix(readers, most_columns)}
    samples = few(samples)
    total, share = sum(_bytes(node) for node, *_ in weights.values()), _share(model, samples)
    grams: Grams = {}
    make = partial(mapped, what="second moments") if total > share else np.zeros

    def add(moments: dict[Weight, Moment], readers: Iterable[WeightedNode], values: _Values, index: int) -> None:
        for name, value in values.items():
            require_finite(value, name, sorted(samples.chosen)[index])
        for node in readers:
            if node.data not in values or not node.takes(values[node.data].shape):
                continue  # in a body that the run did not reach
            if node.key not in moments:
                moments[node.key] = Moment(sums=make((node.groups, node.columns, node.columns)))
            count = -(-max(MIN_ROWS, ROWS_PER_COLUMN * node.columns) // len(samples))
            for rows in _rows(node, values[node.data], count, params.get(node.data), divisors.get(node.data)):
                moments[node.key].add(rows)
            release(moments[node.key].sums)

    for batch in _batches(weights, share):
        readers = [node for weight in batch for node in weights[weight]]
        left = default_bytes() - (2 * total if total <= share else 0)
        moments: dict[Weight, Moment] = {}
        for group in groups_of(model, (node.data for node in readers), samples, memory=left):
            session = Session(model, group, threads=THREADS, in_order=True)
            inside = [node for node in readers if node.data in group]
            for index, sample in counted(samples):
                add(moments, inside, session(sample), index)  # the tensors are gone before the next run
                if on_progress is not None:
                    on_progress(index + 1, len(samples), "second moments")
        for weight, moment in moments.items():
            if shrink and FORMATS[weights[weight][0].spec.format].bits < 8:
                shrunk(moment)
            moment.sums.setflags(write=total <= share)
            grams[weight] = moment.sums
    return grams


@dataclass(slots=True, kw_only=True)
class Moment:
    """Second moments of integer rows, the sum of q q^T; rows are added in any order.

    Attributes:
        sums: (groups, columns, columns) float64, whole numbers below 2^53, so that every sum is exact.
        rows: how many rows were summed in each group.
    """

    sums: Floats
    rows: int = 0

    def add(self, rows: npt.NDArray[np.floating]) -> None:
        """Add (groups, rows, columns) whole numbers of at most 2^8: up to 2^37 rows stay exact.

        Some columns at a time: a product as large as the sums is never beside them.
        """
        wide = np.ascontiguousarray(rows, dtype=np.float64)
        groups, count, columns = wide.shape
        step = max(1, CHUNK // max(1, groups * columns))
        for start in range(0, columns, step):
            some = slice(start, start + step)
            self.sums[:, some] += wide[:, :, some].transpose(0, 2, 1) @ wide
        self.rows += count


def shrunk(moment: Moment) -> Floats:
    """(1 - r) H + r mean(diag H) I in place of the sums H, r = (columns / (rows + columns))^2; returns them.

    Few rows leave directions that H says nothing of, and codes that trust it put their errors there: with 500 rows of
    384 columns, 5 % of the energy of other inputs lay in them. At the ROWS_PER_COLUMN that are taken where there are
    enough, r is 1/81, as much as GPTQ adds anyway. INT4 codes of two molecular potentials gained 5 and 9 dB.
    """
    columns = moment.sums.shape[-1]
    r = (columns / (moment.rows + columns)) ** 2
    diagonal = np.einsum("gii->gi", moment.sums)
    added = r * diagonal.mean(axis=1, keepdims=True)
    np.multiply(moment.sums, 1 - r, out=moment.sums)
    diagonal += added
    return moment.sums


def has_matrix(readers: Sequence[WeightedNode], most_columns: int | None) -> bool:
    """Whether a weight gets a matrix, by the nodes that read it."""
    if readers[0].op_type == "ConvTranspose":  # each output sums other taps of its kernel: no one matrix for all
        return False
    small = most_columns is None or readers[0].columns <= most_columns
    batched = readers[0].op_type == "MatMul" and len(readers[0].shape) > 2
    return small and not batched and len({node.groups for node in readers}) == 1


@dataclass(frozen=True, slots=True)
class SampleSubset:
    """At most MAX_SAMPLES of some samples, by index; re-iterable."""

    samples: Iterable[Sample]
    chosen: frozenset[int]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.chosen)

    def __iter__(self) -> Iterator[Sample]:
        """The samples in their order."""
        return (sample for index, sample in enumerate(self.samples) if index in self.chosen)


def few(samples: Iterable[Sample]) -> SampleSubset:
    """The MAX_SAMPLES samples with the smallest hashes, all where there are no more; of a SampleSubset, itself.

    The samples are read once, unless their number is known and small.

    Raises:
        InputError: there is no sample.
    """
    if isinstance(samples, SampleSubset):
        return samples
    total = length(samples)
    if total is not None and 0 < total <= MAX_SAMPLES:
        return SampleSubset(samples, frozenset(range(total)))
    hashes = []
    for index, sample in counted(samples):
        content = b"".join(np.ascontiguousarray(sample[name]).tobytes() for name in sorted(sample))
        hashes.append((hashlib.sha256(content).digest(), index))
    return SampleSubset(samples, frozenset(index for _, index in sorted(hashes)[:MAX_SAMPLES]))


def _share(model: Model, samples: Iterable[Sample]) -> int:
    """Bytes of matrices that are summed at a time, and of those that stay in memory when they are done.

    A quarter of the memory, less where a sample that runs through the model leaves less for them and their copies.
    """
    return min(BUDGET_BYTES, default_bytes() // 4, left_bytes(model, samples) // 2)


def _bytes(node: WeightedNode) -> int:
    """Bytes of the matrices of the weight that a node reads."""
    return 8 * node.columns**2 * node.groups


def _batches(weights: Mapping[Weight, Sequence[WeightedNode]], share: int) -> list[list[Weight]]:
    """Weights in groups whose matrices fit some bytes, in the plan's order."""
    batches: list[list[Weight]] = []
    room = 0
    for weight, (node, *_) in weights.items():
        if (size := _bytes(node)) > room:
            batches.append([])
            room = share
        batches[-1].append(weight)
        room -= size
    return batches


def _rows(
    node: WeightedNode,
    values: npt.NDArray[np.floating],
    count: int,
    params: QParams | None,
    divisor: Singles | None,
) -> Iterator[Singles]:
    """(groups, rows, columns): up to `count` of the rows that a node multiplies, some at a time.

    As its kernel sees them: integer codes less their zero point; where it reads floats, these on a grid that keeps the
    sums exact. Only rows that are taken are coded: a copy of the whole tensor may be the largest of the run.
    """
    if node.window is None:
        flat = values.T if node.data_transposed else values
        flat = flat.reshape(-1, flat.shape[-1])
        chosen = _spaced(flat.shape[0], count)
    else:
        pads, extent = _extent(node.window, node.shape[2:], values.shape[2:])
        chosen = _spaced(values.shape[0] * math.prod(extent), count)
    step = _step(values, node, divisor) if params is None else np.float32(1)
    some = max(LEAST_ROWS, CHUNK // (node.groups * node.columns))
    for start in range(0, max(len(chosen), 1), some):
        picked = chosen[start : start + some]
        if node.window is None:
            taken = flat[picked][..., None]
        else:
            taken = _patches(node.window, node.shape[2:], values, picked, pads, extent)
        if divisor is not None:
            taken = taken / divisor[:, None]
        taken = np.asarray(taken, dtype=np.float32)
        if params is not None:
            codes = to_codes(taken, params).astype(np.float32) - np.float32(params.zero_point)
        else:
            codes = np.rint(taken / step) * step
        yield np.asarray(codes.reshape(-1, node.groups, node.columns).transpose(1, 0, 2))


def _step(values: npt.NDArray[np.floating], node: WeightedNode, divisor: Singles | None) -> np.float32:
    """The grid of floats: FLOAT_BITS of the tensor's largest magnitude."""
    if not values.size:
        return np.float32(1)
    axis = 1 if node.window else -2 if node.data_transposed else -1
    axes = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
    most = np.maximum(values.max(axis=axes), -values.min(axis=axes))
    amax = float(most.max() if divisor is None else np.abs(most / divisor).max())
    return np.float32(2.0 ** (math.frexp(amax)[1] - FLOAT_BITS)) if amax else np.float32(1)


def _spaced(length: int, count: int) -> npt.NDArray[np.int64]:
    """Up to `count` indices spread over range(length) by a fixed pseudo-random choice."""
    if length <= count:
        return np.arange(length)
    return np.sort(np.random.default_rng(length).choice(length, count, replace=False))


def _extent(window: Window, kernel: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pads of a convolution's input of some sizes, and the sizes of its output."""
    strides, dilations, pads = window.strides, window.dilations, window.pads
    if window.auto_pad.startswith("SAME"):  # only where a dynamic size kept `prepare` from writing the pads
        axes = zip(sizes, kernel, strides, dilations, strict=True)
        totals = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in axes]
        less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        pads = less + more if window.auto_pad == "SAME_UPPER" else more + less
    padded = [n + pads[i] + pads[i + len(sizes)] for i, n in enumerate(sizes)]
    shapes = zip(padded, kernel, strides, dilations, strict=True)
    return pads, tuple((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in shapes)


def _patches(
    window: Window,
    kernel: tuple[int, ...],
    values: npt.NDArray[np.floating],
    picked: npt.NDArray[np.int64],
    pads: tuple[int, ...],
    extent: tuple[int, ...],
) -> npt.NDArray[np.floating]:
    """(rows, channels, positions of the kernel): the patches under picked output positions, 0 where they are padded."""
    batch, channels, *sizes = values.shape
    item, *positions = np.unravel_index(picked, [batch, *extent])
    if not values.size:
        return np.zeros((len(item), channels, math.prod(kernel)), values.dtype)
    offsets = np.stack([g.reshape(-1) for g in np.meshgrid(*(np.arange(k) for k in kernel), indexing="ij")])
    index = [
        at[:, None] * window.strides[i] + offsets[i][None] * window.dilations[i] - pads[i]
        for i, at in enumerate(positions)
    ]
    inside = np.all([(at >= 0) & (at < n) for at, n in zip(index, sizes, strict=True)], axis=0)
    near = [np.clip(at, 0, n - 1) for at, n in zip(index, sizes, strict=True)]
    taken = values[(item[:, None], slice(None), *near)]  # (rows, kernel, channels)
    taken[~inside] = 0
    return np.asarray(taken.transpose(0, 2, 1))
