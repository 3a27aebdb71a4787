"""The scale and zero point of each tensor between nodes, from its measured histogram and a calibrator.

Plan + CalibrationTable + calibrator per tensor -> QParams per activation point. Tied tensors share a histogram where
their ranges are alike; formats with an exponent take the whole range, which costs them nothing.
It must not read samples, nor know what becomes of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams, representable, scale_of_scales
from qdq.measure import ranges
from qdq.measure.histogram import Histogram
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.solve.shift import shifts

# Tied tensors whose ranges differ by more would lose over a bit of resolution: each keeps its own scale.
TIE_RATIO = 2.0
HEADROOM = 1.25


def activation_params(
    model: Model, plan: Plan, table: CalibrationTable, methods: Mapping[str, str]
) -> dict[str, QParams]:
    """Scale and zero point of every activation point.

    `methods` names the calibrator of a tensor; the others have that of the plan's settings.

    Raises:
        InputError: the settings say auto, and `methods` lacks a tensor.
    """
    if plan.settings.calibrator == "auto" and any(p.tensor not in methods for p in plan.activations):
        raise InputError(
            "calibrator auto must be resolved first: use qdq.assemble.choose_calibrator.solve_auto, or another one."
        )
    shared: dict[str, Histogram] = {}
    for members in _groups(plan).values():
        if _alike(members, table):
            union = table.tensors[members[0]]
            for member in members[1:]:
                union = union.merge(table.tensors[member])
            shared.update(dict.fromkeys(members, union))
    chosen = {}
    for point in plan.activations:
        dtype, fmt = model.dtype(point.tensor), FORMATS[point.spec.format]
        hist = shared.get(point.tensor, table.tensors[point.tensor])
        if not fmt.integer:  # relative precision: nothing is won by cutting the range
            if fmt.scale_format:  # of the block scales, which are computed as the engine runs
                scale = np.asarray(scale_of_scales((hist.amax or 1.0) / fmt.high, fmt), dtype=np.float32)
            else:
                maker = model.producer(point.tensor)
                largest = 1.0 if maker is not None and maker.op_type == "Softmax" else hist.amax  # of any data to come
                scale = representable(largest / fmt.high if largest else 1.0, dtype)
            chosen[point.tensor] = QParams(scale=scale, format=fmt.name)
            continue
        if point.spec.residual:
            chosen[point.tensor] = QParams(scale=coarse_scale(hist.amax, dtype), format=fmt.name)
            continue
        chosen[point.tensor] = ranges.choose(
            hist,
            method=methods.get(point.tensor, plan.settings.range_by),
            percentile=plan.settings.percentile,
            shift=shifts(model, point),
            fmt_name=point.spec.format,
            dtype=dtype,
        )
    return chosen


def coarse_scale(amax: float, dtype: str) -> np.ndarray:
    """The scale of the first of two codes: a power of two, with `HEADROOM` at least, which the second has bits for.

    So the first code's value has no rounding in FP16, and what it leaves neither.

    >>> float(coarse_scale(100.0, "float32"))
    1.0
    """
    least = HEADROOM * amax / 127
    return representable(2.0 ** math.ceil(math.log2(least)) if least > 0 else 1.0, dtype)


def tie_notes(plan: Plan, table: CalibrationTable) -> tuple[str, ...]:
    """Of the tensors that the plan ties: which keep scales of their own, and why."""
    notes = []
    for group, members in _groups(plan).items():
        if not _alike(members, table):
            spans = [table.tensors[m].amax for m in members]
            notes.append(
                f"the {len(members)} tensors tied as {group!r} keep scales of their own: their ranges differ "
                f"{max(spans) / max(min(spans), 1e-30):.1f} times"
            )
    return tuple(notes)


def _alike(members: Sequence[str], table: CalibrationTable) -> bool:
    """Whether tied tensors may share a scale."""
    spans = [table.tensors[m].amax for m in members]
    return max(spans) <= TIE_RATIO * min(spans)


def _groups(plan: Plan) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for point in plan.activations:
        if point.tie is not None:
            groups.setdefault(point.tie, []).append(point.tensor)
    return groups
