"""Turn measured ranges and float weights into scales and codes.

Plan + CalibrationTable -> QParams per activation; Plan + weights (+ second moments) -> QTensor per weight.
Each weight is solved by itself. This module must not change the graph; its only look at data is through `gram`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq import channel_scale, gram, observers
from qdq.calibrate import CalibrationTable, Progress
from qdq.errors import InputError
from qdq.formats import FORMATS
from qdq.graph import Model
from qdq.nodes import attribute
from qdq.observers import Histogram
from qdq.placement import WEIGHTED, weight_axis
from qdq.plan import Plan, Point
from qdq.qtensor import QParams, QTensor, weight_params
from qdq.tap import Sample

TIE_RATIO = (
    2.0  # tied tensors whose ranges differ by more would lose over a bit of resolution: each keeps its own scale
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Everything `insert` needs.

    Attributes:
        activations: tensor -> parameters per tensor.
        divisors: tensor -> (channels,) what its channels are divided by before they are quantized; the codes of the
            weights that read it already hold the factor.
        weights: (tensor, axis) -> codes and parameters.
        notes: what a person should know, one line each (ties given up, weights rounded to nearest for want of data).
    """

    activations: Mapping[str, QParams]
    divisors: Mapping[str, npt.NDArray[np.float32]]
    weights: Mapping[tuple[str, int | None], QTensor]
    notes: tuple[str, ...]


def solve(
    model: Model,
    plan: Plan,
    table: CalibrationTable,
    *,
    samples: Iterable[Sample] | None = None,
    params: Mapping[str, QParams] | None = None,
    on_progress: Progress | None = None,
) -> Solution:
    """Choose every scale and round every weight.

    Args:
        model: the prepared float model.
        plan: its points.
        table: histograms of the plan's activation tensors.
        samples: re-iterable calibration samples, for roundings that need the second moments of a layer's inputs;
            without them such weights are rounded to nearest, and a note says so.
        params: of every activation tensor, as `activation_params` gives them, in place of the plan's calibrator.
        on_progress: called with (done, in all or None, text).

    Returns:
        The solution; the same arguments give the same one.

    Raises:
        StaleFileError: plan or table belong to another model.
        InputError: an edited plan has a weight that no integer kernel takes so, or a weight holds NaN or infinity.
    """
    plan.check(model)
    table.check(model, plan)
    _check_weights(model, plan)
    notes: list[str] = []
    samples = None if samples is None else gram.few(samples)
    activations = activation_params(model, plan, table, {}, notes) if params is None else dict(params)
    rounding = plan.settings.rounding
    divisors: dict[str, npt.NDArray[np.float32]] = {}
    if plan.settings.equalize != "none" and samples is not None:
        equalized = channel_scale.choose(
            model, plan, activations, samples, formula=plan.settings.equalize, on_progress=on_progress
        )
        divisors = {tensor: e.scale for tensor, e in equalized.items()}
        activations |= {tensor: e.params for tensor, e in equalized.items()}
        if equalized:
            gains = sorted(e.gain_db for e in equalized.values())
            notes.append(
                f"the channels of {len(equalized)} of {len(activations)} tensors are equalized: {gains[0]:.1f} to "
                f"{gains[-1]:.1f} dB less noise predicted at their consumers"
            )
    grams: gram.Grams = {}
    if rounding != "nearest":
        if samples is None:
            notes.append(f"weights are rounded to nearest: {rounding} needs the samples, and only a table was given")
        else:
            grams = gram.collect(model, plan, activations, samples, divisors=divisors, on_progress=on_progress)
    weights: dict[tuple[str, int | None], QTensor] = {}
    for index, point in enumerate(plan.weights):
        weights[point.tensor, point.spec.axis] = _weight(
            model, point, rounding, grams.get((point.tensor, point.spec.axis)), divisors
        )
        if on_progress is not None:
            on_progress(index + 1, len(plan.weights), "rounding weights")
    plain = [p.tensor for p in plan.weights if (p.tensor, p.spec.axis) not in grams]
    if grams and plain:
        notes.append(
            f"{len(plain)} of {len(plan.weights)} weights are rounded to nearest: {rounding} takes weights of up to "
            f"{gram.MAX_COLUMNS} inputs per output"
        )
    return Solution(activations=activations, divisors=divisors, weights=weights, notes=tuple(notes))


