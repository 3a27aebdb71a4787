"""Equalization: divide the channels of a quantized tensor by constants and multiply them into the weights that read it.

Model + Plan + parameters + samples -> per tensor (channel scales, new parameters) where that is predicted to pay.
The float outputs stay equal. `insert` writes the division as one Mul in front of the quantizer, which the compiler
fuses into the kernel there. This module must not change the graph; the formulas are in `qdq.equalize`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from qdq import gram
from qdq.calibrate import Progress
from qdq.footprint import cores
from qdq.formats import FORMATS
from qdq.graph import Model
from qdq.nodes import attribute, input_axis, ints
from qdq.observers import ChannelRange, asymmetric, union
from qdq.plan import Plan, Point
from qdq.qtensor import CHUNK, QParams, from_codes, representable, to_codes
from qdq.scheme import Spec
from qdq.tap import Sample, Tap, counted, overlapped

ROWS = 8192  # channel vectors looked at per tensor, over all samples
HEADROOM = 1.25  # range of an equalized tensor over its calibrated one: equalized channels all lie near the limit
MINIMUM_GAIN_DB = 3.0  # predicted; below it the estimate is not trusted and the tensor is left alone

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalized:
    """One tensor whose channels are divided before it is quantized.

    Attributes:
        scale: (channels,) float32 divisors.
        params: quantization of the divided tensor.
        gain_db: predicted fall of the error at the consumers' outputs.
    """

    scale: npt.NDArray[np.float32]
    params: QParams
    gain_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """What samples show of one tensor's channels, as a `Statistic`.

    Attributes:
        limits: the exact range of each.
        parts: (vectors, channels) each, some of the channel vectors.
    """

    limits: ChannelRange
    parts: tuple[npt.NDArray[np.float32], ...]

    def merge(self, other: Channels) -> Channels:
        """What both show."""
        return Channels(limits=self.limits.merge(other.limits), parts=(*self.parts, *other.parts))

    @property
    def rows(self) -> Floats:
        """(vectors, channels), a new array: the same whatever the samples' order, so that sums over them are."""
        return np.concatenate(sorted(self.parts, key=np.ndarray.tobytes)).astype(np.float64)


def shifts(model: Model, point: Point) -> bool:
    """Whether the codes of an activation may be asymmetric: that is asked for, and all its readers allow it."""
    return point.spec.shift and all(_can_shift(model, name, index) for name, index in point.uses)


def _can_shift(model: Model, name: str, index: int) -> bool:
    """Whether a constant subtracted from operand `index` of a node can be made up for exactly behind the node.

    Conv needs explicit, non-negative padding (the border is then padded before the shift); Gemm and MatMul always can;
    a shortcut gets the constant back by an Add. A float16 model cannot: the correction c * sum(W) would have to be
    stored in float16, which may not hold it.
    """
    node = model.node(name)
    if model.dtype(node.input[index]) == "float16":
        return False
    if node.op_type != "Conv":
        return True
    auto = next((a.s for a in node.attribute if a.name == "auto_pad"), b"NOTSET")
    return auto in (b"NOTSET", b"VALID") and all(p >= 0 for p in ints(node, "pads", [0]))


def data_readers(model: Model, point: Point) -> list[NodeProto]:
    """The nodes that multiply an activation's channels by constant weights, if they are all that reads its codes.

    Every one is a Conv, or every one a Gemm or MatMul without transA; none for any other activation, or where it is
    tied to another.
    """
    nodes = [model.node(name) for name, _ in point.uses]
    plain = all(
        index == 0
        and not attribute(node, "transA", 0)
        and model.is_constant(node.input[1])
        and len(model.initializers[node.input[1]].dims) >= 2
        for node, (_, index) in zip(nodes, point.uses, strict=True)
    )
    return nodes if plain and point.tie is None and len({node.op_type == "Conv" for node in nodes}) == 1 else []


