"""Equalization: divide the channels of a quantized tensor by constants and multiply them into the weights that read it.

Model + Plan + parameters + samples -> per tensor (channel scales, new parameters) where that is predicted to pay.
The float outputs stay equal. `insert` writes the division as one Mul in front of the quantizer, which the compiler
fuses into the kernel there. This module must not change the graph; the formulas are in `formulas`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats
from qdq.core.formats import FORMATS
from qdq.core.qtensor import CHUNK, QParams, from_codes, to_codes
from qdq.core.resources import cores
from qdq.measure.inference.samples import overlapped
from qdq.measure.ranges import covering
from qdq.measure.statistics import ChannelRange
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.spec import Spec
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.equalize.channels import Channels, Equalized, candidates
from qdq.solve.equalize.formulas import Formula
from qdq.solve.shift import shifts

_Way = tuple[Floats, QParams]  # channel scales, and the parameters of what is divided by them
ROWS = 1024  # vectors of a part held out that candidates are compared on, at most
FEW = 2.0  # times as much headroom where a sample shows one vector: so few say little of the largest to come


def equalized(
    model: Model,
    plan: Plan,
    nodes: Mapping[str, WeightedNode],
    params: Mapping[str, QParams],
    seen: Mapping[str, Channels],
    *,
    formula: Formula,
) -> dict[str, Equalized]:
    """Decide which tensors to equalize.

    For each candidate the noise at its consumers' outputs is predicted with and without channel scales: the rounding
    and clipping error of sampled channel vectors weighted by the squared weights that read them, plus the weights' own
    rounding error at the mean power of the inputs.

    `params` are those without equalization; tensors that they or `seen`, what samples show, lack are left alone.

    Returns:
        Tensor -> scales and parameters, for those with a predicted gain of at least what the formula asks for.
    """
    wanted = {t: readers for t, readers in candidates(plan, nodes).items() if t in params and t in seen}
    points = {p.tensor: p for p in plan.activations}
    found: dict[str, Equalized] = {}
    for tensor, readers in wanted.items():
        limits = seen[tensor].limits
        if limits.low.size < 2:
            continue
        first = {node.weight: node for node in reversed(readers)}
        weights = [_Weight.of(model, node) for node in first.values()]
        each = [sizes(weight.matrix) for weight in weights]
        wmax, read = np.max([most for most, _ in each], axis=0), np.sum([power for _, power in each], axis=0)
        fmt = points[tensor].spec.format
        limit = min(FORMATS[node.spec.format].high for node in readers)  # of the coarsest weight
        divide = _Divide(
            formula=formula,
            headroom=formula.headroom * (FEW if formula.held_out and seen[tensor].single else 1),
            wmax=np.ones_like(wmax) if all(weight.depthwise for weight in weights) else wmax,
            covering=partial(covering, fmt_name=fmt, dtype=model.dtype(tensor), shift=shifts(model, points[tensor])),
        )
        ways = divide.ways(limits)
        if formula.held_out:
            best = _validated(seen[tensor], weights, read, params[tensor], divide, limit)
        else:
            shown, same = seen[tensor], (np.ones_like(read), params[tensor])
            plain, *noises = _noises(shown.rows(), shown.count, weights, read, [same, *ways.values()], limit)
            gains = [(_decibels(plain, noise), way) for way, noise in zip(ways, noises, strict=True)]
            best = max(gains, key=lambda gain: gain[0], default=None)
        if best is not None and best[0] >= formula.minimum_gain_db and best[1] in ways:
            s, divided = ways[best[1]]
            found[tensor] = Equalized(scale=s.astype(np.float32), params=divided, gain_db=best[0])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Divide:
    """How the channels of one tensor may be divided; `wmax` is the largest weight that reads each."""

    formula: Formula
    headroom: float
    wmax: Floats
    covering: Callable[[float, float], QParams]

    def ways(self, limits: ChannelRange) -> dict[int, _Way]:
        """The formula's candidates for channels of these ranges, by number, but those that leave no range."""
        found = {}
        amax = np.maximum(-limits.low, limits.high)
        for number, s in enumerate(self.formula.candidates(amax, self.wmax)):
            s = s.astype(np.float32).astype(np.float64)
            low = self.headroom * min(float((limits.low / s).min()), 0.0)
            high = self.headroom * max(float((limits.high / s).max()), 0.0)
            if high - low > 0:
                found[number] = s, self.covering(low, high)
        return found


