"""Rules for what TensorRT refuses, crashes on, or computes differently from the ONNX standard.

`lint` tells their effects. This module must not change a model.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from onnx import NodeProto, TensorProto

from engines.core.nodes import attribute, label
from engines.core.quantizers import Product, Quantizer
from qdq.lint.rule import (
    ACCEPTED,
    CALLED,
    EIGHT_BIT,
    ERRORS,
    FP8,
    REFUSED_OPERATORS,
    Found,
    Rule,
    bad_rank,
    computed,
    feeds_convolution,
    least_divisor,
    made_dynamically,
    rule,
    some,
    type_name,
    weighted,
    zero_name,
)
from qdq.lint.view import FLOAT_TYPES, View
from qdq.model.model import dtype_name

RULES: list[Rule] = []
refused, crash, wrong = (partial(rule, RULES, effect) for effect in ERRORS)


@refused(
    "Plugin not found, are the plugin name, version, and namespace correct? / false (node / input tensor A must "
    "be FP16",
    "Export with QuantizeLinear and DequantizeLinear around float operators (ONNX Runtime: "
    "quant_format=QuantFormat.QDQ; for dynamic quantization: quantize_static).",
)
def _operator(view: View) -> Found:
    """An operator on integers in place of Q/DQ nodes. Repaired: QLinearConv, QLinearMatMul."""
    for node in view.nodes:
        if REFUSED_OPERATORS.match(node.op_type):
            yield node, f"{node.op_type} works on integers; TensorRT has no such operator."


@refused(
    "input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8",
    "Keep the bias in float (ONNX Runtime: extra_options QuantizeBias=False).",
)
def _int32_bias(view: View) -> Found:
    """DequantizeLinear of INT32 codes, ONNX Runtime's bias. Repaired."""
    for q in view.heads:
        if q.dtype == TensorProto.INT32 and not q.is_q:
            yield q.node, "INT32 codes are dequantized; only 8-bit and 4-bit codes can be."


@refused(
    "Non-zero zero point is not supported. Please set kENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA (stored "
    "UINT8: Found unsupported input type of UINT8)",
    "Quantize symmetrically: INT8, zero point 0 (ONNX Runtime: ActivationSymmetric=True, WeightSymmetric=True).",
)
def _asymmetric(view: View) -> Found:
    """A zero point that is not 0. Repaired."""
    for q in view.heads:
        if q.zero is not None and q.dtype not in (*FP8, TensorProto.INT32) and np.any(q.zero.astype(np.float64)):
            yield q.node, f"The {type_name(q)} zero point is {some(q.zero)}; TensorRT reads zero point 0 only."


@wrong(
    "builds with a warning and reads the codes as INT8, so 128..255 are lost",
    "Use INT8 codes with zero point 0 and a scale of largest value / 127.",
)
def _unsigned(view: View) -> Found:
    """An activation quantized to UINT8 with zero point 0. Repaired."""
    for q in view.heads:
        if _unsigned_zero(q) and not q.stored and (not q.is_q or q.zero is not None):
            yield q.node, "Quantized to UINT8 with zero point 0."


@refused("Found unsupported input type of UINT8", "Store INT8 codes with zero point 0.")
def _unsigned_codes(view: View) -> Found:
    """Stored UINT8 codes with zero point 0. Repaired."""
    for q in view.heads:
        if _unsigned_zero(q) and q.stored and not q.is_q:
            yield q.node, "The stored codes are UINT8, with zero point 0."


@wrong("builds without a word and takes INT8", "Give an INT8 zero point of 0.")
def _no_zero_point(view: View) -> Found:
    """Neither zero point nor output_dtype: UINT8 to ONNX, INT8 to TensorRT. Repaired."""
    for q in view.heads:
        if q.is_q and not zero_name(q.node) and not attribute(q.node, "output_dtype", 0):
            yield q.node, "Neither zero point nor output_dtype: ONNX means UINT8, TensorRT takes INT8."


@refused(
    "Failed to import initializer / CHECK(dtype == W.type()) failed",
    "Use INT8 (activations and weights), or INT4 in blocks for weights of MatMul only.",
)
def _code_type(view: View) -> Found:
    """Codes of 16, 4 (activations) or 2 bits, FP8 E5M2. Repaired: integers."""
    for q in view.heads:
        if q.dtype == TensorProto.INT4 and q.is_q and not q.stored:
            yield q.node, "An activation is quantized to INT4."
        elif q.dtype and q.dtype not in (*ACCEPTED, TensorProto.INT32):
            yield q.node, f"The codes are {type_name(q)}."
        elif (kind := CALLED.get(q.dtype)) and kind not in view.profile.types:
            yield q.node, f"The codes are {type_name(q)}, which {view.profile.title} does not read."