def candidates(model: Model, plan: Plan) -> dict[str, list[str]]:
    """Activation tensors that may be equalized -> the weights that read them.

    Every reader is an ungrouped Conv, or every one a Gemm or MatMul without transA; no weight is shared with another
    tensor; the tensor is no shortcut and is tied to no other.
    """
    reads: dict[str, set[str]] = {}
    for point in plan.weights:
        reads.setdefault(point.tensor, set()).update(model.node(name).input[0] for name, _ in point.uses)
    found = {}
    for point in plan.activations:
        nodes = data_readers(model, point)
        if nodes and all(attribute(n, "group", 1) == 1 and reads.get(n.input[1]) == {point.tensor} for n in nodes):
            found[point.tensor] = list(dict.fromkeys(n.input[1] for n in nodes))
    return found


def choose(
    model: Model,
    plan: Plan,
    params: Mapping[str, QParams],
    samples: Iterable[Sample],
    *,
    formula: str,
    on_progress: Progress | None = None,
) -> dict[str, Equalized]:
    """Decide which tensors to equalize.

    For each candidate the noise at its consumers' outputs is predicted with and without channel scales: the rounding
    and clipping error of sampled channel vectors weighted by the squared weights that read them, plus the weights' own
    rounding error at the mean power of the inputs.

    Args:
        model: the prepared float model.
        plan: its points.
        params: activation tensor -> parameters without equalization.
        samples: re-iterable calibration samples; at most `gram.MAX_SAMPLES` of them are run.
        formula: a file name in `qdq.equalize`.
        on_progress: called with (samples done, samples in all or None, text).

    Returns:
        Tensor -> scales and parameters, for those with a predicted gain of at least MINIMUM_GAIN_DB.
    """
    module: Any = importlib.import_module(f"qdq.equalize.{formula}")
    readers = candidates(model, plan)
    points = {p.tensor: p for p in plan.activations if p.tensor in readers}
    seen = look(model, points, samples, on_progress)
    found: dict[str, Equalized] = {}
    for tensor, weights in readers.items():
        rows, limits = seen[tensor].rows, seen[tensor].limits
        if rows.shape[1] < 2:
            continue
        matrices = [_by_input(model, points[tensor], weight) for weight in weights]
        sizes = [_sizes(m) for m in matrices]
        wmax, read = np.max([most for most, _ in sizes], axis=0), np.sum([power for _, power in sizes], axis=0)
        amax = np.maximum(-limits.low, limits.high)
        fmt = FORMATS[points[tensor].spec.format]
        shifted = shifts(model, points[tensor])
        limit = _limit(plan, weights, fmt.high)
        plain = _noise(rows, matrices, read, np.ones_like(amax), params[tensor], limit)
        tried = module.candidates(amax, wmax) if hasattr(module, "candidates") else [module.scales(amax, wmax)]
        least = getattr(module, "MINIMUM_GAIN_DB", MINIMUM_GAIN_DB)
        for s in (t.astype(np.float32).astype(np.float64) for t in tried):
            low = HEADROOM * min(float((limits.low / s).min()), 0.0)
            high = HEADROOM * max(float((limits.high / s).max()), 0.0)
            if high - low <= 0:
                continue
            scale, zero_point = asymmetric(low, high, fmt) if shifted else (max(-low, high) / fmt.high, 0)
            stored = representable(scale, model.dtype(tensor))
            divided = QParams(scale=stored, zero_point=zero_point, format=fmt.name)
            equalized = _noise(rows, matrices, read, s, divided, limit)
            gain_db = 10 * np.log10(plain / equalized) if equalized > 0 and plain > 0 else 0.0
            if gain_db >= least and (tensor not in found or gain_db > found[tensor].gain_db):
                found[tensor] = Equalized(scale=s.astype(np.float32), params=divided, gain_db=float(gain_db))
    return found


