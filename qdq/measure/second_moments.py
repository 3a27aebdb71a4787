"""Second moments of the quantized inputs of weighted operators: what GPTQ needs to know about the data.

Model + Plan + activation parameters + samples -> per weight the matrix sum(q q^T) over sampled input rows q.
q are integer codes less their zero point, so every sum is exact in float64 and independent of the samples' order.
A convolution's rows are its patches (im2col). This module must not keep activations or write files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from qdq.core.qtensor import QParams, to_codes
from qdq.measure.inference.samples import Sample, counted, length
from qdq.measure.inference.session import Tap
from qdq.measure.statistics import Moment, union
from qdq.model.model import Model
from qdq.model.nodes import attribute, attribute_value, ints
from qdq.plan.plan import Plan

MAX_SAMPLES = 64  # more do not change the matrices visibly; those with the smallest hash are taken
ROWS_PER_COLUMN = 8  # input rows per weight column, over all samples
MIN_ROWS = 8192  # input rows per weight at least, over all samples
THREADS = 2  # of ONNX Runtime: with three and more the last bits of its convolutions depend on their number
FLOAT_BITS = 11  # of rows that stay float: products of 22 bits, so sums over samples of like size are exact in float64
BUDGET_BYTES = 1 << 30  # matrices held at once; more weights take further passes over the samples

Weight = tuple[str, int | None]  # tensor and output channel axis: one tensor may be read along either
Grams = dict[Weight, npt.NDArray[np.float64]]


def columns(node: NodeProto, shape: tuple[int, ...]) -> int:
    """Weights per output channel, the side of the matrix: the length of one input row."""
    if node.op_type == "Conv":
        return int(np.prod(shape[1:]))
    return shape[-1] if attribute(node, "transB", 0) else shape[-2]


def collect(
    model: Model,
    plan: Plan,
    params: Mapping[str, QParams],
    samples: Iterable[Sample],
    *,
    divisors: Mapping[str, npt.NDArray[np.float32]] = MappingProxyType({}),
    on_progress: Callable[[int, int | None, str], None] | None = None,
) -> Grams:
    """Sum the second moments of the rows that each weight is multiplied with.

    Args:
        model: the prepared float model.
        plan: its points.
        params: activation tensor -> parameters, so that rows are what the integer kernel will see; rows of other
            tensors are in their own unit.
        samples: re-iterable; read twice or more when there are over MAX_SAMPLES or the matrices exceed BUDGET_BYTES.
        divisors: activation tensor -> (channels,) float32, what its channels are divided by before quantization.
        on_progress: called with (samples done, samples in all or None, text).

    Returns:
        Weight tensor and axis -> (groups, columns, columns) float64. Weights of more inputs than the
        settings' `moment_inputs`, batched ones, and those that nodes of different groups share are left out.
    """
    weights: dict[Weight, list[NodeProto]] = {}
    for point in plan.weights:
        info = model.info(point.tensor)
        assert info is not None and info.shape is not None
        shape = tuple(int(d) for d in info.shape if isinstance(d, int))
        nodes = [model.node(name) for name, _ in point.uses]
        if columns(nodes[0], shape) > plan.settings.moment_inputs:
            continue
        if nodes[0].op_type == "MatMul" and len(shape) > 2:
            continue
        if len({attribute(n, "group", 1) for n in nodes}) > 1:
            continue
        weights[point.tensor, point.spec.axis] = nodes
    samples = few(samples)
    grams: Grams = {}
    for batch in _batches(model, weights):
        tap = Tap(model, {n.input[0] for w in batch for n in weights[w]}, threads=THREADS)

        def found(batch: list[Weight] = batch, tap: Tap = tap) -> Iterator[dict[Weight, Moment]]:
            for index, sample in counted(samples):
                values = tap(sample)
                codes = {}
                for node in (node for weight in batch for node in weights[weight]):
                    if (name := node.input[0]) not in codes:
                        codes[name] = _centred(divided(values[name], divisors.get(name), node), params.get(name))
                for weight in batch:
                    shape = tuple(model.initializers[weight[0]].dims)
                    side = columns(weights[weight][0], shape)
                    rows = -(-max(MIN_ROWS, ROWS_PER_COLUMN * side) // len(samples))
                    for node in weights[weight]:
                        yield {weight: _moment(node, codes[node.input[0]], shape, rows)}
                if on_progress is not None:
                    on_progress(index + 1, len(samples), "second moments")

        grams |= {weight: moment.sums for weight, moment in union(found()).items()}
    return grams


def divided(
    values: npt.NDArray[np.floating], divisor: npt.NDArray[np.float32] | None, node: NodeProto
) -> npt.NDArray[np.floating]:
    """A node's data operand with its channels divided: axis 1 of a Conv, else the last one."""
    if divisor is None:
        return values
    shape = (-1, *(1,) * (values.ndim - 2)) if node.op_type == "Conv" else (-1,)
    return np.asarray(values / divisor.reshape(shape))


