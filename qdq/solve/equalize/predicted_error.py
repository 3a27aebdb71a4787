"""The error that a quantized tensor causes at the products that read it, predicted from samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qdq.core.arrays import Singles
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.equalize.channels import look
from qdq.solve.equalize.choose import by_input, data_errors, sizes, weight_error

MOST_SHARE = 0.25  # of the weights' noise: with so much more of the data's the outputs lose 1 dB


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
    readers: Mapping[str, Sequence[WeightedNode]],
    params: Mapping[str, QParams],
    divisors: Mapping[str, Singles],
    samples: Iterable[Sample],
    *,
    on_progress: Progress | None = None,
) -> dict[str, Errors]:
    """What the roundings of some tensors and of the weights that read them do to the products.

    `readers` are all that reads a tensor, each a Gemm or MatMul; `params` have one scale, for channels that are divided
    by `divisors`, (channels,) each. At most `second_moments.MAX_SAMPLES` of the samples are run.
    """
    found = {}
    for tensor, seen in look(model, readers, samples, on_progress).items():
        fmt, matrices = FORMATS[params[tensor].format], [by_input(model, node) for node in readers[tensor]]
        read = np.sum([sizes(matrix)[1] for matrix in matrices], axis=0)
        s = divisors[tensor].astype(np.float64) if tensor in divisors else np.ones_like(read)
        power, data, tokens = np.zeros_like(read), 0.0, 0.0
        for rows in seen.rows():
            signal = np.square(rows) @ read
            share = np.divide(1, signal, out=np.zeros_like(signal), where=signal > 0) / seen.count
            power += share @ np.square(rows)
            step = np.abs(rows).max(axis=1, keepdims=True) / fmt.high
            rest = rows - np.rint(np.divide(rows, step, out=np.zeros_like(rows), where=step > 0)) * step
            data += float(share @ data_errors(rows, s, params[tensor]) @ read)
            tokens += float(share @ np.square(rest) @ read)
        each = zip(readers[tensor], matrices, strict=True)
        weights = math.fsum(weight_error(m, node.spec, power / s**2, s) for node, m in each)
        found[tensor] = Errors(data=data, tokens=tokens, weights=weights)
    return found
