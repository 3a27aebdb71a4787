"""Quantized values: the only file with quantize and dequantize arithmetic.

x -> codes = clip(round(x / scale) + zero_point, low, high) -> (codes - zero_point) * scale.
One scale per tensor, per index of an axis, or per block of consecutive indices of an axis; a blocked scale keeps the
rank of its tensor. TensorRT reads zero point 0 only; a non-zero one here is realised by `insert` as a shift of the
tensor before QuantizeLinear. Rounding is half to even, as in ONNX and TensorRT. This module must not look at graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Singles
from qdq.core.formats import FORMATS, Format
from qdq.core.resources import on_all_cores

SMALLEST_FP8 = 2.0**-9  # of E4M3
LEAST_SECOND = 2.0**-14  # FP16's smallest normal number
CHUNK = 1 << 18  # elements worked on at a time, on each thread: 1 MB of float32, which stays in the cache

Array = npt.NDArray[np.generic]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class QParams:
    """Scale and zero point of one tensor.

    Invariants: every scale is finite and above zero, as TensorRT's parser demands; `zero_point` is a code.

    Attributes:
        scale: () for a whole tensor, (channels,) along `axis`, or with blocks the tensor's shape with as many blocks
            along `axis` as there are; float32.
        zero_point: the code of the real value 0; 0 unless the tensor is shifted.
        axis: the axis `scale` runs along, None for a whole tensor.
        format: the bit format's name.
        block: how many indices of `axis` share a scale; None for one.
        length: size of the real tensor along a blocked axis; what codes have beyond is padding with zeros.
        second: scale of the block scales where the format quantizes them themselves; `scale` holds the products.
    """

    scale: Singles
    zero_point: int = 0
    axis: int | None = None
    format: str = "int8"
    block: int | None = None
    length: int | None = None
    second: float | None = None

    @property
    def offset(self) -> float:
        """What is subtracted from the tensor before QuantizeLinear: -zero_point * scale, 0 when symmetric."""
        return -self.zero_point * float(self.scale) if self.zero_point else 0.0

    def times(self, factor: float) -> QParams:
        """Those of a whole tensor with its scale times a factor, above zero."""
        scale = np.asarray(max(float(self.scale) * factor, float(np.finfo(np.float32).tiny)), dtype=np.float32)
        return QParams(scale=scale, zero_point=self.zero_point, format=self.format)


@dataclass(frozen=True, slots=True, kw_only=True)
class QTensor:
    """Codes with the parameters that give them meaning.

    Attributes:
        codes: the tensor's shape, in the format's storage dtype; padded to whole blocks along a blocked axis.
        params: scale, zero point and axis.
        compute_params: of two-level weights: the per-channel parameters in whose codes the product reads the values.
    """

    codes: Array
    params: QParams
    compute_params: QParams | None = None

    def part(self, axis: int, chosen: slice) -> QTensor:
        """Some indices of an axis that is not cut into blocks, with their parameters."""

        def cut(params: QParams) -> QParams:
            along = params.axis == axis or params.scale.ndim == self.codes.ndim > 0
            if params.axis is None or not along:
                return params
            index = (slice(None),) * axis if params.scale.ndim == self.codes.ndim else ()
            return replace(params, scale=params.scale[(*index, chosen)])

        codes = self.codes[(*(slice(None),) * axis, chosen)]
        return QTensor(
            codes=codes,
            params=cut(self.params),
            compute_params=None if self.compute_params is None else cut(self.compute_params),
        )

    def values(self) -> Singles:
        """What the product reads, dequantized: the tensor's shape without padding, float32."""
        values = from_codes(self.codes, self.params)
        if self.compute_params is not None:
            values = from_codes(to_codes(values, self.compute_params), self.compute_params)
        return values


def _along(scale: Singles, axis: int | None, rank: int) -> Singles:
    if axis is None or scale.ndim == rank:
        return scale
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)


