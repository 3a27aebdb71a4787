"""Rules for what TensorRT builds and then runs in float, with more kernels, or with quantizers that nothing gains from.

`lint` tells their effects. This module must not change a model.
"""

from __future__ import annotations

from functools import partial

from onnx import TensorProto

from engines.core.nodes import attribute_value, label
from engines.core.quantizers import Product, Quantizer
from qdq.lint.rule import (
    EIGHT_BIT,
    FLOAT_OPERATORS,
    FP8,
    Found,
    Rule,
    bad_shape,
    computed,
    feeds_convolution,
    reader,
    rule,
    weighted,
)
from qdq.lint.view import View

RULES: list[Rule] = []
EFFECTS = ("float", "kernel", "rounding", "size", "version")
in_float, kernel, rounding, size, version = (partial(rule, RULES, effect) for effect in EFFECTS)


@in_float("builds and runs in float", "Quantize statically: scales as initializers.")
def _dynamic_scale(view: View) -> Found:
    """Any other scale that depends on an input."""
    for q in view.heads:
        if computed(view, q) and not feeds_convolution(view, q):
            yield q.node, f"The scale {q.node.input[1]!r} depends on an input."


@in_float(
    "builds and runs in float, with a kernel that dequantizes the weight",
    "Quantize the weight along its output channels.",
)
def _weight_axis(view: View) -> Found:
    """Scales of a weight along another axis than its output channels. Repaired."""
    for product, weight in weighted(view):
        q, axis = weight.dq, weight.output_axis
        if q is None or axis is None or product.data.dq is None:
            continue
        if q.vector and q.axis != axis and not bad_shape(q):
            yield q.node, f"Scales along axis {q.axis}; the output channels of {label(product.node)} are axis {axis}."


@in_float(
    "builds and runs in float: activations cannot be quantized per channel", "One scale for the tensor, the largest."
)
def _activation_axis(view: View) -> Found:
    """Scales of an activation along the channels that are summed. Repaired."""
    for q in view.heads:
        dq = reader(view, q)
        if dq is None or not q.vector or q.stored or bad_shape(q):
            continue
        for product, index in view.products_of(dq):
            if product.node.op_type in ("Conv", "ConvTranspose") or q.axis != product.operands[index].output_axis:
                yield q.node, f"{q.count} scales on the data of {label(product.node)}."
                break


@in_float(
    "reads a scale of shape [1] as one per channel, and runs the convolution in float",
    "Make the scale a scalar (shape []).",
)
def _one_element_scale(view: View) -> Found:
    """Scale of shape [1] on the data of a convolution: read as per channel. Repaired."""
    for q in view.heads:
        dq = reader(view, q)
        one = q.scale is not None and q.scale.shape == (1,) and not q.stored
        if dq is not None and one and any(p.node.op_type == "Conv" and i == 0 for p, i in view.products_of(dq)):
            yield q.node, "The scale has shape [1]."


@in_float(
    "builds and runs in float",
    "Quantize the weight too (ONNX Runtime: keep it out of nodes_to_exclude), or leave both in float.",
)
def _unpaired_activation(view: View) -> Found:
    """Data quantized, constant weight in float. Repaired."""
    for product in view.products:
        if unpaired(view, product) and product.node.op_type != "ConvTranspose":
            yield product.node, "Its data is quantized, its constant weight is float."


@kernel(
    "builds and runs in float, with one more kernel that dequantizes the weight at every inference",
    "Quantize the data too, or leave the weight in float.",
)
def _unpaired_weight(view: View) -> Found:
    """A convolution with a quantized weight and float data."""
    for product, weight in weighted(view):
        if product.node.op_type == "Conv" and weight.dq is not None and product.data.dq is None:
            yield product.node, "Its weight is quantized, its data is float."


@kernel(
    "never runs in low precision: a float deconvolution, with one more kernel that dequantizes the weight",
    "Leave ConvTranspose in float.",
)
def _transposed(view: View) -> Found:
    """A quantized ConvTranspose. Repaired."""
    for product in view.products:
        if product.node.op_type == "ConvTranspose" and transposed_quantizers(view, product):
            yield product.node, "A transposed convolution with quantized operands."


@kernel(
    "builds with one more kernel that dequantizes the weight, and a float product",
    "Weight-only: INT8 with a scale per output channel, or INT4 in blocks of 128 or 64.",
)
def _slow_weight(view: View) -> Found:
    """A weight-only product that no kernel fuses: INT8 in blocks, INT4 per channel. Repaired."""
    for product, weight in weighted(view):
        q = weight.dq
        if q is None or product.data.dq is not None or product.node.op_type not in ("MatMul", "Gemm"):
            continue
        if q.dtype == TensorProto.INT8 and q.blocked:
            yield q.node, f"An INT8 weight of {label(product.node)} in blocks."
        elif q.dtype == TensorProto.INT4 and not q.blocked:
            yield q.node, f"An INT4 weight of {label(product.node)} without blocks."


