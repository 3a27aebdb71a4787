"""One weight scale per convolution for the compiler, one per channel for the accuracy.

    Conv(x, DQ(W, s_c), b)  ->  Add(Mul(Conv(x, DQ(W, s)), s_c / s), b)      s = min s_c

An INT8 convolution with per-channel scales writes FP32 in an FP16 graph, one with a single scale writes FP16
(TensorRT-RTX 1.7.1, SM89); Mul and Add fuse with what follows, unless that is a normalization. s is the smallest
scale, so that the unscaled output is nowhere larger than the scaled one: FP16 does not overflow where it did not
before. Codes are unchanged. It must not touch other operators.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto, TensorProto

from qdq.graph import Model
from qdq.nodes import attribute_value
from qdq.surgery.rewritten import Edit, Rewritten

STAGE, RANK = "quantized", 10

LARGEST_RATIO = 1024.0  # the unscaled output is up to this much smaller; FP16 is precise from 6e-5 on
CODES = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Move the per-channel scales of quantized Conv weights behind the convolution.

    Args:
        model: Q/DQ model, in any float type; after `precision.convert` for an FP16 one, so that types are settled.
        only: names of the Conv nodes that may be changed; None for all.

    Returns:
        The model and the Conv nodes fired on. A Conv whose scales are more than `LARGEST_RATIO` apart stays as it is.
    """
    edit = Edit(model, only)
    made: dict[tuple[str, str], NodeProto] = {}
    for conv in edit.candidates("Conv"):
        dequantize = model.producer(conv.input[1])
        bias = conv.input[2] if len(conv.input) > 2 else ""
        scales = None if dequantize is None else _channel_scales(model, dequantize)
        if dequantize is None or scales is None or (bias and not model.is_constant(bias)):
            continue
        wide = scales.astype(np.float64)
        if wide.max() > LARGEST_RATIO * wide.min():
            continue
        # A subnormal scale loses digits, and TensorRT works with its reciprocal, which FP16 cannot hold.
        common = max(float(wide.min()), float(np.finfo(np.float16).tiny) if scales.dtype == np.float16 else 0.0)
        codes = dequantize.input[0]
        key = (codes, dequantize.input[1])
        nodes = []
        if key not in made:
            smallest = edit.constant(f"{codes}_smallest_scale", np.asarray(common, scales.dtype))
            zero = edit.constant(f"{codes}_zero", np.zeros((), model.array(codes).dtype))
            made[key] = edit.node("DequantizeLinear", (codes, smallest, zero), f"{codes}_DequantizeLinear")
            nodes.append(made[key])
        inner = NodeProto()
        inner.CopyFrom(conv)
        inner.input[1] = made[key].output[0]
        nodes.append(inner)
        if wide.max() > common or wide.min() < common:
            nodes += _scaled(model, edit, inner, (wide / common).astype(scales.dtype), model.array(codes).ndim)
        edit.replace(conv, nodes)
    return edit.finish()


def _scaled(model: Model, edit: Edit, conv: NodeProto, ratios: np.ndarray, rank: int) -> list[NodeProto]:
    """The Mul and Add behind a Conv, which loses its bias to them; the last makes the old output."""
    output, bias = conv.output[0], conv.input[2] if len(conv.input) > 2 else ""
    along = (-1, *(1,) * (rank - 2))
    del conv.input[2:]
    conv.output[0] = edit.name(f"{output}_unscaled")
    factors = edit.constant(f"{conv.name}_ratios", ratios.reshape(along))
    mul = edit.node("Mul", [conv.output[0], factors], f"{conv.name}_Mul", "" if bias else output)
    if not bias:
        return [mul]
    added = edit.constant(f"{conv.name}_added", model.array(bias).reshape(along))
    return [mul, edit.node("Add", [mul.output[0], added], f"{conv.name}_Add", output)]


def _channel_scales(model: Model, dequantize: NodeProto) -> np.ndarray | None:
    """The scales of symmetric weight codes along axis 0; None for any other node."""
    if dequantize.op_type != "DequantizeLinear" or any(not model.is_constant(t) for t in dequantize.input):
        return None
    codes, scale, *zero = dequantize.input
    if model.initializers[codes].data_type not in CODES or (zero and np.any(model.array(zero[0]).astype(np.float32))):
        return None
    scales = model.array(scale)
    if scales.ndim != 1 or attribute_value(dequantize, "axis", 1) != 0:
        return None
    return scales
