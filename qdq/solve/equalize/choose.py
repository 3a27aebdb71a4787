"""Equalization: divide the channels of a quantized tensor by constants and multiply them into the weights that read it.

Model + Plan + parameters + samples -> per tensor (channel scales, new parameters) where that is predicted to pay.
The float outputs stay equal. `insert` writes the division as one Mul in front of the quantizer, which the compiler
fuses into the kernel there. This module must not change the graph; the formulas are in `formulas`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats
from qdq.core.formats import FORMATS, Format
from qdq.core.progress import Progress
from qdq.core.qtensor import CHUNK, QParams, from_codes, representable, to_codes
from qdq.core.resources import cores
from qdq.measure.inference.samples import Sample, overlapped
from qdq.measure.ranges import asymmetric
from qdq.measure.statistics import ChannelRange
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.spec import Spec
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.equalize.channels import Equalized, Turn, candidates, look
from qdq.solve.equalize.formulas import FORMULAS, Formula

HEADROOM = 1.25  # range of an equalized tensor over its calibrated one: equalized channels all lie near the limit
HEADROOMS = (1.0, 1.25, 1.5, 2.0)  # tried where samples are held out: a few vectors say little of the largest to come
WIDER_GAIN_DB = 0.25  # predicted, for a wider range: it costs nothing
LEAST = 0.01  # of the noise of all tensors over their signals: what dividing one must take away, which costs a Mul


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
    """Decide which tensors to equalize, and which need a wider range than was measured.

    For each candidate the noise at its consumers' outputs is predicted with and without channel scales: the rounding
    and clipping error of sampled channel vectors weighted by the squared weights that read them, plus the weights' own
    rounding error at the mean power of the inputs. A formula that is `judged` is judged on samples held out: the
    vectors of a part of them, with the scales that the ranges of the others ask for; so are wider ranges.

    `params` are those without equalization; tensors that they lack are left alone. At most `second_moments.MAX_SAMPLES`
    of the samples, which are read more than once, are run.

    Returns:
        Tensor -> scales and parameters, for those with a predicted gain of at least what the formula asks for; all
        scales are 1 where a wider range alone is as good.
    """
    wanted = {tensor: readers for tensor, readers in candidates(plan, nodes).items() if tensor in params}
    points = {p.tensor: p for p in plan.activations}
    seen = look(model, wanted, samples, on_progress)
    made: dict[str, _Choices] = {}
    found: dict[str, Equalized] = {}
    for tensor, nodes_of in wanted.items():
        channels = seen[tensor]
        rows = channels.rows
        if rows.shape[1] < 2:
            continue
        turns = channels.turns() if formula.judged else []
        rule = formula if turns or not formula.judged else FORMULAS["smoothquant"]
        judge = _Judge(
            grid=_Grid(
                format=FORMATS[points[tensor].spec.format],
                asymmetric=params[tensor].zero_point != 0,
                dtype=model.dtype(tensor),
            ),
            readers=_Readers.of(model, nodes_of, power=np.square(rows).mean(axis=0)),
            limits=channels.limits,
            turns=turns or [Turn(limits=channels.limits, held=rows)],
        )
        plain = judge.plain(params[tensor])
        wider = [judge.wider(headroom) for headroom in HEADROOMS] if turns else []
        undivided = min([plain, *wider], key=lambda choice: choice.noise)
        if decibels(plain.noise, undivided.noise) < WIDER_GAIN_DB:
            undivided = plain
        divided = judge.divided(rule, HEADROOMS[1:] if turns else (HEADROOM,))
        least = min(divided, key=lambda choice: choice.noise)
        gains = decibels(undivided.noise, least.noise) >= rule.minimum_gain_db
        made[tensor] = _Choices(
            plain=plain, undivided=undivided, divided=least if gains else undivided, signal=judge.readers.signal
        )
    total = math.fsum(sorted(c.share(c.undivided) for c in made.values()))
    for tensor, choices in made.items():
        worth = not formula.judged or choices.share(choices.undivided) - choices.share(choices.divided) > LEAST * total
        best = choices.divided if worth else choices.undivided
        if best is not choices.plain:
            gain_db = decibels(choices.plain.noise, best.noise)
            found[tensor] = Equalized(scale=best.s.astype(np.float32), params=best.params, gain_db=gain_db)
    return found


def decibels(before: float, after: float) -> float:
    """By how many dB a noise falls; 0 where there is none to fall or nothing is left to compare with."""
    return float(10 * np.log10(before / after)) if before > 0 and after > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Divisors, the parameters of the divided tensor, and the noise predicted at the outputs of its readers."""

    s: Floats
    params: QParams
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choices:
    """The best of each kind for one tensor, and the power that its readers make of it."""

    plain: _Choice
    undivided: _Choice
    divided: _Choice
    signal: float

    def share(self, choice: _Choice) -> float:
        """Noise over signal; 0 where there is no signal."""
        return choice.noise / self.signal if self.signal > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """What the choices for one tensor are judged by."""

    grid: _Grid
    readers: _Readers
    limits: ChannelRange
    turns: Sequence[Turn]

    def plain(self, params: QParams) -> _Choice:
        """Parameters as they were chosen: in each turn as much smaller as the range of the other samples is."""
        ones = np.ones_like(self.limits.low)
        whole = max(_amax(self.limits), float(np.finfo(np.float64).tiny))
        there = [replace(params, scale=_stored(params.scale, _amax(turn.limits) / whole)) for turn in self.turns]
        return self._choice(ones, params, [ones] * len(self.turns), there)

    def wider(self, headroom: float) -> _Choice:
        """No divisors, and the whole range with some headroom."""
        ones = np.ones_like(self.limits.low)
        there = [self.grid.params(turn.limits, ones, headroom) for turn in self.turns]
        return self._choice(ones, self.grid.params(self.limits, ones, headroom), [ones] * len(self.turns), there)

    def divided(self, formula: Formula, headrooms: Sequence[float]) -> list[_Choice]:
        """A formula's candidates, each with some headrooms."""
        found = []
        each = [self.readers.tried(formula, turn.limits) for turn in self.turns]
        for s, *others in zip(self.readers.tried(formula, self.limits), *each, strict=True):
            for headroom in headrooms:
                there = [self.grid.params(turn.limits, u, headroom) for turn, u in zip(self.turns, others, strict=True)]
                found.append(self._choice(s, self.grid.params(self.limits, s, headroom), others, there))
        return found

    def _choice(self, s: Floats, params: QParams, others: Sequence[Floats], there: Sequence[QParams]) -> _Choice:
        errors = [data_errors(t.held, u, p) for t, u, p in zip(self.turns, others, there, strict=True)]
        return _Choice(s=s, params=params, noise=self.readers.noise(s, errors))


