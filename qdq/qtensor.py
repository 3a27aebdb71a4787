"""Quantized values: the only file with quantize and dequantize arithmetic.

x -> codes = clip(round(x / scale) + zero_point, low, high) -> (codes - zero_point) * scale.
TensorRT reads zero point 0 only; a non-zero one here is realised by `insert` as a shift of the tensor before
QuantizeLinear. Rounding is half to even, as in ONNX and TensorRT. This module must not look at graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qdq.formats import FORMATS, Format

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class QParams:
    """Scale and zero point of one tensor.

    Invariants: every scale is finite and above zero, as TensorRT's parser demands; `zero_point` is a code.

    Attributes:
        scale: () for a whole tensor or (channels,) float32.
        zero_point: the code of the real value 0; 0 unless the tensor is shifted.
        axis: the axis `scale` runs along, None for a whole tensor.
        format: the bit format's name.
    """

    scale: npt.NDArray[np.float32]
    zero_point: int = 0
    axis: int | None = None
    format: str = "int8"

    @property
    def offset(self) -> float:
        """What is subtracted from the tensor before QuantizeLinear: -zero_point * scale, 0 when symmetric."""
        return -self.zero_point * float(self.scale) if self.zero_point else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QTensor:
    """Codes with the parameters that give them meaning.

    Attributes:
        codes: the tensor's shape, in the format's storage dtype.
        params: scale, zero point and axis.
    """

    codes: Array
    params: QParams


def _along(scale: npt.NDArray[np.float32], axis: int | None, rank: int) -> npt.NDArray[np.float32]:
    if axis is None:
        return scale
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)


def to_codes(x: Array, params: QParams) -> Array:
    """Quantize: clip(round_half_even(x / scale) + zero_point, low, high).

    Args:
        x: any shape, float.
        params: per tensor or per axis.

    Returns:
        x's shape in the format's storage dtype.

    >>> to_codes(np.float32([-1.0, 0.25, 9.0]), QParams(scale=np.float32(0.5))).tolist()
    [-2, 0, 18]
    """
    fmt = FORMATS[params.format]
    codes = np.rint(x.astype(np.float32, copy=False) / _along(params.scale, params.axis, x.ndim)) + params.zero_point
    return np.asarray(np.clip(codes, fmt.low, fmt.high).astype(fmt.dtype))


def from_codes(codes: Array, params: QParams) -> npt.NDArray[np.float32]:
    """Dequantize: (codes - zero_point) * scale.

    Args:
        codes: any shape, integer.
        params: as in `to_codes`.

    Returns:
        codes' shape, float32.

    >>> from_codes(np.int8([-2, 3]), QParams(scale=np.float32(0.5))).tolist()
    [-1.0, 1.5]
    """
    centred = codes.astype(np.float32) - np.float32(params.zero_point)
    return np.asarray(centred * _along(params.scale, params.axis, codes.ndim), dtype=np.float32)


def representable(scale: npt.ArrayLike, dtype: str) -> npt.NDArray[np.float32]:
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

    Args:
        weight: any shape, float.
        axis: the output channel axis.
        fmt: the bit format.

    Returns:
        scale: (weight.shape[axis],) float32, exact in the weight's own float type.

    Source: Nagel et al., A White Paper on Neural Network Quantization, arXiv 2106.08295, section 2.2 (symmetric grid).

    >>> weight_params(np.float32([[2.54, -1.0], [0.0, 0.0]]), axis=0, fmt=FORMATS["int8"]).scale.round(4).tolist()
    [0.019999999552965164, 0.019999999552965164]
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(np.asarray(weight, dtype=np.float32)).max(axis=others) / np.float32(fmt.high)
    largest = float(scale.max()) if scale.size else 0.0
    scale = np.where(scale > 0, scale, np.float32(largest or 1.0))
    return QParams(scale=representable(scale, weight.dtype.name), axis=axis, format=fmt.name)