@refused(
    "Mismatch between attribute output_dtype and zero-point data type / TensorRT only allows FP8, INT8, INT4, "
    "and FP4 quantization",
    "Drop output_dtype and give an INT8 zero point.",
)
def _output_dtype(view: View) -> Found:
    """Output_dtype that is not the zero point's type, or UINT8. Repaired."""
    for q in view.heads:
        said = attribute(q.node, "output_dtype", 0) if q.is_q else 0
        if said and (said != q.dtype or (said == TensorProto.UINT8 and not zero_name(q.node))):
            zero = type_name(q) if zero_name(q.node) else "absent"
            yield q.node, f"output_dtype is {dtype_name(said).upper()}, the zero point is {zero}."


@refused("has `zero_point` which is not an initializer", "Quantize statically: scale and zero point as initializers.")
def _computed_zero_point(view: View) -> Found:
    """A zero point that depends on an input."""
    for q in view.heads:
        if q.computed_zero and not made_dynamically(view, q.node.input[2]):
            yield q.node, f"The zero point {q.node.input[2]!r} depends on an input."


@crash(
    "tensorrt_rtx 1.7.1 ends the process (SIGSEGV); for the scale of a weight, CHECK(is_constant()) failed",
    "Quantize statically: scales as initializers.",
)
def _computed_scale(view: View) -> Found:
    """A scale of a convolution that depends on an input."""
    for q in view.heads:
        if computed(view, q) and feeds_convolution(view, q):
            yield q.node, f"The scale {q.node.input[1]!r} depends on an input."


@refused(
    "Scale coefficients must all be positive",
    "Any positive scale represents a dead channel (its codes are 0); for others calibrate again.",
)
def _scale_value(view: View) -> Found:
    """A scale of zero, below zero or NaN. Repaired: yes (not NaN)."""
    for q in view.heads:
        if q.scale is not None and not np.all(q.scale > 0) and q.dtype != TensorProto.INT32:
            bad = q.scale[~(q.scale > 0)]
            yield q.node, f"{bad.size} of {q.scale.size} scales are not positive: {some(bad)}."


@wrong(
    "multiplies by the reciprocal, held in the scale's type: it overflows and 0 becomes NaN",
    "Raise the scale to the smallest normal number of its type; an infinite one must be calibrated again.",
)
def _scale_range(view: View) -> Found:
    """A scale of data whose reciprocal overflows, or an infinite one. Repaired: yes (not infinite)."""
    # Codes of a weight are folded, exactly, and multiplied by a subnormal scale too (measured with tensorrt_rtx
    # 1.7.1.116, scales down to 1e-6 in FP16 and 1e-39 in FP32).
    for q in view.heads:
        if q.scale is not None and q.dtype != TensorProto.INT32:
            values = q.scale.astype(np.float64)
            odd = np.isposinf(values)
            if q.is_q and not q.constant:
                odd |= (values > 0) & (values < least_divisor(q.scale))
            if np.any(odd):
                yield q.node, f"A scale is {some(q.scale[odd])}: its reciprocal is no number of {q.scale.dtype}."


@refused(
    "IConvolutionLayer `input` and `kernel` must be of same type / IMatrixMultiplyLayer must have same input types",
    "Store the scale in the float type of the other operand.",
)
def _scale_type(view: View) -> Found:
    """A dequantized operand of another float type than its twin. Repaired."""
    for product in view.products:
        types = [o.elem for o in product.operands]
        if set(types) <= {TensorProto.DOUBLE, TensorProto.FLOAT} or not all(t in FLOAT_TYPES for t in types):
            continue
        if types[0] != types[1]:
            for odd in mistyped(view, product):
                given, name = dtype_name(view.output_type(odd)), label(product.node)
                yield odd.node, f"It dequantizes to {given}, the other operand of {name} is another float type."


@refused(
    "The number of scales is not equal to the number of output channels / The quantization axis must index a "
    "dimension of the input / Invalid rank for the scale tensor",
    "Give one scale, or one per channel of the axis.",
)
def _scale_shape(view: View) -> Found:
    """Axis outside the tensor, or a number of scales other than its size. Repaired: where the weight tells."""
    for q in view.heads:
        if q.scale is None or q.shape is None or q.dtype == TensorProto.INT32:
            continue
        if q.blocked and bad_rank(q):
            yield q.node, f"The scale has rank {q.scale.ndim}, the tensor rank {len(q.shape)}."
        elif (q.vector or q.blocked) and not 0 <= q.axis < len(q.shape):
            yield q.node, f"Axis {q.axis} does not exist in a tensor of rank {len(q.shape)}."
        elif q.vector and q.shape[q.axis] not in (None, q.scale.size):
            yield q.node, f"{q.scale.size} scales on axis {q.axis}, which has {q.shape[q.axis]} elements."


@refused("The scale and zero point must have the same volume", "Give the zero point the shape of the scale.")
def _zero_point_shape(view: View) -> Found:
    """A zero point of another size than the scale. Repaired."""
    for q in view.heads:
        if q.zero is not None and q.scale is not None and q.zero.size != q.scale.size and q.dtype != TensorProto.INT32:
            yield q.node, f"{q.zero.size} zero points for {q.scale.size} scales."


