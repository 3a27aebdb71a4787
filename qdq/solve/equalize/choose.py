"""Equalization: divide the channels of a quantized tensor by constants and multiply them into the weights that read it.

Model + Plan + parameters + samples -> per tensor (channel scales, new parameters) where that is predicted to pay.
The float outputs stay equal. `insert` writes the division as one Mul in front of the quantizer, which the compiler
fuses into the kernel there. This module must not change the graph; the formulas are in `formulas`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import CHUNK, QParams, from_codes, representable, to_codes
from qdq.core.resources import cores
from qdq.measure.inference.samples import Sample, overlapped
from qdq.measure.ranges import asymmetric
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.spec import Spec
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.equalize.channels import Equalized, candidates, look
from qdq.solve.equalize.formulas import Formula
from qdq.solve.shift import shifts

HEADROOM = 1.25  # range of an equalized tensor over its calibrated one: equalized channels all lie near the limit


def equalized(
    model: Model,
    plan: Plan,
    nodes: Mapping[str, WeightedNode],
    params: Mapping[str, QParams],
    samples: Iterable[Sample],
    *,
    formula: Formula,
    on_progress: Progress | None = None,
) -> dict[str, Equalized]:
    """Decide which tensors to equalize.

    For each candidate the noise at its consumers' outputs is predicted with and without channel scales: the rounding
    and clipping error of sampled channel vectors weighted by the squared weights that read them, plus the weights' own
    rounding error at the mean power of the inputs.

    `params` are those without equalization; tensors that they lack are left alone. At most `second_moments.MAX_SAMPLES`
    of the samples, which are read more than once, are run.

    Returns:
        Tensor -> scales and parameters, for those with a predicted gain of at least what the formula asks for.
    """
    wanted = {tensor: readers for tensor, readers in candidates(plan, nodes).items() if tensor in params}
    points = {p.tensor: p for p in plan.activations}
    seen = look(model, wanted, samples, on_progress)
    found: dict[str, Equalized] = {}
    for tensor, readers in wanted.items():
        rows, limits = seen[tensor].rows, seen[tensor].limits
        if rows.shape[1] < 2:
            continue
        first = {node.weight: node for node in reversed(readers)}
        matrices = [by_input(model, first[weight]) for weight in dict.fromkeys(node.weight for node in readers)]
        each = [sizes(m) for m in matrices]
        wmax, read = np.max([most for most, _ in each], axis=0), np.sum([power for _, power in each], axis=0)
        amax = np.maximum(-limits.low, limits.high)
        fmt = FORMATS[points[tensor].spec.format]
        shifted = shifts(model, points[tensor])
        limit = min(FORMATS[node.spec.format].high for node in readers)  # of the coarsest weight
        plain = _noise(rows, matrices, read, np.ones_like(amax), params[tensor], limit)
        for s in (t.astype(np.float32).astype(np.float64) for t in formula.candidates(amax, wmax)):
            low = HEADROOM * min(float((limits.low / s).min()), 0.0)
            high = HEADROOM * max(float((limits.high / s).max()), 0.0)
            if high - low <= 0:
                continue
            scale, zero_point = asymmetric(low, high, fmt) if shifted else (max(-low, high) / fmt.high, 0)
            stored = representable(scale, model.dtype(tensor))
            divided = QParams(scale=stored, zero_point=zero_point, format=fmt.name)
            equalized = _noise(rows, matrices, read, s, divided, limit)
            gain_db = 10 * np.log10(plain / equalized) if equalized > 0 and plain > 0 else 0.0
            if gain_db >= formula.minimum_gain_db and (tensor not in found or gain_db > found[tensor].gain_db):
                found[tensor] = Equalized(scale=s.astype(np.float32), params=divided, gain_db=float(gain_db))
    return found


def data_errors(rows: Floats, s: Floats, params: QParams) -> Floats:
    """(vectors, channels) squared errors of channels divided by s and quantized, in their own unit."""
    divided = rows / s
    error = (from_codes(to_codes(divided, params), params).astype(np.float64) - divided) * s
    return np.asarray(error**2)


def weight_error(matrix: npt.NDArray[np.floating], spec: Spec, power: Floats, s: Floats) -> float:
    """Error power of a product by its weight's codes, half a step each way at most, for inputs of some power."""
    block = spec.block or matrix.shape[0]
    starts = np.arange(0, matrix.shape[0], block)
    powers, total = np.add.reduceat(power, starts), 0.0
    step = max(1, CHUNK // max(matrix.shape[0], 1))
    for start in range(0, matrix.shape[1], step):
        scaled = np.abs(matrix[:, start : start + step, 0].astype(np.float64)) * s[:, None]
        steps = np.maximum.reduceat(scaled, starts, axis=0) / FORMATS[spec.format].high
        total += float((steps**2).sum(axis=1) @ powers) / 12
    return total


def by_input(model: Model, node: WeightedNode) -> npt.NDArray[np.floating]:
    """(input channels, output channels, taps) of a weight, as a view where that is possible."""
    moved = np.moveaxis(model.array(node.weight), node.input_axis, 0)
    if node.window:
        return np.asarray(moved.reshape(moved.shape[0], moved.shape[1], -1))
    return np.asarray(np.moveaxis(moved, -1, 1).reshape(moved.shape[0], moved.shape[-1], -1))


def _pieces(matrix: npt.NDArray[np.floating]) -> list[tuple[slice, slice]]:
    """Parts of the input and output channels, each of about CHUNK weights, that cut the longer way in memory."""
    inputs, outputs, taps = matrix.shape
    by_inputs = matrix.strides[0] >= matrix.strides[1]
    step = max(1, CHUNK // max((outputs if by_inputs else inputs) * taps, 1))
    parts = [slice(i, i + step) for i in range(0, inputs if by_inputs else outputs, step)]
    return [(part, slice(None)) if by_inputs else (slice(None), part) for part in parts]


def sizes(matrix: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
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
    most, factor = np.zeros(matrix.shape[1]), s.astype(np.float32)[:, None, None]

    def look(piece: tuple[slice, slice]) -> Floats:
        scaled = np.asarray(matrix[piece] * factor[piece[0]], dtype=np.float32)
        return np.asarray(np.maximum(scaled.max(axis=(0, 2)), -scaled.min(axis=(0, 2))), dtype=np.float64)

    pieces = _pieces(matrix)
    for piece, largest in zip(pieces, overlapped(look, pieces, cores()), strict=True):
        np.maximum(most[piece[1]], largest, out=most[piece[1]])
    return most


def _noise(
    rows: Floats, matrices: list[npt.NDArray[np.floating]], read: Floats, s: Floats, params: QParams, limit: int
) -> float:
    """Predicted error power at the consumers' outputs per position, for channels divided by s.

    `read` is the sum of squares of the weights that read each channel.
    """
    data = float(data_errors(rows, s, params).mean(axis=0) @ read)
    power = float(((rows / s) ** 2).mean(axis=0).sum())
    weights = math.fsum(float(((_peaks(m, s) / limit) ** 2).sum()) / 12 * m.shape[2] for m in matrices)
    return data + weights * power
