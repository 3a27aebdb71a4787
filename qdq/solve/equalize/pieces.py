"""Piecewise linear data: what lies within a breakpoint and what lies beyond have a scale, and a product, each.

x = inside + beyond with inside = clip(x, -p, p), so W x = W inside + W beyond exactly, and the dense middle of a heavy
tail has steps of its own (Fang et al., arXiv 2002.00104; of proteins: Peng et al., arXiv 2310.19624). A second product
costs time, so a tensor is split only where its error counts beside that of the weights, or where it is asked for.
Samples + parameters of one scale -> `split` -> parameters of both pieces. It must not change a graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qdq.core.arrays import Floats, Singles
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams, from_codes, to_codes
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.equalize.channels import Channels, look
from qdq.solve.equalize.choose import by_input, data_errors, sizes, weight_error
from qdq.solve.equalize.predicted_error import MOST_SHARE

STEPS = np.geomspace(1 / 64, 1 / 2, 11)  # of the range: breakpoints that are tried
HEADROOM = 1.25  # of the outer piece: later data are larger, and its steps matter little
ROWS = 1024  # vectors of a tensor that breakpoints are compared on, at most
LEAST_GAIN_DB = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """One tensor in two pieces.

    Attributes:
        inside: parameters of clip(x, -p, p); p is their largest code.
        beyond: of the rest.
        gain_db: predicted fall of the error at the readers' outputs.
    """

    inside: QParams
    beyond: QParams
    gain_db: float

    def values(self, x: Floats) -> Floats:
        """What the products read, added."""
        inside = np.clip(x, -breakpoint_of(self.inside), breakpoint_of(self.inside))
        coded = (from_codes(to_codes(part, p), p) for part, p in ((inside, self.inside), (x - inside, self.beyond)))
        return np.asarray(sum(part.astype(np.float64) for part in coded))


def breakpoint_of(inside: QParams) -> float:
    """Where the inner piece ends."""
    return float(inside.scale) * FORMATS[inside.format].high


def split(
    model: Model,
    readers: Mapping[str, Sequence[WeightedNode]],
    params: Mapping[str, QParams],
    divisors: Mapping[str, Singles],
    samples: Iterable[Sample],
    *,
    everywhere: bool,
    on_progress: Progress | None = None,
) -> dict[str, Pieces]:
    """The tensors that get two pieces: `everywhere`, or where the error of one scale counts and two gain 1 dB.

    `readers` are all that reads a tensor, each a Gemm or MatMul; `params` have one scale, for channels that are divided
    by `divisors`, (channels,) each. At most `second_moments.MAX_SAMPLES` of the samples are run.
    """
    found = {}
    for tensor, seen in look(model, readers, samples, on_progress).items():
        made, matters = _best(model, readers[tensor], params[tensor], divisors.get(tensor), seen)
        if made is not None and (everywhere or (matters and made.gain_db >= LEAST_GAIN_DB)):
            found[tensor] = made
    return found


def _best(
    model: Model, readers: Sequence[WeightedNode], one: QParams, divisor: Singles | None, seen: Channels
) -> tuple[Pieces | None, bool]:
    """The pieces of least error, and whether that of one scale counts beside the weights'; None where all is zero."""
    matrices = [by_input(model, node) for node in readers]
    read = np.sum([sizes(matrix)[1] for matrix in matrices], axis=0)
    s = np.ones_like(read) if divisor is None else divisor.astype(np.float64)
    limits = seen.limits
    most = float((np.maximum(-limits.low, limits.high) / s).max())
    if not most:
        return None, False
    ways = [_pieces(most, step, one.format) for step in STEPS]
    plain, errors, power = 0.0, np.zeros(len(ways)), np.zeros_like(read)
    every = -(-seen.count // ROWS)
    for rows in seen.rows():
        some = rows[::every]
        signal = np.square(some) @ read
        share = np.divide(1, signal, out=np.zeros_like(signal), where=signal > 0)  # as in predicted_error
        power += share @ np.square(some)
        plain += float(share @ data_errors(some, s, one) @ read)
        errors += [float(share @ np.square((way.values(some / s) - some / s) * s) @ read) for way in ways]
    best = int(errors.argmin())
    weights = math.fsum(weight_error(m, n.spec, power / s**2, s) for n, m in zip(readers, matrices, strict=True))
    least = float(np.finfo(np.float64).tiny)
    gain = 10 * math.log10(max(plain, least) / max(float(errors[best]), least))
    made = Pieces(inside=ways[best].inside, beyond=ways[best].beyond, gain_db=gain)
    return made, plain > MOST_SHARE * weights


def _pieces(most: float, step: float, fmt: str) -> Pieces:
    """Those of a range with a breakpoint at a part of it."""
    ends = most * step, (HEADROOM - step) * most
    least = float(np.finfo(np.float32).tiny)
    scales = (np.asarray(max(end / FORMATS[fmt].high, least), np.float32) for end in ends)
    inside, beyond = (QParams(scale=scale, format=fmt) for scale in scales)
    return Pieces(inside=inside, beyond=beyond, gain_db=0.0)
