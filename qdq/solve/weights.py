"""Round one weight: its granularity, the scales, the codes, and for two levels the INT8 grid in between.

values + Spec + rounding (+ second moments) -> QTensor. Every weight is by itself, so that they can be read, rounded and
written one at a time; a large one is worked on in slices of rows, whose size depends on nothing but the columns.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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
from qdq.solve.hessian import COPIES, DAMPING, Hessian
from qdq.solve.rounding import ROUNDINGS, BlockScales, Dtype, Refinement, Rounding, RoundRows, gptq, nearest

# Multiples of a channel's INT8 scale that its largest block scale is tried at; -8 times 16 is INT8's -128.
LARGEST_MULTIPLES = range(8, 17)
# Elements of a slice of rows: roundings copy it about a dozen times in float64. It must not depend on the memory there
# is: descent refits the scales of blocks for as long as any code of the slice changes.
SLICE = 1 << 19
LEAST_ROWS = 64  # of a slice, and what their number is a multiple of: for fewer the products of matrices are slow
SLICE_COPIES = 14  # of a slice in float64 that live at a time, counted for descent on blocks, with a margin


def quantize_weight(
    values: npt.NDArray[np.floating],
    spec: Spec,
    *,
    outputs: int,
    rounding: str,
    moments: Floats | None = None,
    damping: float = DAMPING,
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
        damping: of roundings that look at the moments, see `qdq.solve.hessian`.
        act_order: as damping.
    """
    fmt, method = FORMATS[spec.format], ROUNDINGS[rounding]
    if not fmt.integer and spec.block is None:  # nearest codes: the grid is dense where values are, which is enough
        params = _params(values, spec.axis, fmt)
        return QTensor(codes=to_codes(values, params), params=params)
    hessians = [] if moments is None else [Hessian(H, damping, act_order) for H in moments]
    if spec.block is None:
        params = _params(values, None if spec.axis is None else outputs, fmt)
        if not hessians or method.round_rows is None:
            return QTensor(codes=_nearest(values, params, outputs, fmt), params=params)
        return QTensor(codes=_whole(values, params, outputs, hessians, method.round_rows), params=params)
    weight = _Blocks(values=values, spec=spec)
    known = len(hessians) == 1 and hessians[0].known and method.needs_moments
    hessian = weight.padded_hessian(hessians[0]) if known else None
    if spec.compute_format is not None:
        return weight.two_levels(method, hessian)
    return weight.as_stored(method) if hessian is None else weight.one_level(method, hessian)


