"""The error that a quantized tensor causes at the products that read it, predicted from samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.plan.plan import Plan, Point
from qdq.solve.equalize.channels import look
from qdq.solve.equalize.choose import _by_input, _data_errors, _sizes, _weight_error


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