def _centred(values: npt.NDArray[np.floating], params: QParams | None) -> npt.NDArray[np.float32]:
    """Integer codes less their zero point; where the kernel reads floats, these on a grid that keeps the sums exact."""
    if params is None:
        amax = float(np.abs(values).max()) if values.size else 0.0
        step = np.float32(2.0 ** (math.frexp(amax)[1] - FLOAT_BITS)) if amax else np.float32(1)
        return np.asarray(np.rint(np.asarray(values, dtype=np.float32) / step) * step)
    return np.asarray(
        to_codes(np.asarray(values, dtype=np.float32), params).astype(np.float32) - np.float32(params.zero_point)
    )


@dataclass(frozen=True, slots=True)
class Few:
    """At most MAX_SAMPLES of some samples, by index; re-iterable."""

    samples: Iterable[Sample]
    chosen: frozenset[int]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.chosen)

    def __iter__(self) -> Iterator[Sample]:
        """The samples in their order."""
        return (sample for index, sample in enumerate(self.samples) if index in self.chosen)


def few(samples: Iterable[Sample]) -> Few:
    """The MAX_SAMPLES samples with the smallest hashes, all where there are no more; of a Few, itself.

    Args:
        samples: re-iterable; read once, unless their number is known and small.

    Raises:
        InputError: there is no sample.
    """
    if isinstance(samples, Few):
        return samples
    total = length(samples)
    if total is not None and 0 < total <= MAX_SAMPLES:
        return Few(samples, frozenset(range(total)))
    hashes = []
    for index, sample in counted(samples):
        digest = hashlib.sha256()
        for name in sorted(sample):
            digest.update(np.ascontiguousarray(sample[name]).tobytes())
        hashes.append((digest.digest(), index))
    return Few(samples, frozenset(index for _, index in sorted(hashes)[:MAX_SAMPLES]))


def _batches(model: Model, weights: Mapping[Weight, list[NodeProto]]) -> list[list[Weight]]:
    """Weights in groups whose matrices fit the budget, in the plan's order."""
    batches: list[list[Weight]] = []
    room = 0
    for weight, nodes in weights.items():
        node = nodes[0]
        size = (
            8
            * columns(node, tuple(model.initializers[weight[0]].dims)) ** 2
            * (attribute(node, "group", 1) if node.op_type == "Conv" else 1)
        )
        if size > room:
            batches.append([])
            room = BUDGET_BYTES
        batches[-1].append(weight)
        room -= size
    return batches


def _moment(node: NodeProto, codes: npt.NDArray[np.float32], shape: tuple[int, ...], rows: int) -> Moment:
    """(groups, columns, columns): second moment of up to `rows` input rows, evenly spaced."""
    if node.op_type != "Conv":
        flat = codes.T if attribute(node, "transA", 0) else codes
        flat = flat.reshape(-1, flat.shape[-1])
        return Moment.of(flat[_spaced(flat.shape[0], rows)][None])
    groups = attribute(node, "group", 1)
    patches = _patches(node, codes, shape, rows).reshape(-1, groups, shape[1] * int(np.prod(shape[2:])))
    return Moment.of(patches.transpose(1, 0, 2))


def _spaced(length: int, count: int) -> npt.NDArray[np.int64]:
    """Up to `count` indices spread over range(length) by a fixed pseudo-random choice."""
    if length <= count:
        return np.arange(length)
    return np.sort(np.random.default_rng(length).choice(length, count, replace=False))


def _patches(
    node: NodeProto, codes: npt.NDArray[np.float32], shape: tuple[int, ...], rows: int
) -> npt.NDArray[np.float32]:
    """(rows, channels * kernel) float32: the patches under sampled output positions, channel-major as in the weight."""
    spatial, kernel = len(shape) - 2, shape[2:]
    strides, dilations = ints(node, "strides", [1] * spatial), ints(node, "dilations", [1] * spatial)
    pads = ints(node, "pads", [0] * 2 * spatial)
    auto = attribute_value(node, "auto_pad", b"NOTSET")
    if auto.startswith(b"SAME"):  # only where a dynamic size kept `prepare` from writing the pads
        axes = zip(codes.shape[2:], kernel, strides, dilations, strict=True)
        totals = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in axes]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        pads = less + more if auto == b"SAME_UPPER" else more + less
    padded = np.pad(codes, [(0, 0), (0, 0), *((pads[i], pads[i + spatial]) for i in range(spatial))])
    extent = [(padded.shape[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(spatial)]
    positions = np.unravel_index(_spaced(padded.shape[0] * int(np.prod(extent)), rows), [padded.shape[0], *extent])
    offsets = np.stack([g.reshape(-1) for g in np.meshgrid(*(np.arange(k) for k in kernel), indexing="ij")])
    index = [positions[1 + i][:, None] * strides[i] + offsets[i][None] * dilations[i] for i in range(spatial)]
    taken = padded[(positions[0][:, None], slice(None), *index)]  # (rows, kernel, channels)
    return np.asarray(taken.transpose(0, 2, 1).reshape(taken.shape[0], -1))