def rounding_bytes(shape: Sequence[int], itemsize: int, *, columns: int = 0) -> int:
    """Bytes that `quantize_weight` takes: values, codes, and with moments of `columns` these and copies of a slice."""
    size = math.prod(shape)
    plain = (itemsize + 2) * size  # codes twice: they are made with the rows first
    if not columns:
        return plain
    rows = min(_step(columns), max(1, size // columns))
    return plain + 8 * (COPIES * columns**2 + SLICE_COPIES * rows * columns)


def _step(columns: int) -> int:
    """Rows in a slice."""
    return max(1, SLICE // max(columns, 1) // LEAST_ROWS) * LEAST_ROWS


def _slices(start: int, stop: int, columns: int) -> Iterator[slice]:
    """Some rows in slices."""
    step = _step(columns)
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


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
    values: npt.NDArray[np.floating],
    params: QParams,
    outputs: int,
    hessians: Sequence[Hessian],
    round_rows: RoundRows,
) -> Array:
    """Codes with one scale per output channel, or one in all, each group of channels by the moments of its inputs."""
    fmt = FORMATS[params.format]
    codes = np.empty(values.shape, dtype=fmt.dtype)
    source, target = (np.moveaxis(t, outputs, 0) for t in (values, codes))
    channels, columns = source.shape[0], math.prod(source.shape[1:])
    scale = np.broadcast_to(params.scale.astype(np.float64).reshape(-1, 1), (channels, 1))
    each = channels // len(hessians)
    low = -fmt.high  # symmetric codes: -128 would need a range that amax / 127 never uses
    for group, hessian in enumerate(hessians):
        for part in _slices(group * each, (group + 1) * each, columns):
            rows = source[part].astype(np.float64).reshape(-1, columns)
            target[part] = round_rows(rows, scale[part], hessian, low=low, high=fmt.high).reshape(target[part].shape)
    return codes


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
    def _moved(self) -> npt.NDArray[np.floating]:
        """(..., columns), the blocked axis last."""
        return np.moveaxis(self.values, self._cut[0], -1)

    @property
    def _shape(self) -> tuple[int, ...]:
        """(..., columns) with whole blocks."""
        *others, columns = self._moved.shape
        return (*others, columns + -columns % self._cut[1])

    @cached_property
    def _flat(self) -> npt.NDArray[np.floating]:
        """(rows, columns), perhaps with part of a block at the end."""
        return self._moved.reshape(-1, self._moved.shape[-1])

    def _rows(self, part: slice) -> tuple[Singles, Singles]:
        """Some rows with whole blocks, and the same as (rows, blocks, block, 1)."""
        block = self._cut[1]
        rows = padded(np.ascontiguousarray(self._flat[part], dtype=np.float32), 1, block)
        return rows, np.asarray(blocked(rows, 1, block), dtype=np.float32)

    def padded_hessian(self, hessian: Hessian) -> Hessian:
        """The same for whole blocks: nothing is known of inputs that are not there."""
        missing = self._shape[-1] - hessian.H.shape[-1]
        return replace(hessian, H=np.pad(hessian.H, (0, missing))) if missing else hessian

    def as_stored(self, method: Rounding) -> QTensor:
        """One level without data: nothing is copied."""
        (axis, block), fmt = self._cut, self._fmt
        view = blocked(padded(self.values, axis, block), axis, block)
        scales = method.block_scales(view, None, low=fmt.low, high=fmt.high, float_codes=_float_codes(fmt))
        params = stored_scales(scales, self.values.shape, self.values.dtype.name, axis=axis, block=block, fmt=fmt)
        return QTensor(codes=to_codes(self.values, params), params=params)

    def one_level(self, method: Rounding, hessian: Hessian) -> QTensor:
        """Blocks whose codes a product reads as they are; no row has a larger output error than nearest codes."""
        float_codes = _float_codes(self._fmt)
        stored = self._stored(method.block_scales, hessian.H, float_codes)
        scale, codes = stored.scale.copy(), self._empty()
        if method.round_rows is None:
            for part in self._slices():
                codes[part] = to_codes(self._rows(part)[0], replace(stored, scale=scale[part]))
            return self._tensor(codes, scale, second=stored.second)
        better = method.refinement if float_codes is None else None
        plain = self._stored(nearest.block_scales, None).scale
        for part in self._slices():
            wide = self._rows(part)[0].astype(np.float64)
            found, scale[part] = self._rounded(wide, scale[part], hessian, better or method.round_rows)
            codes[part], scale[part] = _no_worse(wide, found, scale[part], plain[part], hessian.H, self._fmt)
        return self._tensor(codes, scale, second=stored.second)

    def _rounded(
        self, wide: Floats, scale: Singles, hessian: Hessian, method: RoundRows | Refinement
    ) -> tuple[Floats, Singles]:
        """Codes of some rows, and the scales that go with them."""
        (low, high), block = (self._fmt.low, self._fmt.high), self._cut[1]
        every = _every(scale, block)
        if not isinstance(method, Refinement):
            return method(wide, every, hessian, low=low, high=high, float_codes=_float_codes(self._fmt)), scale
        codes = method.start(wide, every, hessian, low=low, high=high)
        codes, fitted = method.refine(wide, codes, scale.astype(np.float64), hessian, low, high)
        scale = representable(fitted, self.values.dtype.name)
        return method.settle(wide, codes, _every(scale, block), hessian, low, high), scale

    def two_levels(self, method: Rounding, hessian: Hessian | None) -> QTensor:
        """Blocks whose values are INT8 codes of their output channel; without data on every core at a time."""
        fmt, (rows, columns), block = self._fmt, (len(self._flat), self._shape[-1]), self._cut[1]
        codes, scale = self._empty(), np.empty((rows, columns // block), dtype=np.float32)
        channel = np.empty(rows, dtype=np.float32)
        H = None if hessian is None else hessian.H
        importance = None if H is None else np.diag(H).astype(np.float32)
        round_rows = method.round_rows or nearest.round_rows

        def work(part: slice) -> None:
            some, view = self._rows(part)
            scales = method.block_scales(view, H, low=fmt.low, high=fmt.high)[:, :, 0, 0]
            channel[part], multiples = _two_levels(view, scales, importance, fmt)
            scale[part] = channel[part][:, None] * multiples
            wide, every = some.astype(np.float64), _every(scale[part], block)
            codes[part] = round_rows(wide, every, hessian, low=fmt.low, high=fmt.high)

        if hessian is None:
            step = max(1, CHUNK // max(columns, 1))
            on_all_cores(work, (slice(start, start + step) for start in range(0, rows, step)))
        else:
            for part in self._slices():
                work(part)
        return self._tensor(codes, scale, channel=channel)

    def _slices(self) -> Iterator[slice]:
        return _slices(0, len(self._flat), self._shape[-1])

    def _empty(self) -> Array:
        """(rows, columns) for codes."""
        return np.empty((len(self._flat), self._shape[-1]), dtype=np.int8 if self._fmt.integer else self._fmt.dtype)

    def _stored(self, block_scales: BlockScales, H: Floats | None, float_codes: Dtype = None) -> QParams:
        """Block scales of all rows as they are stored, with the scale of scales that is the same for all tried."""
        fmt, block, values = self._fmt, self._cut[1], self.values
        shape = (len(self._flat), self._shape[-1])
        found = np.empty((shape[0], shape[1] // block, 1, 1), dtype=np.float32)
        for part in self._slices():
            view = self._rows(part)[1]
            found[part] = block_scales(view, H, low=fmt.low, high=fmt.high, float_codes=float_codes)
        most = max(float(values.max()), -float(values.min())) / fmt.high if values.size else 0.0
        return stored_scales(found, shape, values.dtype.name, axis=1, block=block, fmt=fmt, most=most)

    def _tensor(
        self, codes: Array, scale: Singles, *, channel: Singles | None = None, second: float | None = None
    ) -> QTensor:
        """Rows of codes and scales in the layout of the weight; `channel` are the scales of the second level."""
        fmt, shape, (axis, block) = self._fmt, self._shape, self._cut
        scales = np.moveaxis(scale.reshape(*shape[:-1], -1), -1, axis)
        scales, length = np.ascontiguousarray(scales), self.values.shape[axis]
        params = QParams(scale=scales, axis=axis, format=fmt.name, block=block, length=length, second=second)
        compute_params = None
        if channel is not None and self.spec.compute_format is not None:
            compute_params = QParams(scale=channel, axis=1 - axis, format=self.spec.compute_format)
        shaped = np.moveaxis(codes.view(fmt.dtype).reshape(shape), -1, axis)
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