def look(
    model: Model, points: Mapping[str, Point], samples: Iterable[Sample], on_progress: Progress | None
) -> dict[str, Channels]:
    """What samples show of some activation tensors.

    Args:
        model: the prepared float model.
        points: tensor -> its point.
        samples: re-iterable; at most `gram.MAX_SAMPLES` of them are run.
        on_progress: called with (samples done, samples in all or None, text).

    Returns:
        Tensor -> what they show of its channels.
    """
    if not points:
        return {}
    tap = Tap(model, list(points), threads=gram.THREADS)
    samples = gram.few(samples)
    each = max(1, ROWS // len(samples))
    convolved = {tensor: model.node(point.uses[0][0]).op_type == "Conv" for tensor, point in points.items()}

    def seen() -> Iterator[dict[str, Channels]]:
        for index, sample in counted(samples):
            yield {tensor: _one(values, convolved[tensor], each) for tensor, values in tap(sample).items()}
            if on_progress is not None:
                on_progress(index + 1, len(samples), "channel ranges")

    return union(seen())


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Predicted error power at the outputs of all readers of one tensor over that of the outputs, mean over rows.

    Every row counts alike, however small: it is a token, whose neighbours' size does not make its errors matter less.

    Attributes:
        data: of the tensor's codes with one scale.
        tokens: of its codes with one scale per row.
        weights: of the weights' codes, rounded to nearest.
    """

    data: float
    tokens: float
    weights: float


def errors(
    model: Model,
    plan: Plan,
    points: Mapping[str, Point],
    params: Mapping[str, QParams],
    divisors: Mapping[str, npt.NDArray[np.float32]],
    samples: Iterable[Sample],
    *,
    on_progress: Progress | None = None,
) -> dict[str, Errors]:
    """What the roundings of some tensors and of the weights that read them do to the products.

    Args:
        model: the prepared float model.
        plan: of it; says how the weights are stored.
        points: tensor -> its point; all readers are Gemm or MatMul.
        params: tensor -> parameters with one scale.
        divisors: tensor -> (channels,) what its channels are divided by for that scale.
        samples: re-iterable; at most `gram.MAX_SAMPLES` of them are run.
        on_progress: called with (samples done, samples in all or None, text).
    """
    specs = {name: p.spec for p in plan.weights for name, _ in p.uses}
    found = {}
    for tensor, seen in look(model, points, samples, on_progress).items():
        rows = seen.rows
        s = divisors[tensor].astype(np.float64) if tensor in divisors else np.ones(rows.shape[1])
        readers = [model.node(name) for name, _ in points[tensor].uses]
        matrices = [_by_input(model, points[tensor], node.input[1]) for node in readers]
        read = np.sum([_sizes(matrix)[1] for matrix in matrices], axis=0)
        signal = np.square(rows) @ read
        share = np.divide(1, signal, out=np.zeros_like(signal), where=signal > 0) / max(len(signal), 1)
        power = share @ np.square(rows)
        step = np.abs(rows).max(axis=1, keepdims=True) / FORMATS[params[tensor].format].high
        rest = rows - np.rint(np.divide(rows, step, out=np.zeros_like(rows), where=step > 0)) * step
        each = zip(readers, matrices, strict=True)
        found[tensor] = Errors(
            data=float(share @ _data_errors(rows, s, params[tensor]) @ read),
            tokens=float(share @ np.square(rest) @ read),
            weights=math.fsum(_weight_error(m, specs[node.name], power / s**2, s) for node, m in each),
        )
    return found


def _data_errors(rows: Floats, s: Floats, params: QParams) -> Floats:
    """(vectors, channels) squared errors of channels divided by s and quantized, in their own unit."""
    divided = rows / s
    error = (from_codes(to_codes(divided, params), params).astype(np.float64) - divided) * s
    return np.asarray(error**2)


def _weight_error(matrix: npt.NDArray[np.floating], spec: Spec, power: Floats, s: Floats) -> float:
    """Error power of a product by its weight's codes, half a step each way at most, for inputs of some power."""
    block = spec.block or matrix.shape[0]
    starts = np.arange(0, matrix.shape[0], block)
    powers = np.add.reduceat(power, starts)
    total = 0.0
    step = max(1, CHUNK // max(matrix.shape[0], 1))
    for start in range(0, matrix.shape[1], step):
        scaled = np.abs(matrix[:, start : start + step, 0].astype(np.float64)) * s[:, None]
        steps = np.maximum.reduceat(scaled, starts, axis=0) / FORMATS[spec.format].high
        total += float((steps**2).sum(axis=1) @ powers) / 12
    return total


def _limit(plan: Plan, weights: list[str], otherwise: int) -> int:
    """The largest code of the coarsest of some weights."""
    return min((FORMATS[p.spec.format].high for p in plan.weights if p.tensor in weights), default=otherwise)


def _one(values: npt.NDArray[np.floating], convolved: bool, each: int) -> Channels:
    """What one sample shows of a tensor, with `each` of its channel vectors."""
    grid = values.reshape(*values.shape[:2], -1) if convolved else values.reshape(-1, values.shape[-1], 1)
    positions = grid.shape[0] * grid.shape[2]
    picked = np.random.default_rng(positions).choice(positions, min(each, positions), replace=False)
    first, last = np.divmod(np.sort(picked), grid.shape[2])
    return Channels(limits=ChannelRange.of(grid, axis=1), parts=(grid[first, :, last].astype(np.float32),))


def _by_input(model: Model, point: Point, weight: str) -> npt.NDArray[np.floating]:
    """(input channels, output channels, taps) of a weight, as a view where that is possible."""
    node = next(model.node(name) for name, _ in point.uses if model.node(name).input[1] == weight)
    values = model.array(weight)
    moved = np.moveaxis(values, input_axis(node, values.ndim), 0)
    if node.op_type == "Conv":
        return np.asarray(moved.reshape(moved.shape[0], moved.shape[1], -1))
    return np.asarray(np.moveaxis(moved, -1, 1).reshape(moved.shape[0], moved.shape[-1], -1))


def _pieces(matrix: npt.NDArray[np.floating]) -> list[tuple[slice, slice]]:
    """Parts of the input and output channels, each of about CHUNK weights, that cut the longer way in memory."""
    inputs, outputs, taps = matrix.shape
    if matrix.strides[0] >= matrix.strides[1]:
        step = max(1, CHUNK // max(outputs * taps, 1))
        return [(slice(i, i + step), slice(None)) for i in range(0, inputs, step)]
    step = max(1, CHUNK // max(inputs * taps, 1))
    return [(slice(None), slice(i, i + step)) for i in range(0, outputs, step)]


def _sizes(matrix: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    """(input channels,) each: the largest magnitude and the sum of squares of the weights that read a channel."""
    most, power = np.zeros(matrix.shape[0]), np.zeros(matrix.shape[0])

    def look(piece: tuple[slice, slice]) -> tuple[Floats, Floats]:
        wide = matrix[piece].astype(np.float64)
        largest = np.maximum(wide.max(axis=(1, 2)), -wide.min(axis=(1, 2)))
        return largest, np.square(wide, out=wide).sum(axis=(1, 2))

    pieces = _pieces(matrix)
    for piece, (largest, squares) in zip(pieces, overlapped(look, pieces, cores()), strict=True):
        np.maximum(most[piece[0]], largest, out=most[piece[0]])
        power[piece[0]] += squares
    return most, power


def _peaks(matrix: npt.NDArray[np.floating], s: Floats) -> Floats:
    """(output channels,) the largest magnitude of the weights of each, multiplied by the channel scales."""
    most = np.zeros(matrix.shape[1])
    factor = s.astype(np.float32)[:, None, None]

    def look(piece: tuple[slice, slice]) -> Floats:
        scaled = np.asarray(matrix[piece] * factor[piece[0]], dtype=np.float32)
        return np.asarray(np.maximum(scaled.max(axis=(0, 2)), -scaled.min(axis=(0, 2))), dtype=np.float64)

    pieces = _pieces(matrix)
    for piece, largest in zip(pieces, overlapped(look, pieces, cores()), strict=True):
        np.maximum(most[piece[1]], largest, out=most[piece[1]])
    return most


def _noise(
    rows: Floats,
    matrices: list[npt.NDArray[np.floating]],
    read: Floats,
    s: Floats,
    params: QParams,
    limit: int,
) -> float:
    """Predicted error power at the consumers' outputs per position, for channels divided by s.

    `read` is the sum of squares of the weights that read each channel.
    """
    data = float(_data_errors(rows, s, params).mean(axis=0) @ read)
    power = float(((rows / s) ** 2).mean(axis=0).sum())
    weights = math.fsum(float(((_peaks(m, s) / limit) ** 2).sum()) / 12 * m.shape[2] for m in matrices)
    return data + weights * power