def activation_params(
    model: Model, plan: Plan, table: CalibrationTable, methods: Mapping[str, str], notes: list[str] | None = None
) -> dict[str, QParams]:
    """Scale and zero point of every activation point.

    Args:
        model: the prepared float model.
        plan: its points.
        table: their histograms.
        methods: tensor -> calibrator; that of the plan's settings for the others.
        notes: receives what a person should know.

    Raises:
        InputError: the settings say auto, and `methods` lacks a tensor.
    """
    notes = [] if notes is None else notes
    if plan.settings.calibrator == "auto" and any(p.tensor not in methods for p in plan.activations):
        raise InputError("calibrator auto must be resolved first: use qdq.autocalib.solve_auto, or another calibrator.")
    shared: dict[str, Histogram] = {}
    for group, members in _groups(plan).items():
        spans = [table.tensors[m].amax for m in members]
        if max(spans) <= TIE_RATIO * min(spans):
            union = table.tensors[members[0]]
            for member in members[1:]:
                union = union.merge(table.tensors[member])
            shared.update(dict.fromkeys(members, union))
        else:
            notes.append(
                f"the {len(members)} tensors tied as {group!r} keep scales of their own: their ranges differ "
                f"{max(spans) / max(min(spans), 1e-30):.1f} times"
            )
    chosen = {}
    for point in plan.activations:
        info = model.info(point.tensor)
        chosen[point.tensor] = observers.choose(
            shared.get(point.tensor, table.tensors[point.tensor]),
            method=methods.get(point.tensor, plan.settings.calibrator),
            percentile=plan.settings.percentile,
            shift=point.spec.shift and all(channel_scale.can_shift(model, name, i) for name, i in point.uses),
            fmt_name=point.spec.format,
            dtype=info.dtype if info is not None else "float32",
        )
    return chosen


def _groups(plan: Plan) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for point in plan.activations:
        if point.tie is not None:
            groups.setdefault(point.tie, []).append(point.tensor)
    return groups


def _check_weights(model: Model, plan: Plan) -> None:
    """Refuse weight points that an edited plan may hold, and values that no scale fits."""
    for point in plan.weights:
        values = model.array(point.tensor)
        for name, index in point.uses:
            node = model.node(name)
            if index != 1 or node.op_type not in WEIGHTED:
                raise InputError(
                    f"The plan quantizes {point.tensor!r} as the weight of operand {index} of {name!r} "
                    f"({node.op_type}): weights are operand 1 of {', '.join(WEIGHTED)}. Remove the consumer."
                )
            if point.spec.axis != (axis := weight_axis(node, values.ndim)):
                raise InputError(
                    f"The plan quantizes {point.tensor!r} along axis {point.spec.axis}, but the output channels of "
                    f"{name!r} lie on axis {axis}. Set the axis to {axis}."
                )
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(
                f"Weight {point.tensor!r} of the float model holds NaN or infinity: no scale fits it. "
                f"Mend the model, or exclude {point.uses[0][0]!r}."
            )


def _weight(
    model: Model,
    point: Point,
    rounding: str,
    moments: npt.NDArray[np.float64] | None,
    divisors: Mapping[str, npt.NDArray[np.float32]],
) -> QTensor:
    values = model.array(point.tensor)
    reader = model.node(point.uses[0][0])
    if (divisor := divisors.get(reader.input[0])) is not None:
        inputs = channel_scale.input_axis(reader, values.ndim)
        values = (values * divisor.reshape([-1 if i == inputs else 1 for i in range(values.ndim)])).astype(values.dtype)
    fmt = FORMATS[point.spec.format]
    assert point.spec.axis is not None
    params = weight_params(values, axis=point.spec.axis, fmt=fmt)
    node = model.node(point.uses[0][0])
    module: Any = importlib.import_module(f"qdq.rounding.{rounding}" if moments is not None else "qdq.rounding.nearest")
    round_rows: Callable[..., npt.NDArray[np.float64]] = module.round_rows
    moved = np.moveaxis(values, point.spec.axis, 0).astype(np.float64)
    rows = moved.reshape(moved.shape[0], -1)
    scale = params.scale.astype(np.float64)[:, None]
    low = -fmt.high  # symmetric codes: -128 would need a range that amax / 127 never uses
    groups = attribute(node, "group", 1) if node.op_type == "Conv" and moments is not None else 1
    parts = zip(
        np.split(rows, groups), np.split(scale, groups), moments if moments is not None else [None], strict=True
    )
    codes = np.concatenate([round_rows(w, s, h, low=low, high=fmt.high) for w, s, h in parts])
    shaped = np.moveaxis(codes.reshape(moved.shape), 0, point.spec.axis)
    return QTensor(codes=np.ascontiguousarray(shaped).astype(fmt.dtype), params=params)
