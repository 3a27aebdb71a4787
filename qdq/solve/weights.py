"""Round one weight: its granularity, the scales, the codes, and for two levels the INT8 grid in between.

values + Spec + rounding (+ second moments) -> QTensor. Every weight is by itself, so that they can be read, rounded and
written one at a time.

| granularity | how the rounding sees it |
|---|---|
| per output channel or tensor | (channels, columns), one scale per row or in all |
| blocks, no second moments | the tensor as it is stored, cut into blocks: nothing is copied |
| blocks, with second moments | (channels, columns), one scale per block of columns |
| two levels | as blocks; each block scale is a whole multiple of its channel's INT8 scale |
| NVFP4 | as blocks; codes are floating-point numbers, block scales FP8 codes times one power of two |

It must not read samples or know plans.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.core.formats import FORMATS, Format
from qdq.core.qtensor import (
    CHUNK,
    QParams,
    QTensor,
    blocked,
    in_chunks,
    padded,
    representable,
    stored_scales,
    to_codes,
    weight_params,
)
from qdq.core.resources import cores
from qdq.plan.spec import Spec
from qdq.solve.rounding import gptq, nearest

DATA_FREE = ("nearest", "clip", "hqq")
# Multiples of a channel's INT8 scale that its largest block scale is tried at; -8 times 16 is INT8's -128.
LARGEST_MULTIPLES = range(8, 17)

Floats = npt.NDArray[np.float64]


def quantize_weight(
    values: npt.NDArray[np.floating],
    spec: Spec,
    *,
    outputs: int,
    rounding: str,
    moments: Floats | None = None,
    damping: float = gptq.DAMP,
    act_order: bool = True,
) -> QTensor:
    """Scales and codes of one weight.

    Args:
        values: the weight, finite; any float type.
        spec: format and granularity; `axis` is the blocked axis where there are blocks.
        outputs: the axis of the output channels.
        rounding: a module of `qdq.rounding`.
        moments: (groups, columns, columns) of the inputs, each group's for its share of the output channels; None
            rounds as the rounding does without data.
        damping: of roundings that look at the moments, see `qdq.rounding.gptq`.
        act_order: likewise.

    Returns:
        Codes and parameters. The same arguments give the same ones.
    """
    fmt = FORMATS[spec.format]
    module: Any = importlib.import_module(f"qdq.solve.rounding.{rounding}")
    if not fmt.integer and spec.block is None:
        return _floating(values, spec, fmt)
    how: dict[str, Any] = {"damping": damping, "act_order": act_order}
    if spec.block is None:
        return _whole(values, spec, fmt, outputs, module, moments, how)
    assert spec.axis is not None
    known = moments is not None and len(moments) == 1 and bool(moments.any()) and rounding not in DATA_FREE
    if not known and spec.via is None:
        view = blocked(padded(values, spec.axis, spec.block), spec.axis, spec.block)
        scales = module.block_scales(view, None, low=fmt.low, high=fmt.high, kind=_kind(fmt))
        params = stored_scales(scales, values.shape, values.dtype.name, axis=spec.axis, block=spec.block, fmt=fmt)
        return QTensor(codes=to_codes(values, params), params=params)
    return _blocks(values, spec, fmt, module, moments[0] if known and moments is not None else None, how)


def _kind(fmt: Format) -> np.dtype[np.generic] | None:
    """The type whose values the codes of a format have, None for integers."""
    return None if fmt.integer else fmt.dtype


def _floating(values: npt.NDArray[np.floating], spec: Spec, fmt: Format) -> QTensor:
    """Nearest codes of a floating-point format without blocks: its grid is dense where values are, which is enough."""
    params = weight_params(values, axis=spec.axis, fmt=fmt) if spec.axis is not None else _per_tensor(values, fmt)
    return QTensor(codes=to_codes(values, params), params=params)


def _per_tensor(values: npt.NDArray[np.floating], fmt: Format) -> QParams:
    amax = max(float(values.max()), -float(values.min())) if values.size else 0.0
    scale = representable(amax / fmt.high if amax else 1.0, values.dtype.name)
    return QParams(scale=np.asarray(scale), format=fmt.name)


def _whole(
    values: npt.NDArray[np.floating],
    spec: Spec,
    fmt: Format,
    outputs: int,
    module: Any,
    moments: Floats | None,
    how: Mapping[str, Any],
) -> QTensor:
    """One scale per output channel, or one in all."""
    params = weight_params(values, axis=outputs, fmt=fmt) if spec.axis is not None else _per_tensor(values, fmt)
    if moments is None or module.round_rows is nearest.round_rows:
        return QTensor(codes=_nearest(values, params, outputs, fmt), params=params)
    moved = np.moveaxis(values, outputs, 0).astype(np.float64)
    rows = moved.reshape(moved.shape[0], -1)
    scale = np.broadcast_to(params.scale.astype(np.float64).reshape(-1, 1), (rows.shape[0], 1))
    low = -fmt.high  # symmetric codes: -128 would need a range that amax / 127 never uses
    groups = len(moments)
    parts = zip(np.split(rows, groups), np.split(scale, groups), moments, strict=True)
    codes = np.concatenate([module.round_rows(w, s, h, low=low, high=fmt.high, **how) for w, s, h in parts])
    shaped = np.moveaxis(codes.reshape(moved.shape), 0, outputs)
    return QTensor(codes=np.ascontiguousarray(shaped).astype(fmt.dtype), params=params)


def _nearest(values: npt.NDArray[np.floating], params: QParams, outputs: int, fmt: Format) -> npt.NDArray[np.generic]:
    """Nearest codes with one scale per output channel or in all, a piece at a time; those of `nearest.round_rows`."""
    shape = values.shape
    view = np.ascontiguousarray(values).reshape(math.prod(shape[:outputs]), shape[outputs], 1, -1)
    scale = np.broadcast_to(params.scale.astype(np.float64).reshape(1, -1, 1, 1), (1, view.shape[1], 1, 1))
    codes = np.empty(view.shape, dtype=fmt.dtype)

    def work(part: tuple[slice, slice]) -> None:
        q = view[part].astype(np.float64)
        q /= scale[:, part[1]]
        np.rint(q, out=q)
        codes[part] = np.clip(q, -fmt.high, fmt.high, out=q)

    in_chunks(work, view)
    return codes.reshape(shape)


def _blocks(
    values: npt.NDArray[np.floating],
    spec: Spec,
    fmt: Format,
    module: Any,
    moment: Floats | None,
    how: Mapping[str, Any],
) -> QTensor:
    """Blocks of columns, seen row by row."""
    assert spec.axis is not None and spec.block is not None
    whole = np.moveaxis(padded(values, spec.axis, spec.block), spec.axis, -1)
    if moment is None and spec.via is not None:
        return _shaped(values, whole, *_two_levels_in_pieces(whole, spec, fmt, module), spec, fmt)
    rows = np.ascontiguousarray(whole.reshape(-1, whole.shape[-1]), dtype=np.float32)
    if moment is not None and (missing := rows.shape[1] - moment.shape[0]):
        moment = np.pad(moment, (0, missing))
    view = np.asarray(blocked(rows, 1, spec.block), dtype=np.float32)
    kind, second = _kind(fmt), None
    scales = module.block_scales(view, moment, low=fmt.low, high=fmt.high, kind=kind)[:, :, 0, 0]
    if spec.via is None:
        levels, stored = None, _storing(rows.shape, view, values.dtype.name, spec.block, fmt)
        scale, second = stored(scales)
    else:
        weight = None if moment is None else np.diag(moment).astype(np.float32)
        levels = _two_levels(view, scales, weight, fmt)
        scale = levels[0][:, None] * levels[1]
    if module.round_rows is nearest.round_rows and spec.via is None:
        params = QParams(scale=scale, axis=1, format=fmt.name, block=spec.block)
        return _shaped(values, whole, to_codes(rows, params), scale, None, spec, fmt, second)
    every = np.repeat(scale, spec.block, axis=1).astype(np.float64)
    wide = rows.astype(np.float64)
    refined = hasattr(module, "refine") and spec.via is None and moment is not None and kind is None
    first = gptq if refined else module  # what is refined with its scales need not be settled before
    limits: dict[str, Any] = {"low": fmt.low, "high": fmt.high, "damping": how["damping"]}
    codes = first.round_rows(wide, every, moment, kind=kind, act_order=how["act_order"], **limits)
    if spec.via is None and moment is not None:
        if refined:
            codes, better = module.refine(wide, codes, scale.astype(np.float64), moment, **limits)
            scale = representable(better, values.dtype.name)
            every = np.repeat(scale, spec.block, axis=1).astype(np.float64)
            codes = module.settle(wide, codes, every, moment, **limits)
        plain, _ = stored(nearest.block_scales(view, None, low=fmt.low, high=fmt.high)[:, :, 0, 0])
        codes, scale = _no_worse(wide, codes, scale, plain, moment, fmt)
    return _shaped(values, whole, codes, scale, None if levels is None else levels[0], spec, fmt, second)


def _storing(
    shape: Sequence[int], view: npt.NDArray[np.float32], dtype: str, block: int, fmt: Format
) -> Callable[[npt.NDArray[np.float32]], tuple[npt.NDArray[np.float32], float | None]]:
    """What stores (rows, blocks) scales exactly, with the scale of scales that is the same for all that are tried."""
    most = max(float(view.max()), -float(view.min())) / fmt.high if view.size else 0.0

    def stored(scales: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float | None]:
        wanted = scales[:, :, None, None]
        made = stored_scales(wanted, shape, dtype, axis=1, block=block, fmt=fmt, most=most)
        return made.scale, made.second

    return stored


def _two_levels_in_pieces(
    whole: npt.NDArray[np.generic], spec: Spec, fmt: Format, module: Any
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Codes, block scales and channel scales of two levels without data, some rows at a time on every core."""
    assert spec.block is not None
    block, flat = spec.block, whole.reshape(-1, whole.shape[-1])
    codes = np.empty(flat.shape, dtype=np.int8)
    scale = np.empty((flat.shape[0], flat.shape[1] // block), dtype=np.float32)
    channel = np.empty(flat.shape[0], dtype=np.float32)
    step = max(1, CHUNK // max(flat.shape[1], 1))

    def work(start: int) -> None:
        part = slice(start, start + step)
        rows = np.ascontiguousarray(flat[part], dtype=np.float32)
        view = np.asarray(blocked(rows, 1, block), dtype=np.float32)
        scales = module.block_scales(view, None, low=fmt.low, high=fmt.high)[:, :, 0, 0]
        channel[part], multiples = _two_levels(view, scales, None, fmt)
        scale[part] = channel[part][:, None] * multiples
        every = np.repeat(scale[part], block, axis=1).astype(np.float64)
        codes[part] = module.round_rows(rows.astype(np.float64), every, None, low=fmt.low, high=fmt.high)

    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(work, range(0, flat.shape[0], step)):
            pass
    return codes, scale, channel


def _shaped(
    values: npt.NDArray[np.floating],
    whole: npt.NDArray[np.generic],
    codes: npt.NDArray[np.generic],
    scale: npt.NDArray[np.float32],
    channel: npt.NDArray[np.float32] | None,
    spec: Spec,
    fmt: Format,
    second: float | None = None,
) -> QTensor:
    """Rows of codes and scales in the layout of the weight; `channel` are the scales of the second level."""
    assert spec.axis is not None
    typed = codes.astype(np.int8, copy=False).view(fmt.dtype) if fmt.integer else codes.astype(fmt.dtype, copy=False)
    shaped = np.moveaxis(typed.reshape(whole.shape), -1, spec.axis)
    scales = np.moveaxis(scale.reshape(*whole.shape[:-1], -1), -1, spec.axis)
    params = QParams(
        scale=np.ascontiguousarray(scales),
        axis=spec.axis,
        format=fmt.name,
        block=spec.block,
        length=values.shape[spec.axis],
        second=second,
    )
    via = None
    if channel is not None and spec.via is not None:
        via = QParams(scale=channel, axis=1 - spec.axis, format=spec.via)
    return QTensor(codes=np.ascontiguousarray(shaped), params=params, via=via)


def _no_worse(
    wide: Floats,
    codes: Floats,
    scale: npt.NDArray[np.float32],
    plain: npt.NDArray[np.float32],
    moment: Floats,
    fmt: Format,
) -> tuple[Floats, npt.NDArray[np.float32]]:
    """For each row the better of its codes and the nearest ones with scales that clip nothing, by output error."""
    block = wide.shape[1] // scale.shape[1]
    every = np.repeat(plain, block, axis=1).astype(np.float64)
    near = nearest.round_rows(wide, every, None, low=fmt.low, high=fmt.high, kind=_kind(fmt))
    found = gptq.loss(wide - codes * np.repeat(scale, block, axis=1), moment)
    worse = found > gptq.loss(wide - near * every, moment)
    return np.where(worse[:, None], near, codes), np.where(worse[:, None], plain, scale)


def _two_levels(
    view: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
    fmt: Format,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Block scales as whole multiples of one scale per channel, so that every value is an INT8 code of the channel.

    Args:
        view: (rows, blocks, block, 1).
        scales: (rows, blocks) wanted, zero for blocks of zeros.
        importance: (columns,) weights of the squared errors, or None.
        fmt: the format of the blocks.

    Returns:
        (rows,) channel scales, normal numbers of FP16, and (rows, blocks) multiples from 1 to 16, both float32.

    Source: the second phase of DGQ, arXiv 2310.04836, with zero point 0: the channel's scale is the one of least error.
    """
    largest = np.maximum(scales.max(axis=1), np.float32(np.finfo(np.float32).tiny))
    weight = None if importance is None else importance.reshape(1, *view.shape[1:3])
    best = np.full(view.shape[0], np.inf)
    scale, multiples = np.empty(view.shape[0], dtype=np.float32), np.empty(scales.shape, dtype=np.float32)
    for most in LARGEST_MULTIPLES:
        # FP16 whatever the model's type: the rest may become FP16 later, and the codes must stay exact then.
        with np.errstate(over="ignore"):
            channel = representable(largest / most, "float16")
        channel = np.where(np.isfinite(channel), channel, largest / most)  # beyond FP16: the rest stays FP32
        times = np.clip(np.rint(scales / channel[:, None]), 1, max(LARGEST_MULTIPLES))
        step = (channel[:, None] * times)[:, :, None]
        error = np.clip(np.rint(view[..., 0] / step), fmt.low, fmt.high)
        error *= step
        error -= view[..., 0]
        np.square(error, out=error)
        loss = (error if weight is None else error * weight).sum(axis=(1, 2), dtype=np.float64)
        better = loss < best
        best[better], scale[better], multiples[better] = loss[better], channel[better], times[better]
    return scale, multiples
