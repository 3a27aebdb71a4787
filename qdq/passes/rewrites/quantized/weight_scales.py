"""Per-channel scales of quantized Conv weights and the one scale that can stand for them: what two rewrites share.

DequantizeLinear(codes, s_c)  ->  s_c as values, s = a power of two below them, DequantizeLinear(codes, s)
It must not decide where the ratios s_c / s go, or change a code.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto, TensorProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.edit import Edit, Unfit

LARGEST_RATIO = 1024.0  # the unscaled output is up to this much smaller; FP16 is precise from 6e-5 on
CODES = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)


def channel_scales(model: Model, conv: NodeProto) -> tuple[NodeProto, np.ndarray]:
    """The DequantizeLinear of a Conv's weight and its scales; `Unfit` but for symmetric codes per channel."""
    dequantize = model.producer(conv.input[1])
    dequantizes = dequantize is not None and dequantize.op_type == "DequantizeLinear"
    if dequantize is None or not dequantizes or not all(map(model.is_constant, dequantize.input)):
        raise Unfit("its weight is not stored in codes")
    codes, scale, *zero = dequantize.input
    if model.initializers[codes].data_type not in CODES or (zero and np.any(model.array(zero[0]).astype(np.float32))):
        raise Unfit("the codes of its weight are neither INT8 nor FP8, or have a zero point")
    scales = model.array(scale)
    if scales.ndim != 1 or attribute_value(dequantize, "axis", 1) != 0:
        raise Unfit("its weight has no scale per output channel")
    return dequantize, scales


def ratios(scales: np.ndarray) -> np.ndarray:
    """float64: each scale divided by the common one; `Unfit` where they are more than `LARGEST_RATIO` apart."""
    wide = scales.astype(np.float64)
    if wide.max() > LARGEST_RATIO * wide.min():
        raise Unfit(f"its scales are more than {LARGEST_RATIO:g} times apart")
    return wide / common_scale(scales)


def common_scale(scales: np.ndarray) -> float:
    """The largest power of two that is no larger than any scale, so that nothing becomes larger; in FP16 normal.

    A power of two times a code is exact in every float type, so that the weights lose nothing more by rounding. A
    subnormal scale loses digits, and TensorRT works with its reciprocal, which FP16 cannot hold.
    """
    below = 2.0 ** math.floor(math.log2(float(scales.astype(np.float64).min())))
    return max(below, float(np.finfo(np.float16).tiny)) if scales.dtype == np.float16 else below


def dequantized(
    model: Model, edit: Edit, made: dict[tuple[str, str], NodeProto], dequantize: NodeProto, common: float
) -> list[NodeProto]:
    """The new nodes that dequantize the same codes with one scale; none if `made` already holds that one.

    `made`, (codes, scales) -> the new DequantizeLinear, receives it.
    """
    codes, scale = dequantize.input[:2]
    if (codes, scale) in made:
        return []
    single = edit.constant(f"{codes}_common_scale", np.asarray(common, model.array(scale).dtype))
    zero = edit.constant(f"{codes}_zero", np.zeros((), model.array(codes).dtype))
    made[codes, scale] = edit.node("DequantizeLinear", (codes, single, zero), f"{codes}_DequantizeLinear")
    return [made[codes, scale]]