def padded(x: npt.NDArray[T], axis: int, block: int) -> npt.NDArray[T]:
    """The tensor with zeros behind it along an axis, up to whole blocks; itself where there are only whole ones."""
    missing = -x.shape[axis] % block
    return np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def blocked(x: npt.NDArray[T], axis: int, block: int) -> npt.NDArray[T]:
    """A view (outer, blocks, block, inner) of a tensor that has whole blocks along an axis.

    >>> blocked(np.arange(12).reshape(4, 3), 0, 2).shape
    (1, 2, 2, 3)
    """
    shape = x.shape
    outer, inner = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
    return x.reshape(outer, shape[axis] // block, block, inner)


def in_chunks(work: Callable[[tuple[slice, slice]], None], view: Array) -> None:
    """Call `work` on parts of the first two axes of a blocked view that together make it up, on every core."""

    def parts() -> Iterator[tuple[slice, slice]]:
        outer, blocks, block, inner = view.shape
        blocks_at_once = max(1, CHUNK // max(block * inner, 1))
        outer_at_once = max(1, blocks_at_once // max(blocks, 1))
        for i in range(0, outer, outer_at_once):
            for j in range(0, blocks, blocks_at_once):
                yield slice(i, i + outer_at_once), slice(j, j + blocks_at_once)

    if view.size <= CHUNK:
        for part in parts():
            work(part)
        return
    on_all_cores(work, parts())


def block_amax(view: Array) -> Singles:
    """(outer, blocks, 1, inner) largest magnitudes of the blocks of a view, float32; no copy as large as the view."""
    found = np.empty((*view.shape[:2], 1, view.shape[3]), dtype=np.float32)

    def work(part: tuple[slice, slice]) -> None:
        x = view[part].astype(np.float32, copy=False)
        found[part] = np.maximum(x.max(axis=2, keepdims=True), -x.min(axis=2, keepdims=True))

    in_chunks(work, view)
    return found


def _coded(q: Singles, fmt: Format) -> Array:
    """Values on the scale of codes -> codes; `q` is overwritten."""
    if not fmt.integer:
        return np.clip(q, fmt.low, fmt.high, out=q).astype(fmt.dtype)  # the cast rounds half to even
    np.rint(q, out=q)
    np.clip(q, fmt.low, fmt.high, out=q)
    return q.astype(np.int8).view(fmt.dtype) if fmt.bits == 4 else q.astype(fmt.dtype)


def to_codes(x: Array, params: QParams) -> Array:
    """Quantize: clip(round_half_even(x / scale) + zero_point, low, high).

    Returns:
        x's shape in the format's storage dtype; with blocks, padded with zero codes to whole blocks.

    >>> to_codes(np.float32([-1.0, 0.25, 9.0]), QParams(scale=np.float32(0.5))).tolist()
    [-2, 0, 18]
    """
    fmt = FORMATS[params.format]
    if params.block is not None:
        assert params.axis is not None
        x = padded(x, params.axis, params.block)
        codes = np.empty(x.shape, dtype=fmt.dtype)
        source, target = (blocked(t, params.axis, params.block) for t in (x, codes))
        scale = blocked(params.scale, params.axis, 1)

        def work(part: tuple[slice, slice]) -> None:
            target[part] = _coded(np.divide(source[part], scale[part], dtype=np.float32), fmt)

        in_chunks(work, source)
        return codes
    codes = np.asarray(x.astype(np.float32, copy=False) / _along(params.scale, params.axis, x.ndim))
    if not fmt.integer:
        return _coded(codes, fmt)
    codes = np.rint(codes) + params.zero_point
    return np.asarray(np.clip(codes, fmt.low, fmt.high).astype(fmt.dtype))


def from_codes(codes: Array, params: QParams) -> Singles:
    """Dequantize: (codes - zero_point) * scale.

    Returns:
        codes' shape, float32; of a blocked axis only `params.length` elements where that is known.

    >>> from_codes(np.int8([-2, 3]), QParams(scale=np.float32(0.5))).tolist()
    [-1.0, 1.5]
    """
    if params.block is not None:
        assert params.axis is not None
        whole = np.empty(codes.shape, dtype=np.float32)
        source, target = (blocked(t, params.axis, params.block) for t in (codes, whole))
        scale = blocked(params.scale, params.axis, 1)

        def work(part: tuple[slice, slice]) -> None:
            np.multiply(source[part].astype(np.float32), scale[part], out=target[part])

        in_chunks(work, source)
        kept = (slice(None),) * params.axis + (slice(params.length),)
        return whole[kept]
    centred = codes.astype(np.float32) - np.float32(params.zero_point)
    return np.asarray(centred * _along(params.scale, params.axis, codes.ndim), dtype=np.float32)


def representable(scale: npt.ArrayLike, dtype: str) -> Singles:
    """Round scales to the float type they will be stored in, never to zero.

    Args:
        scale: any shape, positive.
        dtype: 'float32', 'float16', 'bfloat16' or 'float64' (stored as float32).

    Returns:
        scale's shape, float32, each value exact in `dtype` and at least its smallest normal number.

    >>> representable(1e-9, "float16") > 0
    np.True_
    """
    kept = np.asarray(scale, dtype=np.float32)
    if dtype == "float16":
        return np.maximum(kept, np.finfo(np.float16).tiny).astype(np.float16).astype(np.float32)
    kept = np.maximum(kept, np.finfo(np.float32).tiny)
    if dtype == "bfloat16":
        return kept.astype(ml_dtypes.bfloat16).astype(np.float32)
    return kept


def weight_params(weight: Array, *, axis: int, fmt: Format) -> QParams:
    """Symmetric scales of a weight, one per output channel: amax / high.

    A dead channel (all zeros) takes the largest scale of the others, an all-zero weight takes 1: any positive scale is
    exact there, and TensorRT's parser refuses a zero scale.

    Returns:
        scale: (weight.shape[axis],) float32, exact in the weight's own float type.

    Source: Nagel et al., A White Paper on Neural Network Quantization, arXiv 2106.08295, section 2.2 (symmetric grid).

    >>> weight_params(np.float32([[2.54, -1.0], [0.0, 0.0]]), axis=0, fmt=FORMATS["int8"]).scale.round(4).tolist()
    [0.019999999552965164, 0.019999999552965164]
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    values = np.asarray(weight, dtype=np.float32)
    largest_each = np.maximum(values.max(axis=others), -values.min(axis=others))  # no copy as large as the weight
    scale = largest_each / np.float32(fmt.high)
    largest = float(scale.max()) if scale.size else 0.0
    scale = np.where(scale > 0, scale, np.float32(largest or 1.0))
    return QParams(scale=representable(scale, weight.dtype.name), axis=axis, format=fmt.name)


def block_params(weight: Array, *, axis: int, block: int, fmt: Format) -> QParams:
    """Symmetric scales of a weight whose `axis` is cut into blocks: amax / high. Zeros fill up the last block.

    A block of zeros takes the largest scale.

    Returns:
        scale: the weight's shape with the number of blocks along `axis`; exact in the weight's own float type.

    >>> block_params(np.float32([[7.0], [1.0], [0.0], [14.0]]), axis=0, block=2, fmt=FORMATS["int4"]).scale.tolist()
    [[1.0], [2.0]]
    """
    scale = block_amax(blocked(padded(weight, axis, block), axis, block)) / np.float32(fmt.high)
    return stored_scales(scale, weight.shape, weight.dtype.name, axis=axis, block=block, fmt=fmt)


def scale_of_scales(largest: float, fmt: Format) -> float:
    """The scale of block scales that are codes themselves: largest / (their largest code), up to a power of two.

    A power of two, and no smaller than FP16's smallest normal number: it and the block scales are then the same numbers
    in every float type. A binade at the low end of E4M3's 18 is what that costs. `largest` is of the block scales.

    >>> scale_of_scales(1.0, FORMATS["nvfp4"])
    0.00390625
    """
    return float(max(2.0 ** np.ceil(np.log2(largest / FORMATS[fmt.scale_format].high)), LEAST_SECOND))


def stored_scales(
    scale: Singles, shape: Sequence[int], dtype: str, *, axis: int, block: int, fmt: Format, most: float | None = None
) -> QParams:
    """Parameters of a blocked weight from the scales wanted: positive, and exact in the types that store them.

    Args:
        scale: (outer, blocks, 1, inner), as of `blocked`; zero where a block holds zeros only.
        shape: of the weight.
        dtype: float type that the scales are stored in.
        axis: the axis that is cut into blocks.
        block: elements in a block.
        fmt: the bit format. Where it quantizes its scales too, they are codes of that format times one scale per
            tensor, as in NVFP4; see `scale_of_scales`.
        most: the largest scale that shares this one scale; None for the largest of these.
    """
    largest = float(scale.max()) if scale.size else 0.0
    scale = np.where(scale > 0, scale, np.float32(largest or 1.0))
    blocks = [scale.shape[1] if i == axis else size for i, size in enumerate(shape)]
    second = None
    if fmt.scale_format:
        grid = FORMATS[fmt.scale_format]
        second = scale_of_scales(most or largest or 1.0, fmt)
        codes = np.clip(scale / np.float32(second), SMALLEST_FP8, grid.high)
        scale = codes.astype(grid.dtype).astype(np.float32) * np.float32(second)
    else:
        scale = representable(scale, dtype)
    return QParams(
        scale=scale.reshape(blocks), axis=axis, format=fmt.name, block=block, length=shape[axis], second=second
    )
