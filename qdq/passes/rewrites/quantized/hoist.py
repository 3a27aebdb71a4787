"""One weight scale per convolution for the compiler, one per channel for the accuracy.

    Conv(x, DQ(W, s_c), b)  ->  Mul(Conv(x, DQ(W, s), b'), r_c) [+ b - b' r_c]      r_c = s_c / s,  b' = round(b / r_c)

An INT8 convolution with per-channel scales writes FP32 in an FP16 graph, one with a single scale writes FP16
(TensorRT-RTX 1.7.1, SM89); Mul and Add fuse with what follows, unless that is a normalization. s is a power of two, so
that codes times s and s_c / s are exact in FP16 and BF16, and none above the smallest scale, so that the unscaled
output is nowhere larger than the scaled one: FP16 does not overflow where it did not before. The bias stays inside:
products that it cancels, above all behind a shift, would lose their digits if they were written without it. What b'
loses by rounding is added behind the Mul. Codes are unchanged. It must not touch other operators.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.passes.rewrites.edit import Edit, Rewritten, altered, each_node, require_constants
from qdq.passes.rewrites.quantized.weight_scales import channel_scales, common_scale, dequantized, ratios

STAGE, RANK = "quantized", 10  # behind norm_scale, which needs no Mul where it fits
NEEDS = "hoist"


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Move the per-channel scales of quantized Conv weights behind the convolution; fires on the Conv."""
    return each_node(model, only, ["Conv"], partial(_move_scales, made={}))


def _move_scales(model: Model, edit: Edit, conv: NodeProto, made: dict[tuple[str, str], NodeProto]) -> None:
    dequantize, scales = channel_scales(model, conv)
    require_constants(model, conv, 2)
    factors = ratios(scales)
    nodes = dequantized(model, edit, made, dequantize, common_scale(scales))
    codes, scale = dequantize.input[:2]
    nodes.append(altered(conv, {1: made[codes, scale].output[0]}))
    if (factors != 1).any():
        nodes += _scaled(model, edit, nodes[-1], factors, scales.dtype, model.array(codes).ndim)
    edit.replace(conv, nodes)


def _scaled(
    model: Model, edit: Edit, conv: NodeProto, factors: np.ndarray, dtype: np.dtype[Any], rank: int
) -> list[NodeProto]:
    """The Mul behind a Conv, whose bias is divided, and the Add of what that loses; the last makes the old output."""
    output, along = conv.output[0], (-1, *(1,) * (rank - 2))
    conv.output[0] = edit.name(f"{output}_unscaled")
    lost = np.zeros(1)
    if any(conv.input[2:]):
        bias = model.array(conv.input[2]).astype(np.float64)
        inside = (bias / factors).astype(dtype)
        conv.input[2] = edit.constant(f"{conv.name}_inside", inside)
        lost = (bias - inside.astype(np.float64) * factors).astype(dtype)
    ends = dtype == np.float32 or not lost.any()  # float32 loses no more than the Add itself would
    ratios_name = edit.constant(f"{conv.name}_ratios", factors.astype(dtype).reshape(along))
    mul = edit.node("Mul", [conv.output[0], ratios_name], f"{conv.name}_Mul", output if ends else "")
    if ends:
        return [mul]
    added = edit.constant(f"{conv.name}_added", lost.reshape(along))
    return [mul, edit.node("Add", [mul.output[0], added], f"{conv.name}_Add", output)]
