"""A wider range than was measured, for data tensors whose largest values were not seen.

Channels on samples -> in turn a part of the samples held out -> the noise at the readers of a tensor with the range of
the other samples as the calibrator has it, and with that range and some headroom -> `QParams` where that is clearly
less. Only tensors of which a sample shows one vector, such as the means of all positions before a classifier or inside
squeeze-and-excitation: as many as there are samples say little of the largest to come. (Of 50 vectors a sample they say
enough: a molecular potential lost 1 dB by headroom.) Vectors louder than the mean count no more than it, so that they
alone do not widen the range for all. It must not divide channels or change a graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qdq.core.arrays import Floats
from qdq.core.formats import FORMATS, Format
from qdq.core.qtensor import QParams
from qdq.measure.ranges import covering
from qdq.measure.statistics import ChannelRange
from qdq.model.model import Model
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.equalize.channels import Channels, Turn
from qdq.solve.equalize.choose import by_input, data_errors, sizes

HEADROOMS = (1.0, 1.25, 1.5, 2.0)
MINIMUM_GAIN_DB = 1.0  # predicted, over all turns


def widened(
    model: Model,
    readers: Mapping[str, Sequence[WeightedNode]],
    params: Mapping[str, QParams],
    seen: Mapping[str, Channels],
) -> dict[str, QParams]:
    """Parameters of the tensors that need a wider range.

    Args:
        model: the prepared float model.
        readers: tensor -> all nodes that multiply its channels.
        params: of the tensors to look at, as the calibrator has them; formats with an exponent need no headroom.
        seen: what samples show of the tensors.

    Returns:
        Tensor -> parameters. A tensor of fewer samples than there are turns, or of several vectors a sample, is left
        alone.
    """
    found = {}
    for tensor, nodes in ((t, nodes) for t, nodes in readers.items() if t in seen):
        plain, shown = params[tensor], seen[tensor]
        fmt = FORMATS[plain.format]
        if not fmt.integer or not shown.single or not (turns := shown.turns()):
            continue
        first = {node.weight: node for node in reversed(nodes)}
        read = np.sum([sizes(by_input(model, node))[1] for node in first.values()], axis=0)
        limits = shown.limits
        whole = max(_amax(limits), float(np.finfo(np.float64).tiny))
        before = _noise(turns, [plain.times(_amax(turn.limits) / whole) for turn in turns], read)
        dtype, shifted = model.dtype(tensor), plain.zero_point != 0
        noises = {
            headroom: _noise(turns, [_wide(t.limits, headroom, fmt, dtype, shifted=shifted) for t in turns], read)
            for headroom in HEADROOMS
        }
        best = min(noises, key=lambda headroom: noises[headroom])
        if noises[best] < before * 10 ** (-MINIMUM_GAIN_DB / 10):
            found[tensor] = _wide(limits, best, fmt, dtype, shifted=shifted)
    return found


def _noise(turns: Sequence[Turn], params: Sequence[QParams], read: Floats) -> float:
    """Error power at the readers of the vectors held out, relative to their own power or the mean if that is less."""
    ones = np.ones_like(read)
    power = [np.square(turn.held) @ read for turn in turns]
    mean = math.fsum(float(each.sum()) for each in power) / sum(map(len, power))
    if mean == 0:
        return 0.0
    errors = (data_errors(turn.held, ones, there) @ read for turn, there in zip(turns, params, strict=True))
    return math.fsum(float((e / np.maximum(p, mean)).sum()) for e, p in zip(errors, power, strict=True))


def _wide(limits: ChannelRange, headroom: float, fmt: Format, dtype: str, *, shifted: bool) -> QParams:
    """One scale for the whole range and some headroom."""
    low, high = headroom * min(float(limits.low.min()), 0.0), headroom * max(float(limits.high.max()), 0.0)
    return covering(low, high, fmt_name=fmt.name, dtype=dtype, shift=shifted)


def _amax(limits: ChannelRange) -> float:
    return float(np.maximum(-limits.low, limits.high).max())