@kernel("builds integer products, and loses the fused attention kernel (_gemm_mha_v2)", "Leave attention in float.")
def _attention(view: View) -> Found:
    """Quantized products of two computed tensors in FP16: the fused attention is lost. Repaired."""
    for product in view.products:
        if attention_quantizers(view, product):
            yield product.node, "A product of two computed FP16 tensors around a Softmax, quantized to INT8."


@rounding("builds; the quantizer only rounds what the caller gets", "Remove the Q/DQ pair before the output.")
def _output(view: View) -> Found:
    """Q/DQ before an output. Repaired."""
    for q in view.quantizers:
        if not q.is_q and q.source is not None and view.model.is_output(q.node.output[0]) and not q.constant:
            yield q.source.node, f"Output {q.node.output[0]!r} is quantized and dequantized."


@rounding(
    "builds; the quantizer only rounds the input of a float kernel",
    "Quantize after the activation or normalization, not before it.",
)
def _before_float(view: View) -> Found:
    """Q/DQ before operators that run in float (activation, norm, softmax). Repaired."""
    for q in view.quantizers:
        if needless(view, q):
            uses = view.model.consumers(q.node.output[0])
            assert q.source is not None
            yield q.source.node, f"Only float operators read it: {', '.join(sorted({u.node.op_type for u in uses}))}."


@size("builds the same kernels from four times the bytes", "Store the INT8 codes and a DequantizeLinear only.")
def _float_weight(view: View) -> Found:
    """Float weight, Q and DQ: four times the bytes of its codes in the file. Repaired."""
    for q in view.heads:
        maker = view.model.producer(q.node.input[0])
        if maker is not None and maker.op_type == "DequantizeLinear":
            continue  # the second level of 4-bit weights: what is stored is half of the codes' bytes
        if q.is_q and q.stored and q.shape != () and q.dtype in (*EIGHT_BIT, *FP8):
            yield q.node, "A float constant is quantized at run time."


@version("TensorRT 10.1 reads axis 0, 10.15 and later 1", "Write the axis.")
def _default_axis(view: View) -> Found:
    """No axis on a vector of scales: TensorRT 10.1 takes axis 0, ONNX and later ones axis 1. Repaired."""
    for q in view.heads:
        unsaid = q.vector and attribute_value(q.node, "axis", None) is None and view.model.opset >= 13
        if unsaid and q.dtype != TensorProto.INT32 and not bad_shape(q):
            yield q.node, f"{q.count} scales and no axis, which means axis {q.axis}."


def unpaired(view: View, product: Product) -> bool:
    """Whether a product has quantized data and a float constant weight, and no neighbour has a quantized one."""
    weight, data = product.weight, product.data
    if weight is None or weight.dq is not None or data.dq is None or data.constant:
        return False
    shape = view.shape(weight.tensor)
    beside = [p.weight for p, _ in view.products_of(data.dq) if p is not product]
    return not any(w is not None and w.dq is not None for w in beside) and shape is not None and len(shape) >= 2


def transposed_quantizers(view: View, product: Product) -> list[Quantizer]:
    """The DQs of a ConvTranspose that were made for it: of its weight, and of data that no other product reads.

    [] for a compiler that is not known to run it in float.
    """
    if view.profile.conv_transpose.holds is not False:
        return []
    found = [o.dq for o in product.operands if o.dq is not None]
    return [q for q in found if q.constant or all(p.node.op_type == "ConvTranspose" for p, _ in view.products_of(q))]


def attention_quantizers(view: View, product: Product) -> list[Quantizer]:
    """The DQs of an FP16 product of two computed tensors next to a Softmax; [] for any other product.

    [] for a compiler that is not known to lose its fused attention.
    """
    if view.profile.attention.holds is not False:
        return []
    if product.node.op_type != "MatMul" or any(o.constant or o.elem != TensorProto.FLOAT16 for o in product.operands):
        return []
    found = [o.dq for o in product.operands if o.dq is not None and o.dq.dtype in EIGHT_BIT]
    return found if len(found) == 2 and _near_softmax(view, product) else []


def needless(view: View, q: Quantizer) -> bool:
    """Whether only float operators read what a Q/DQ pair on an activation gives."""
    uses = view.model.consumers(q.node.output[0])
    if q.is_q or q.source is None or q.constant or not uses or view.model.is_output(q.node.output[0]):
        return False
    return all(u.node.op_type in FLOAT_OPERATORS and u.index == 0 for u in uses)


_BETWEEN = ("Mul", "Div", "Add", "Where", "QuantizeLinear", "DequantizeLinear")


def _near_softmax(view: View, product: Product) -> bool:
    """Whether a Softmax lies before an operand, or behind the result, with at most a few elementwise nodes between."""
    name = product.operands[0].tensor
    for _ in range(4):
        if (before := view.model.producer(name)) is None:
            break
        if before.op_type == "Softmax":
            return True
        name = before.input[0] if before.input else ""
    names = [product.node.output[0]]
    for _ in range(4):
        uses = [u.node for n in names for u in view.model.consumers(n)]
        if any(n.op_type == "Softmax" for n in uses):
            return True
        names = [o for n in uses if n.op_type in _BETWEEN for o in n.output]
    return False