@refused(
    "The quantization axis must divide into whole blocks / only the quantization axis may be blocked / The "
    "blocking dimension must be the last or second to last dimension",
    "Use whole blocks along one of the last two axes.",
)
def _block_shape(view: View) -> Found:
    """Blocks that do not divide the axis, or are not on the last two axes. Repaired: weights."""
    for q in view.heads:
        if not q.blocked or q.scale is None or q.shape is None or bad_rank(q) or not 0 <= q.axis < len(q.shape):
            continue
        size, blocks = q.shape[q.axis], q.scale.shape[q.axis]
        others = [d for i, d in enumerate(q.shape) if i != q.axis]
        given = [d for i, d in enumerate(q.scale.shape) if i != q.axis]
        if any(a not in (None, b) for a, b in zip(others, given, strict=True)):
            yield q.node, f"The scale {list(q.scale.shape)} is blocked on more than axis {q.axis} of {list(q.shape)}."
        elif size and (not blocks or size % blocks):
            yield q.node, f"Axis {q.axis} of {size} elements has {blocks} blocks."
        elif q.axis < len(q.shape) - 2:
            yield q.node, f"The blocks lie along axis {q.axis} of {len(q.shape)}."


@refused("4-bit quantization requies an even number of elements", "Pad the tensor, or store it as INT8.")
def _odd_codes(view: View) -> Found:
    """4-bit codes, an odd number of them. Repaired: weights."""
    for q in view.heads:
        sized = q.dtype in (TensorProto.INT4, TensorProto.FLOAT4E2M1) and q.shape and all(q.shape)
        if sized and (count := math.prod(d or 1 for d in q.shape or ())) % 2:
            yield q.node, f"{count} codes of 4 bits."


@refused(
    "is only allowed before DQ or PLUGIN_V2 or kPLUGIN_V3 node",
    "Put the DequantizeLinear in front of the Gather: the compiler dequantizes the rows that it picks.",
)
def _gathered_codes(view: View) -> Found:
    """Stored codes that a Gather picks rows of before they are dequantized. Repaired."""
    for q in view.heads:
        if (gather := gather_of_codes(view, q)) is not None:
            yield q.node, f"{label(gather)} picks rows of the stored codes {gather.input[0]!r}."


@refused("is only allowed before DQ or PLUGIN_V2 or kPLUGIN_V3 node", "Keep a constant of one element in float.")
def _scalar_codes(view: View) -> Found:
    """Stored codes of rank 0. Repaired."""
    for q in view.heads:
        if not q.is_q and q.stored and q.shape == () and q.dtype in EIGHT_BIT:
            yield q.node, "The stored codes are a scalar (rank 0)."


@refused(
    "CHECK(opndA->type() == opndB->type()) failed. Input and filter have to be the same type",
    "Quantize both operands to one type.",
)
def _mixed_types(view: View) -> Found:
    """FP8 and INT8 operands of one product."""
    for product in view.products:
        a, b = (o.dtype for o in product.operands)
        if a in ACCEPTED and b in ACCEPTED and (a in FP8) != (b in FP8):
            yield product.node, f"One operand is {dtype_name(a).upper()}, the other {dtype_name(b).upper()}."


@wrong(
    "builds and multiplies integers, then scales the sum over all blocks once: block scales are lost",
    "One scale per output channel, or leave the activation in float.",
)
def _block_product(view: View) -> Found:
    """Block scales on a product of two quantized operands. Repaired."""
    for product, weight in weighted(view):
        q = weight.dq
        if q is None or product.data.dq is None:
            continue
        if q.blocked and not bad_rank(q) and q.dtype != TensorProto.FLOAT4E2M1:
            yield q.node, f"A weight of {label(product.node)} in blocks, whose other operand is quantized too."


def gather_of_codes(view: View, q: Quantizer) -> NodeProto | None:
    """The Gather of stored codes that a DQ reads."""
    maker = None if q.is_q or q.stored else view.producer(q.node.input[0])
    gathers = maker is not None and maker.op_type == "Gather" and view.is_constant(maker.input[0])
    return maker if gathers else None


def mistyped(view: View, product: Product) -> list[Quantizer]:
    """The DQs of a product whose float type is not that of the tensor they stand for."""
    a, b = product.operands
    found = []
    for mine, other in ((a, b), (b, a)):
        if mine.dq is None:
            continue
        stands_for = view.elem(mine.dq.source.node.input[0]) if mine.dq.source else 0
        if other.dq is not None and not stands_for:
            stands_for = view.elem(other.dq.source.node.input[0]) if other.dq.source else 0
        if view.output_type(mine.dq) != (stands_for or other.elem):
            found.append(mine.dq)
    return found


def _unsigned_zero(q: Quantizer) -> bool:
    zero = q.zero is not None and bool(np.any(q.zero))
    return q.dtype == TensorProto.UINT8 and not zero and not q.computed_zero