def _validated(
    seen: Channels, weights: Sequence[_Weight], read: Floats, plain: QParams, divide: _Divide, limit: int
) -> tuple[float, int] | None:
    """The way of least noise on parts of the samples that its ranges were not made from, with its gain in decibels.

    None where no way has less noise than `plain`, whose range shrinks with what each turn leaves, in every turn. It
    must win without headroom too: that is for data which differ more than these parts do.
    """
    whole, tight = max(_amax(seen.limits), float(np.finfo(np.float64).tiny)), replace(divide, headroom=1.0)
    found = []
    for turn in seen.turns():
        rows = turn.held[:: -(-len(turn.held) // ROWS)]
        same = np.ones_like(read), plain.times(_amax(turn.limits) / whole)
        ways, narrow = divide.ways(turn.limits), tight.ways(turn.limits)
        first, *others = _noises((rows,), len(rows), weights, read, [same, *ways.values(), *narrow.values()], limit)
        pairs = zip(others[: len(ways)], others[len(ways) :], strict=True)
        found.append((first, dict(zip(ways, map(max, pairs), strict=True))))
    if not found:
        return None
    better = [way for way in found[0][1] if all(noises.get(way, first) < first for first, noises in found)]
    total = math.fsum(first for first, _ in found)
    gains = [(_decibels(total, math.fsum(noises[way] for _, noises in found)), way) for way in better]
    return max(gains, key=lambda gain: gain[0], default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A weight that reads a tensor.

    Attributes:
        matrix: (input channels, output channels that read one, taps).
        depthwise: each output channel reads one input channel, so that its scale takes what that is divided by.
    """

    matrix: npt.NDArray[np.floating]
    depthwise: bool

    @classmethod
    def of(cls, model: Model, node: WeightedNode) -> _Weight:
        """That of a node."""
        return cls(matrix=by_input(model, node), depthwise=node.groups > 1)

    def error(self, s: Floats, power: Floats) -> float:
        """Error power of rounding its codes in units of 1/12 step of a grid that ends at 1, for channels divided by s.

        `power` is the (input channels,) mean square of the data.
        """
        taps = self.matrix.shape[2]
        if self.depthwise:
            peaks = np.abs(self.matrix).max(axis=2).astype(np.float64)
            lost = float(np.square(peaks).sum(axis=1) @ power)
            return lost * float(taps)
        return float((_peaks(self.matrix, s) ** 2).sum()) * float(taps) * float((power / s**2).sum())


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
    """(input channels, output channels that read one, taps) of a weight, as a view where that is possible."""
    if node.groups > 1:  # depthwise
        return np.asarray(model.array(node.weight).reshape(node.groups, node.shape[0] // node.groups, -1))
    moved = np.moveaxis(model.array(node.weight), node.input_axis, 0)
    if node.channel_axis == 1:
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


def _noises(
    vectors: Iterable[Floats],
    count: int,
    weights: Sequence[_Weight],
    read: Floats,
    ways: Sequence[_Way],
    limit: int,
) -> list[float]:
    """Predicted error power at the consumers' outputs per position, for channels divided by s and quantized, each way.

    `vectors` are `count` of the channels' in arrays, `read` the sum of squares of the weights that read each channel.
    """
    power, errors = np.zeros_like(read), np.zeros((len(ways), *read.shape))
    for rows in vectors:
        power += np.square(rows).sum(axis=0)
        for way, (s, params) in enumerate(ways):
            errors[way] += data_errors(rows, s, params).sum(axis=0)
    power /= count
    return [
        float(errors[way] / count @ read) + math.fsum(weight.error(s, power) for weight in weights) / limit**2 / 12
        for way, (s, _) in enumerate(ways)
    ]


def _decibels(before: float, after: float) -> float:
    """By how much a noise falls; 0 where there is none."""
    return float(10 * np.log10(before / after)) if before > 0 and after > 0 else 0.0


def _amax(limits: ChannelRange) -> float:
    return float(np.maximum(-limits.low, limits.high).max())