def _amax(limits: ChannelRange) -> float:
    return float(np.maximum(-limits.low, limits.high).max())


def _stored(scale: npt.NDArray[np.float32], factor: float) -> npt.NDArray[np.float32]:
    """A scale times a factor, above zero."""
    return np.asarray(max(float(scale) * factor, float(np.finfo(np.float32).tiny)), dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """How the codes of a tensor lie."""

    format: Format
    asymmetric: bool
    dtype: str

    def params(self, limits: ChannelRange, s: Floats, headroom: float) -> QParams:
        """One scale for channels of these ranges divided by s, and some headroom; 1 where all were zero."""
        low = headroom * min(float((limits.low / s).min()), 0.0)
        high = headroom * max(float((limits.high / s).max()), 0.0)
        scale, zero_point = max(-low, high) / self.format.high, 0
        if self.asymmetric and high > low:
            scale, zero_point = asymmetric(low, high, self.format)
        stored = representable(scale if high > low else 1.0, self.dtype)
        return QParams(scale=stored, zero_point=zero_point, format=self.format.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Readers:
    """The weights that read one tensor.

    Attributes:
        matrices: (input channels, output channels of one of them, taps) each.
        most: (input channels,) the largest magnitude of the weights that read a channel.
        read: (input channels,) the sum of their squares.
        power: (input channels,) mean square of the data.
        limit: the largest code of the coarsest weight.
        depthwise: every output channel reads one input channel, so that its scale takes what that is divided by.
    """

    matrices: tuple[npt.NDArray[np.floating], ...]
    most: Floats
    read: Floats
    power: Floats
    limit: int
    depthwise: bool

    @classmethod
    def of(cls, model: Model, nodes: Sequence[WeightedNode], *, power: Floats) -> _Readers:
        """Those of some nodes, each weight once."""
        first = {node.weight: node for node in reversed(nodes)}
        matrices = tuple(by_input(model, first[weight]) for weight in dict.fromkeys(node.weight for node in nodes))
        each = [sizes(m) for m in matrices]
        return cls(
            matrices=matrices,
            most=np.max([most for most, _ in each], axis=0),
            read=np.sum([squares for _, squares in each], axis=0),
            power=power,
            limit=min(FORMATS[node.spec.format].high for node in nodes),
            depthwise=all(node.groups > 1 for node in nodes),
        )

    @property
    def signal(self) -> float:
        """Power of the products of all readers, of independent channels."""
        return float(self.power @ self.read)

    def tried(self, formula: Formula, limits: ChannelRange) -> list[Floats]:
        """A formula's divisors for channels of these ranges, each as it is stored."""
        found = formula.candidates(np.maximum(-limits.low, limits.high), self.most)
        return [s.astype(np.float32).astype(np.float64) for s in found]

    def noise(self, s: Floats, errors: Sequence[Floats]) -> float:
        """Predicted error power at the outputs for channels divided by s.

        `errors` are the (vectors, channels) squared errors of the data.
        """
        data = math.fsum(float(part.sum(axis=0) @ self.read) for part in errors) / sum(map(len, errors))
        if self.depthwise:
            peaks = (np.abs(m).max(axis=2).astype(np.float64) for m in self.matrices)
            taps = (m.shape[2] for m in self.matrices)
            lost = (float(np.square(p).sum(axis=1) @ self.power) * t for p, t in zip(peaks, taps, strict=True))
            return data + math.fsum(lost) / self.limit**2 / 12
        weights = math.fsum(float(((_peaks(m, s) / self.limit) ** 2).sum()) / 12 * m.shape[2] for m in self.matrices)
        return data + weights * float((self.power / s**2).sum())


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
