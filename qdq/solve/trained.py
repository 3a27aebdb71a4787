"""Scales and codes that a model came with, as parameters of the points that a plan keeps them for.

Model.trained + plan -> QParams of data tensors; weight values + grid -> QTensor with the codes of training. It must
not choose a range: where data with a zero point cannot be moved, the scale covers the same values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams, QTensor, representable, to_codes
from qdq.model.model import Grid, Model, WeightGrid
from qdq.plan.plan import Plan
from qdq.plan.weighted_node import WeightedNode
from qdq.solve.shift import shifts

NEAR = 0.02  # of a step, for values that were rounded to FP16 on the way
WITHIN = 0.01  # how much of the values may lie further from a code


def data_params(model: Model, plan: Plan) -> dict[str, QParams]:
    """Parameters of every data tensor whose point says that it keeps the model's own.

    Raises:
        InputError: an edited plan says so of a tensor that came with none.
    """
    found = {}
    for point in plan.activations:
        if point.trained:
            grid = model.trained.of(point.tensor, point.consumers) if model.trained is not None else None
            if grid is None:
                raise InputError(
                    f"The plan keeps the scale that {point.tensor!r} came with, but the model has no quantizer there. "
                    "Set trained to false, or make another plan with `qdq plan`."
                )
            scale = representable(grid.scale, model.dtype(point.tensor))
            params = QParams(scale=np.asarray(scale), zero_point=grid.zero_point, format=grid.format)
            found[point.tensor] = params if not grid.zero_point or shifts(model, point) else covering(grid)
    return found


def covering(grid: Grid) -> QParams:
    """The smallest symmetric scale that covers the values of a grid with a zero point."""
    fmt = FORMATS[grid.format]
    high, low = (fmt.high - grid.zero_point) / fmt.high, (fmt.low - grid.zero_point) / fmt.low
    return QParams(scale=np.asarray(grid.scale * max(high, low), dtype=np.float32), format=grid.format)


def weight_codes(model: Model, reader: WeightedNode, values: npt.NDArray[np.floating]) -> QTensor | None:
    """The codes of a weight by the model's own scales; None where the node has none, or the values lie on no such grid.

    A factor of whole output channels, as of a folded BatchNormalization, is one of the scales too.
    """
    grid = model.trained.weights.get(reader.name) if model.trained is not None else None
    if grid is None or grid.format != reader.spec.format or reader.spec.block != grid.block:
        return None
    axis = reader.output_axis
    if grid.largest.size != values.shape[axis] or (grid.block is not None and values.ndim != 2):
        return None
    others = tuple(i for i in range(values.ndim) if i != axis)
    now = np.abs(values.astype(np.float32)).max(axis=others).astype(np.float64)
    ratio = np.divide(now, grid.largest, out=np.ones_like(now), where=(grid.largest > 0) & (now > 0))
    ratio = np.where(np.abs(ratio - 1) < 1e-5, 1, ratio)
    params = _params(reader, grid, ratio, values.dtype.name, values.shape[1 - axis] if grid.block else None)
    return QTensor(codes=to_codes(values, params), params=params) if params and _on_grid(values, params) else None


def _params(
    reader: WeightedNode, grid: WeightGrid, ratio: npt.NDArray[np.float64], dtype: str, length: int | None
) -> QParams | None:
    """The grid with a factor for each output channel, in the granularity of the reader; None where it is too fine."""
    axis, own = reader.output_axis, grid.scale.astype(np.float64)
    if grid.block is not None:
        scales = own * ratio[:, None]
        stored = representable(scales if axis == 0 else scales.T, dtype)
        return QParams(scale=stored, axis=1 - axis, format=grid.format, block=grid.block, length=length)
    scales = np.broadcast_to(own, ratio.shape) * ratio
    one = reader.spec.axis is None
    if one and np.ptp(scales) > 1e-5 * scales.max():
        return None
    scale = representable(scales[0] if one else scales, dtype)
    return QParams(scale=np.asarray(scale), axis=None if one else axis, format=grid.format)


def _on_grid(values: npt.NDArray[np.floating], params: QParams) -> bool:
    """Whether values are codes of an integer format times their scales; of a float format that is not asked."""
    fmt = FORMATS[params.format]
    if not fmt.integer:
        return True
    scale = params.scale
    if params.block is not None and params.axis is not None:
        scale = np.repeat(scale, params.block, axis=params.axis)
        scale = scale[: values.shape[0]] if params.axis == 0 else scale[:, : values.shape[1]]
    elif params.axis is not None:
        scale = scale.reshape([-1 if i == params.axis else 1 for i in range(values.ndim)])
    steps = values.astype(np.float32) / scale
    far = np.mean(np.abs(steps - np.rint(steps)) > NEAR) > WITHIN
    return bool(not far and np.abs(steps).max(initial=0) <= -fmt.low + 0.5)
