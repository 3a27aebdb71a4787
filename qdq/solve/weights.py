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

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats, Singles
from qdq.core.formats import FORMATS, Format
from qdq.core.qtensor import (
    CHUNK,
    Array,
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
from qdq.core.resources import on_all_cores
from qdq.plan.spec import Spec
from qdq.solve.rounding import ROUNDINGS, Dtype, Rounding, gptq, nearest

# Multiples of a channel's INT8 scale that its largest block scale is tried at; -8 times 16 is INT8's -128.
LARGEST_MULTIPLES = range(8, 17)


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
        rounding: a name in `ROUNDINGS`.
        moments: (groups, columns, columns) of the inputs, each group's for its share of the output channels; None
            rounds as the rounding does without data.
        damping: of roundings that look at the moments, see `qdq.solve.rounding.gptq`.
            act_order: as damping.
    """
    fmt, method = FORMATS[spec.format], ROUNDINGS[rounding]
    if not fmt.integer and spec.block is None:  # nearest codes: the grid is dense where values are, which is enough
        params = _params(values, spec.axis, fmt)
        return QTensor(codes=to_codes(values, params), params=params)
    if spec.block is None:
        if moments is None or method.round_rows is None:
            params = _params(values, None if spec.axis is None else outputs, fmt)
            return QTensor(codes=_nearest(values, params, outputs, fmt), params=params)
        return _whole(values, spec, outputs, moments, partial(method.round_rows, damping=damping, act_order=act_order))
    weight = _Blocks(values=values, spec=spec)
    if moments is None or len(moments) > 1 or not moments.any() or not method.needs_moments:
        return weight.as_stored(method) if spec.compute_format is None else weight.two_levels_in_pieces(method)
    missing = weight.whole.shape[-1] - moments.shape[-1]
    moment = np.pad(moments[0], (0, missing)) if missing else moments[0]
    if spec.compute_format is None:
        return weight.one_level(method, moment, damping, act_order)
    return weight.two_levels(method, moment, damping, act_order)


def _float_codes(fmt: Format) -> Dtype:
    """The type whose values the codes of a format have, None for integers."""
    return None if fmt.integer else fmt.dtype


def _params(values: npt.NDArray[np.floating], axis: int | None, fmt: Format) -> QParams:
    """One scale per index of an axis, or one in all."""
    if axis is not None:
        return weight_params(values, axis=axis, fmt=fmt)
    amax = max(float(values.max()), -float(values.min())) if values.size else 0.0
    scale = representable(amax / fmt.high if amax else 1.0, values.dtype.name)
    return QParams(scale=np.asarray(scale), format=fmt.name)


def _whole(
    values: npt.NDArray[np.floating], spec: Spec, outputs: int, moments: Floats, round_rows: Callable[..., Floats]
) -> QTensor:
    """One scale per output channel, or one in all, each group of channels by the moments of its inputs."""
    fmt = FORMATS[spec.format]
    params = _params(values, None if spec.axis is None else outputs, fmt)
    moved = np.moveaxis(values, outputs, 0).astype(np.float64)
    rows = moved.reshape(moved.shape[0], -1)
    scale = np.broadcast_to(params.scale.astype(np.float64).reshape(-1, 1), (rows.shape[0], 1))
    low = -fmt.high  # symmetric codes: -128 would need a range that amax / 127 never uses
    groups = len(moments)
    parts = zip(np.split(rows, groups), np.split(scale, groups), moments, strict=True)
    codes = np.concatenate([round_rows(w, s, h, low=low, high=fmt.high) for w, s, h in parts])
    shaped = np.moveaxis(codes.reshape(moved.shape), 0, outputs)
    return QTensor(codes=np.ascontiguousarray(shaped).astype(fmt.dtype), params=params)


def _nearest(values: npt.NDArray[np.floating], params: QParams, outputs: int, fmt: Format) -> Array:
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


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """A weight that is cut into blocks along `spec.axis`."""

    values: npt.NDArray[np.floating]
    spec: Spec

    @property
    def _fmt(self) -> Format:
        return FORMATS[self.spec.format]

    @cached_property
    def _cut(self) -> tuple[int, int]:
        """The blocked axis and the length of a block."""
        assert self.spec.axis is not None and self.spec.block is not None
        return self.spec.axis, self.spec.block

    @cached_property
    def _padded(self) -> npt.NDArray[np.floating]:
        return padded(self.values, *self._cut)

    @property
    def whole(self) -> npt.NDArray[np.floating]:
        """(..., columns) whole blocks, the blocked axis last."""
        return np.moveaxis(self._padded, self._cut[0], -1)

    def as_stored(self, method: Rounding) -> QTensor:
        """One level without data: nothing is copied."""
        (axis, block), fmt = self._cut, self._fmt
        view = blocked(self._padded, axis, block)
        scales = method.block_scales(view, None, low=fmt.low, high=fmt.high, float_codes=_float_codes(fmt))
        params = stored_scales(scales, self.values.shape, self.values.dtype.name, axis=axis, block=block, fmt=fmt)
        return QTensor(codes=to_codes(self.values, params), params=params)

    def one_level(self, method: Rounding, moment: Floats, damping: float, act_order: bool) -> QTensor:
        """Blocks whose codes a product reads as they are; no row has a larger output error than nearest codes."""
        fmt, float_codes, block = self._fmt, _float_codes(self._fmt), self._cut[1]
        low, high = fmt.low, fmt.high
        rows, view = self._rows()
        stored = self._storing(view)
        scale, second = stored(method.block_scales(view, moment, low=low, high=high, float_codes=float_codes))
        if method.round_rows is None:
            params = QParams(scale=scale, axis=1, format=fmt.name, block=block)
            return self._tensor(to_codes(rows, params), scale, second=second)
        wide, every = rows.astype(np.float64), _every(scale, block)
        better = method.refinement if float_codes is None else None
        first = better.start if better else method.round_rows
        codes = first(
            wide, every, moment, low=low, high=high, float_codes=float_codes, damping=damping, act_order=act_order
        )
        if better is not None:
            codes, fitted = better.refine(wide, codes, scale.astype(np.float64), moment, low, high, damping)
            scale = representable(fitted, self.values.dtype.name)
            codes = better.settle(wide, codes, _every(scale, block), moment, low, high, damping)
        plain, _ = stored(nearest.block_scales(view, None, low=low, high=high))
        codes, scale = _no_worse(wide, codes, scale, plain, moment, fmt)
        return self._tensor(codes, scale, second=second)

    def two_levels(self, method: Rounding, moment: Floats, damping: float, act_order: bool) -> QTensor:
        """Blocks whose values are INT8 codes of their output channel."""
        fmt, round_rows = self._fmt, method.round_rows or nearest.round_rows
        low, high = fmt.low, fmt.high
        rows, view = self._rows()
        scales = method.block_scales(view, moment, low=low, high=high)[:, :, 0, 0]
        channel, multiples = _two_levels(view, scales, np.diag(moment).astype(np.float32), fmt)
        scale = channel[:, None] * multiples
        wide, every = rows.astype(np.float64), _every(scale, self._cut[1])
        codes = round_rows(wide, every, moment, low=low, high=high, damping=damping, act_order=act_order)
        return self._tensor(codes, scale, channel=channel)

    def two_levels_in_pieces(self, method: Rounding) -> QTensor:
        """The same without data, some rows at a time on every core."""
        fmt, block, flat = self._fmt, self._cut[1], self.whole.reshape(-1, self.whole.shape[-1])
        codes = np.empty(flat.shape, dtype=np.int8)
        scale = np.empty((flat.shape[0], flat.shape[1] // block), dtype=np.float32)
        channel = np.empty(flat.shape[0], dtype=np.float32)
        step = max(1, CHUNK // max(flat.shape[1], 1))
        round_rows = method.round_rows or nearest.round_rows

        def work(start: int) -> None:
            part = slice(start, start + step)
            rows = np.ascontiguousarray(flat[part], dtype=np.float32)
            view = np.asarray(blocked(rows, 1, block), dtype=np.float32)
            scales = method.block_scales(view, None, low=fmt.low, high=fmt.high)[:, :, 0, 0]
            channel[part], multiples = _two_levels(view, scales, None, fmt)
            scale[part] = channel[part][:, None] * multiples
            wide, every = rows.astype(np.float64), _every(scale[part], block)
            codes[part] = round_rows(wide, every, None, low=fmt.low, high=fmt.high)

        on_all_cores(work, range(0, flat.shape[0], step))
        return self._tensor(codes, scale, channel=channel)

    def _rows(self) -> tuple[Singles, Singles]:
        """(rows, columns), and the same as (rows, blocks, block, 1)."""
        rows = np.ascontiguousarray(self.whole.reshape(-1, self.whole.shape[-1]), dtype=np.float32)
        return rows, np.asarray(blocked(rows, 1, self._cut[1]), dtype=np.float32)

    def _storing(self, view: Singles) -> Callable[[Singles], tuple[Singles, float | None]]:
        """What stores scales exactly, with the scale of scales that is the same for all that are tried."""
        fmt, shape = self._fmt, (view.shape[0], view.shape[1] * view.shape[2])
        most = max(float(view.max()), -float(view.min())) / fmt.high if view.size else 0.0

        def stored(scales: Singles) -> tuple[Singles, float | None]:
            dtype, block = self.values.dtype.name, self._cut[1]
            made = stored_scales(scales, shape, dtype, axis=1, block=block, fmt=fmt, most=most)
            return made.scale, made.second

        return stored

    def _tensor(
        self, codes: Array, scale: Singles, *, channel: Singles | None = None, second: float | None = None
    ) -> QTensor:
        """Rows of codes and scales in the layout of the weight; `channel` are the scales of the second level."""
        fmt, whole, (axis, block) = self._fmt, self.whole, self._cut
        typed = codes.astype(np.int8 if fmt.integer else fmt.dtype, copy=False).view(fmt.dtype)
        scales = np.moveaxis(scale.reshape(*whole.shape[:-1], -1), -1, axis)
        scales, length = np.ascontiguousarray(scales), self.values.shape[axis]
        params = QParams(scale=scales, axis=axis, format=fmt.name, block=block, length=length, second=second)
        compute_params = None
        if channel is not None and self.spec.compute_format is not None:
            compute_params = QParams(scale=channel, axis=1 - axis, format=self.spec.compute_format)
        shaped = np.moveaxis(typed.reshape(whole.shape), -1, axis)
        return QTensor(codes=np.ascontiguousarray(shaped), params=params, compute_params=compute_params)


def _every(scale: Singles, block: int) -> Floats:
    """The scale of each column."""
    return np.repeat(scale, block, axis=1).astype(np.float64)


def _no_worse(
    wide: Floats, codes: Floats, scale: Singles, plain: Singles, moment: Floats, fmt: Format
) -> tuple[Floats, Singles]:
    """For each row the better of its codes and the nearest ones with scales that clip nothing, by output error."""
    block = wide.shape[1] // scale.shape[1]
    every = np.repeat(plain, block, axis=1).astype(np.float64)
    near = nearest.round_rows(wide, every, None, low=fmt.low, high=fmt.high, float_codes=_float_codes(fmt))
    found = gptq.loss(wide - codes * np.repeat(scale, block, axis=1), moment)
    worse = found > gptq.loss(wide - near * every, moment)
    return np.where(worse[:, None], near, codes), np.where(worse[:, None], plain, scale)


def _two_levels(
    view: Singles,
    scales: Singles,
    importance: Singles | None,
    fmt: Format,
) -> tuple[Singles, Singles]:
    """Block scales as whole multiples of one scale per channel, so that every value is an INT8 code of the channel.

    `view` is (rows, blocks, block, 1); `scales` are the (rows, blocks) wanted, zero for blocks of zeros; `importance`
    are (columns,) weights of the squared errors, or None.

    Returns:
        (rows,) channel scales, normal numbers of FP16, and (rows, blocks) multiples from 1 to 16, both float32.

    Source: the second phase of DGQ, arXiv 2310.04836, with zero point 0: the channel's scale is the one of least error.
    """
    largest = np.maximum(scales.max(axis=1), np.float32(np.finfo(np.float32).tiny))
    weight = None if importance is None else importance.reshape(1, *view.shape[1:3])
    best = np.full(view.shape[0], np.inf)
    scale, multiples = np.empty(view.shape[0], dtype=np.float32), np.empty(scales.shape, dtype=np.float32)
    for most in LARGEST_MULTIPLES:
        # FP16 whatever the model's type: other nodes may become FP16 later, and the codes must stay exact then.
        with np.errstate(over="ignore"):
            channel = representable(largest / most, "float16")
        channel = np.where(np.isfinite(channel), channel, largest / most)  # beyond FP16: other nodes stay FP32
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
