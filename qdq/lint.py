"""What TensorRT refuses in a Q/DQ model, gets wrong, or builds and then runs in float: one rule each.

Model -> View of its quantizers -> every rule yields findings with the node and a remedy -> `lint`, in graph order.
Every row was tried in tensorrt_rtx 1.7.1 (SM89), and the tests try it again. This module must not change a model.

| rule | effect | repaired | what is found |
|---|---|---|---|
| operator | refused | QLinearConv, QLinearMatMul | an operator on integers in place of Q/DQ nodes |
| int32-bias | refused | yes | DequantizeLinear of INT32 codes, ONNX Runtime's bias |
| asymmetric | refused | yes | a zero point that is not 0 |
| unsigned | wrong | yes | an activation quantized to UINT8 with zero point 0 |
| unsigned-codes | refused | yes | stored UINT8 codes with zero point 0 |
| no-zero-point | wrong | yes | neither zero point nor output_dtype: UINT8 to ONNX, INT8 to TensorRT |
| code-type | refused | integers | codes of 16, 4 (activations) or 2 bits, FP8 E5M2 |
| output-dtype | refused | yes | output_dtype that is not the zero point's type, or UINT8 |
| computed-zero-point | refused | no | a zero point that depends on an input |
| computed-scale | crash | no | a scale of a convolution that depends on an input |
| dynamic-scale | float | no | any other scale that depends on an input |
| scale-value | refused | yes (not NaN) | a scale of zero, below zero or NaN |
| scale-range | wrong | yes (not infinite) | a subnormal scale, whose reciprocal overflows, or an infinite one |
| scale-type | refused | yes | a dequantized operand of another float type than its twin |
| scale-shape | refused | where the weight tells | axis outside the tensor, or a number of scales other than its size |
| zero-point-shape | refused | yes | a zero point of another size than the scale |
| block-shape | refused | weights | blocks that do not divide the axis, or are not on the last two axes |
| odd-codes | refused | weights | 4-bit codes, an odd number of them |
| scalar-codes | refused | yes | stored codes of rank 0 |
| mixed-types | refused | no | FP8 and INT8 operands of one product |
| block-product | wrong | yes | block scales on a product of two quantized operands |
| weight-axis | float | yes | scales of a weight along another axis than its output channels |
| activation-axis | float | yes | scales of an activation along the channels that are summed |
| one-element-scale | float | yes | scale of shape [1] on the data of a convolution: read as per channel |
| unpaired-activation | float | yes | data quantized, constant weight in float |
| unpaired-weight | kernel | no | a convolution with a quantized weight and float data |
| transposed | kernel | yes | a quantized ConvTranspose |
| slow-weight | kernel | yes | a weight-only product that no kernel fuses: INT8 in blocks, INT4 per channel |
| attention | kernel | yes | quantized products of two computed tensors in FP16: the fused attention is lost |
| output | rounding | yes | Q/DQ before an output |
| before-float | rounding | yes | Q/DQ before operators that run in float (activation, norm, softmax) |
| float-weight | size | yes | float weight, Q and DQ: four times the bytes of its codes in the file |
| default-axis | version | yes | no axis on a vector of scales: TensorRT 10.1 takes axis 0, ONNX and later ones axis 1 |

Effects: refused, crash (of the compiler's process) and wrong (results differ) are errors. float, kernel (one more),
rounding (a quantizer that no integer kernel reads), size and version are warnings.
Source of the texts: the parser's and the builder's own messages, tensorrt_rtx 1.7.1.116; for default-axis,
onnx-tensorrt's parser of 10.1 and 10.15.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from qdq.graph import Model, dtype_name
from qdq.quantizers import FLOAT_TYPES, Operand, Product, Quantizer, View, attribute, label

ERRORS = ("refused", "crash", "wrong")
EIGHT_BIT = (TensorProto.INT8, TensorProto.UINT8)
FP8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)
ACCEPTED = (*EIGHT_BIT, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)
_REFUSED_OPERATORS = re.compile(
    r"^(QLinear\w+|QGemm|QAttention|QOrdered\w+|QEmbed\w+|QMoE|DynamicQuantize\w+|ConvInteger|MatMulInteger(ToFloat)?|MatMulNBits)$"
)
FLOAT_OPERATORS = frozenset(
    "Relu LeakyRelu PRelu Sigmoid HardSigmoid HardSwish Swish Mish Tanh Erf Gelu Elu Selu Celu Softplus Softsign Clip Exp "
    "Log Sqrt Reciprocal Pow Neg Abs Softmax LogSoftmax BatchNormalization InstanceNormalization LayerNormalization "
    "GroupNormalization RMSNormalization LpNormalization MeanVarianceNormalization LRN".split()
)

Found = Iterator[tuple[NodeProto, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong at one node.

    Attributes:
        rule: its name, a row of the table above.
        severity: "error" (refused, crash, wrong) or "warning".
        effect: what TensorRT makes of it.
        node: name of the ONNX node.
        message: what is found there.
        tensorrt: TensorRT's own words, or what it was seen to do.
        remedy: what to do.
    """

    rule: str
    severity: str
    effect: str
    node: str
    message: str
    tensorrt: str
    remedy: str

    def to_mapping(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One check: `find` yields nodes and what is found there."""

    name: str
    effect: str
    tensorrt: str
    remedy: str
    find: Callable[[View], Found]

    @property
    def severity(self) -> str:
        """By the effect."""
        return "error" if self.effect in ERRORS else "warning"


_RULES: list[Rule] = []


def _rule(
    name: str, effect: str, tensorrt: str, remedy: str
) -> Callable[[Callable[[View], Found]], Callable[[View], Found]]:
    """Register a check."""

    def register(find: Callable[[View], Found]) -> Callable[[View], Found]:
        _RULES.append(Rule(name=name, effect=effect, tensorrt=tensorrt, remedy=remedy, find=find))
        return find

    return register


def lint(model: Model) -> list[Finding]:
    """Everything that the rules find in a model.

    Args:
        model: any ONNX model; one without quantizers has no findings.

    Returns:
        The findings in the order of the nodes, of one node in the order of the rules.
    """
    view = View(model)
    order = {id(node): i for i, node in enumerate(view.nodes)}
    found = [(order[id(node)], i, rule, node, text) for i, rule in enumerate(RULES) for node, text in rule.find(view)]
    return [
        Finding(
            rule=rule.name,
            severity=rule.severity,
            effect=rule.effect,
            node=label(node),
            message=text,
            tensorrt=rule.tensorrt,
            remedy=rule.remedy,
        )
        for _, _, rule, node, text in sorted(found, key=lambda row: row[:2])
    ]


def to_json(findings: list[Finding], **more: object) -> str:
    """JSON text of findings, with other facts of the command."""
    counts: Mapping[str, int] = {s: sum(f.severity == s for f in findings) for s in ("error", "warning")}
    return json.dumps({"format": "qdq.lint/1", **counts, "findings": [f.to_mapping() for f in findings], **more}, indent=1) + "\n"


def _type(q: Quantizer) -> str:
    return dtype_name(q.dtype).upper() if q.dtype else "unknown"


@_rule("operator", "refused", "Plugin not found, are the plugin name, version, and namespace correct? / false (node / input tensor A must be FP16", "Export with QuantizeLinear and DequantizeLinear around float operators (ONNX Runtime: quant_format=QuantFormat.QDQ; for dynamic quantization: quantize_static).")
def _operator(view: View) -> Found:
    for node in view.nodes:
        if _REFUSED_OPERATORS.match(node.op_type):
            yield node, f"{node.op_type} works on integers; TensorRT has no such operator."


@_rule("int32-bias", "refused", "input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8", "Keep the bias in float (ONNX Runtime: extra_options QuantizeBias=False).")
def _int32_bias(view: View) -> Found:
    for q in view.heads:
        if q.dtype == TensorProto.INT32 and not q.is_q:
            yield q.node, "INT32 codes are dequantized; only 8-bit and 4-bit codes can be."


@_rule("asymmetric", "refused", "Non-zero zero point is not supported. Please set kENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA (stored UINT8: Found unsupported input type of UINT8)", "Quantize symmetrically: INT8, zero point 0 (ONNX Runtime: ActivationSymmetric=True, WeightSymmetric=True).")
def _asymmetric(view: View) -> Found:
    for q in view.heads:
        if q.zero is not None and q.dtype not in (*FP8, TensorProto.INT32) and np.any(q.zero.astype(np.float64)):
            yield q.node, f"The {_type(q)} zero point is {_some(q.zero)}; TensorRT reads zero point 0 only."


@_rule("unsigned", "wrong", "builds with a warning and reads the codes as INT8, so 128..255 are lost", "Use INT8 codes with zero point 0 and a scale of largest value / 127.")
def _unsigned(view: View) -> Found:
    for q in view.heads:
        if _unsigned_zero(q) and not q.stored and (not q.is_q or q.zero is not None):
            yield q.node, "Quantized to UINT8 with zero point 0."


@_rule("unsigned-codes", "refused", "Found unsupported input type of UINT8", "Store INT8 codes with zero point 0.")
def _unsigned_codes(view: View) -> Found:
    for q in view.heads:
        if _unsigned_zero(q) and q.stored and not q.is_q:
            yield q.node, "The stored codes are UINT8, with zero point 0."


@_rule("no-zero-point", "wrong", "builds without a word and takes INT8", "Give an INT8 zero point of 0.")
def _no_zero_point(view: View) -> Found:
    for q in view.heads:
        if q.is_q and not _third(q.node) and not attribute(q.node, "output_dtype"):
            yield q.node, "Neither zero point nor output_dtype: ONNX means UINT8, TensorRT takes INT8."


@_rule("code-type", "refused", "Failed to import initializer / CHECK(dtype == W.type()) failed", "Use INT8 (activations and weights), or INT4 in blocks for weights of MatMul only.")
def _code_type(view: View) -> Found:
    for q in view.heads:
        if q.dtype == TensorProto.INT4 and q.is_q and not q.stored:
            yield q.node, "An activation is quantized to INT4."
        elif q.dtype and q.dtype not in (*ACCEPTED, TensorProto.INT32):
            yield q.node, f"The codes are {_type(q)}."


@_rule("output-dtype", "refused", "Mismatch between attribute output_dtype and zero-point data type / TensorRT only allows FP8, INT8, INT4, and FP4 quantization", "Drop output_dtype and give an INT8 zero point.")
def _output_dtype(view: View) -> Found:
    for q in view.heads:
        said = attribute(q.node, "output_dtype") if q.is_q else None
        if said and (said != q.dtype or (said == TensorProto.UINT8 and not _third(q.node))):
            yield q.node, f"output_dtype is {dtype_name(said).upper()}, the zero point is {_type(q) if _third(q.node) else 'absent'}."


@_rule("computed-zero-point", "refused", "has `zero_point` which is not an initializer", "Quantize statically: scale and zero point as initializers.")
def _computed_zero_point(view: View) -> Found:
    for q in view.heads:
        if q.computed_zero and not _dynamic(view, q.node.input[2]):
            yield q.node, f"The zero point {q.node.input[2]!r} depends on an input."


@_rule("computed-scale", "crash", "tensorrt_rtx 1.7.1 ends the process (SIGSEGV); for the scale of a weight, CHECK(is_constant()) failed", "Quantize statically: scales as initializers.")
def _computed_scale(view: View) -> Found:
    for q in view.heads:
        if _computed(view, q) and _feeds_convolution(view, q):
            yield q.node, f"The scale {q.node.input[1]!r} depends on an input."


@_rule("dynamic-scale", "float", "builds and runs in float", "Quantize statically: scales as initializers.")
def _dynamic_scale(view: View) -> Found:
    for q in view.heads:
        if _computed(view, q) and not _feeds_convolution(view, q):
            yield q.node, f"The scale {q.node.input[1]!r} depends on an input."


@_rule("scale-value", "refused", "Scale coefficients must all be positive", "Any positive scale represents a dead channel (its codes are 0); for others calibrate again.")
def _scale_value(view: View) -> Found:
    for q in view.heads:
        if q.scale is not None and not np.all(q.scale > 0) and q.dtype != TensorProto.INT32:
            yield q.node, f"A scale is {_some(q.scale[~(q.scale > 0)])}, at {int(np.sum(~(q.scale > 0)))} of {q.scale.size} places."


@_rule("scale-range", "wrong", "multiplies by the reciprocal, held in the scale's type: it overflows and 0 becomes NaN", "Raise the scale to the smallest normal number of its type; an infinite one must be calibrated again.")
def _scale_range(view: View) -> Found:
    for q in view.heads:
        if q.scale is not None and q.dtype != TensorProto.INT32:
            small = (q.scale > 0) & (q.scale.astype(np.float64) < smallest(q.scale))
            if np.any(small) or np.any(np.isposinf(q.scale.astype(np.float64))):
                yield q.node, f"A scale is {_some(q.scale[small | np.isinf(q.scale)])}, outside the normal numbers of {q.scale.dtype}."


@_rule("scale-type", "refused", "IConvolutionLayer `input` and `kernel` must be of same type / IMatrixMultiplyLayer must have same input types", "Store the scale in the float type of the other operand.")
def _scale_type(view: View) -> Found:
    for product in view.products:
        types = [o.elem for o in product.operands]
        if set(types) <= {TensorProto.DOUBLE, TensorProto.FLOAT} or not all(t in FLOAT_TYPES for t in types):
            continue
        if types[0] != types[1]:
            for odd in mistyped(view, product):
                yield odd.node, f"It dequantizes to {dtype_name(view.output_type(odd))}, the other operand of {label(product.node)} is another float type."


@_rule("scale-shape", "refused", "The number of scales is not equal to the number of output channels / The quantization axis must index a dimension of the input / Invalid rank for the scale tensor", "Give one scale, or one per channel of the axis.")
def _scale_shape(view: View) -> Found:
    for q in view.heads:
        if q.scale is None or q.shape is None or q.dtype == TensorProto.INT32:
            continue
        if q.blocked and q.scale.ndim != len(q.shape):
            yield q.node, f"The scale has rank {q.scale.ndim}, the tensor rank {len(q.shape)}."
        elif (q.vector or q.blocked) and not 0 <= q.axis < len(q.shape):
            yield q.node, f"Axis {q.axis} does not exist in a tensor of rank {len(q.shape)}."
        elif q.vector and q.shape[q.axis] not in (None, q.scale.size):
            yield q.node, f"{q.scale.size} scales on axis {q.axis}, which has {q.shape[q.axis]} elements."


@_rule("zero-point-shape", "refused", "The scale and zero point must have the same volume", "Give the zero point the shape of the scale.")
def _zero_point_shape(view: View) -> Found:
    for q in view.heads:
        if q.zero is not None and q.scale is not None and q.zero.size != q.scale.size and q.dtype != TensorProto.INT32:
            yield q.node, f"{q.zero.size} zero points for {q.scale.size} scales."


@_rule("block-shape", "refused", "The quantization axis must divide into whole blocks / only the quantization axis may be blocked / The blocking dimension must be the last or second to last dimension", "Use whole blocks along one of the last two axes.")
def _block_shape(view: View) -> Found:
    for q in view.heads:
        if not q.blocked or q.scale is None or q.shape is None or q.scale.ndim != len(q.shape) or not 0 <= q.axis < len(q.shape):
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


@_rule("odd-codes", "refused", "4-bit quantization requies an even number of elements", "Pad the tensor, or store it as INT8.")
def _odd_codes(view: View) -> Found:
    for q in view.heads:
        if q.dtype in (TensorProto.INT4, TensorProto.FLOAT4E2M1) and q.shape and all(q.shape):
            count = math.prod(d or 1 for d in q.shape)
            if count % 2:
                yield q.node, f"{count} codes of 4 bits."


@_rule("scalar-codes", "refused", "is only allowed before DQ or PLUGIN_V2 or kPLUGIN_V3 node", "Keep a constant of one element in float.")
def _scalar_codes(view: View) -> Found:
    for q in view.heads:
        if not q.is_q and q.stored and q.shape == () and q.dtype in EIGHT_BIT:
            yield q.node, "The stored codes are a scalar (rank 0)."


@_rule("mixed-types", "refused", "CHECK(opndA->type() == opndB->type()) failed. Input and filter have to be the same type", "Quantize both operands to one type.")
def _mixed_types(view: View) -> Found:
    for product in view.products:
        a, b = (o.dtype for o in product.operands)
        if a in ACCEPTED and b in ACCEPTED and (a in FP8) != (b in FP8):
            yield product.node, f"One operand is {dtype_name(a).upper()}, the other {dtype_name(b).upper()}."


@_rule("block-product", "wrong", "builds and multiplies integers, then scales the sum over all blocks once: block scales are lost", "One scale per output channel, or leave the activation in float.")
def _block_product(view: View) -> Found:
    for product, weight in _weighted(view):
        if weight.dq is not None and weight.dq.blocked and not _bad_rank(weight.dq) and product.data.dq is not None and weight.dq.dtype != TensorProto.FLOAT4E2M1:
            yield weight.dq.node, f"A weight of {label(product.node)} in blocks, whose other operand is quantized too."


@_rule("weight-axis", "float", "builds and runs in float, with a kernel that dequantizes the weight", "Quantize the weight along its output channels.")
def _weight_axis(view: View) -> Found:
    for product, weight in _weighted(view):
        q = weight.dq
        if q is not None and q.vector and weight.output_axis is not None and q.axis != weight.output_axis and not _bad_shape(q) and product.data.dq is not None:
            yield q.node, f"Scales along axis {q.axis}{'' if attribute(q.node, 'axis') is not None else ' (the default)'}; the output channels of {label(product.node)} are axis {weight.output_axis}."


@_rule("activation-axis", "float", "builds and runs in float: activations cannot be quantized per channel", "One scale for the tensor, the largest.")
def _activation_axis(view: View) -> Found:
    for q in view.heads:
        dq = _reader(view, q)
        if dq is None or not q.vector or q.stored or _bad_shape(q):
            continue
        for product, index in view.products_of(dq):
            if product.node.op_type in ("Conv", "ConvTranspose") or q.axis != product.operands[index].output_axis:
                yield q.node, f"{np.size(q.scale)} scales on the data of {label(product.node)}."
                break


@_rule("one-element-scale", "float", "reads a scale of shape [1] as one per channel, and runs the convolution in float", "Make the scale a scalar (shape []).")
def _one_element_scale(view: View) -> Found:
    for q in view.heads:
        dq = _reader(view, q)
        one = q.scale is not None and q.scale.shape == (1,) and not q.stored
        if dq is not None and one and any(p.node.op_type == "Conv" and i == 0 for p, i in view.products_of(dq)):
            yield q.node, "The scale has shape [1]."


@_rule("unpaired-activation", "float", "builds and runs in float", "Quantize the weight too (ONNX Runtime: keep it out of nodes_to_exclude), or leave both in float.")
def _unpaired_activation(view: View) -> Found:
    for product in view.products:
        if unpaired(view, product) and product.node.op_type != "ConvTranspose":
            yield product.node, "Its data is quantized, its constant weight is float."


@_rule("unpaired-weight", "kernel", "builds and runs in float, with one more kernel that dequantizes the weight at every inference", "Quantize the data too, or leave the weight in float.")
def _unpaired_weight(view: View) -> Found:
    for product, weight in _weighted(view):
        if product.node.op_type == "Conv" and weight.dq is not None and product.data.dq is None:
            yield product.node, "Its weight is quantized, its data is float."


@_rule("transposed", "kernel", "never runs in low precision: a float deconvolution, with one more kernel that dequantizes the weight", "Leave ConvTranspose in float.")
def _transposed(view: View) -> Found:
    for product in view.products:
        if product.node.op_type == "ConvTranspose" and transposed_quantizers(view, product):
            yield product.node, "A transposed convolution with quantized operands."


@_rule("slow-weight", "kernel", "builds with one more kernel that dequantizes the weight, and a float product", "Weight-only: INT8 with a scale per output channel, or INT4 in blocks of 128 or 64.")
def _slow_weight(view: View) -> Found:
    for product, weight in _weighted(view):
        q = weight.dq
        if q is None or product.data.dq is not None or product.node.op_type not in ("MatMul", "Gemm"):
            continue
        if q.dtype == TensorProto.INT8 and q.blocked:
            yield q.node, f"An INT8 weight of {label(product.node)} in blocks."
        elif q.dtype == TensorProto.INT4 and not q.blocked:
            yield q.node, f"An INT4 weight of {label(product.node)} without blocks."


@_rule("attention", "kernel", "builds integer products, and loses the fused attention kernel (_gemm_mha_v2)", "Leave attention in float.")
def _attention(view: View) -> Found:
    for product in view.products:
        if attention_quantizers(view, product):
            yield product.node, "A product of two computed FP16 tensors around a Softmax, quantized to INT8."


@_rule("output", "rounding", "builds; the quantizer only rounds what the caller gets", "Remove the Q/DQ pair before the output.")
def _output(view: View) -> Found:
    for q in view.quantizers:
        if not q.is_q and q.source is not None and view.model.is_output(q.node.output[0]) and not q.constant:
            yield q.source.node, f"Output {q.node.output[0]!r} is quantized and dequantized."


@_rule("before-float", "rounding", "builds; the quantizer only rounds the input of a float kernel", "Quantize after the activation or normalization, not before it.")
def _before_float(view: View) -> Found:
    for q in view.quantizers:
        if needless(view, q):
            uses = view.model.consumers(q.node.output[0])
            assert q.source is not None
            yield q.source.node, f"Only float operators read it: {', '.join(sorted({u.node.op_type for u in uses}))}."


@_rule("float-weight", "size", "builds the same kernels from four times the bytes", "Store the INT8 codes and a DequantizeLinear only.")
def _float_weight(view: View) -> Found:
    for q in view.heads:
        if q.is_q and q.stored and q.shape != () and q.dtype in (*EIGHT_BIT, *FP8):
            yield q.node, "A float constant is quantized at run time."


@_rule("default-axis", "version", "TensorRT 10.1 reads axis 0, 10.15 and later 1", "Write the axis.")
def _default_axis(view: View) -> Found:
    for q in view.heads:
        if q.vector and attribute(q.node, "axis") is None and q.dtype != TensorProto.INT32 and not _bad_shape(q) and view.model.opset >= 13:
            yield q.node, f"{np.size(q.scale)} scales and no axis, which means axis {q.axis}."


RULES: tuple[Rule, ...] = tuple(_RULES)


def smallest(scale: np.ndarray) -> float:
    """The smallest normal number of a scale's type."""
    import ml_dtypes

    return float(ml_dtypes.finfo(scale.dtype).tiny)


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


def unpaired(view: View, product: Product) -> bool:
    """Whether a product has quantized data, a float constant weight, and no neighbour that the data is quantized for."""
    weight, data = product.weight, product.data
    if weight is None or weight.dq is not None or data.dq is None or data.constant:
        return False
    shape = view.shape(weight.tensor)
    others = [p for p, _ in view.products_of(data.dq) if p is not product and p.weight is not None and p.weight.dq is not None]
    return not others and shape is not None and len(shape) >= 2


def transposed_quantizers(view: View, product: Product) -> list[Quantizer]:
    """The DQs of a ConvTranspose that were made for it: of its weight, and of data that no other product reads."""
    found = [o.dq for o in product.operands if o.dq is not None]
    return [q for q in found if q.constant or all(p.node.op_type == "ConvTranspose" for p, _ in view.products_of(q))]


def attention_quantizers(view: View, product: Product) -> list[Quantizer]:
    """The DQs of an FP16 product of two computed tensors next to a Softmax; [] for any other product."""
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


def _near_softmax(view: View, product: Product) -> bool:
    """Whether a Softmax lies before an operand, or behind the result, with at most a few elementwise nodes between."""
    name = product.operands[0].tensor
    for _ in range(4):
        before = view.model.producer(name)
        if before is None:
            break
        if before.op_type == "Softmax":
            return True
        name = before.input[0] if before.input else ""
    names = [product.node.output[0]]
    for _ in range(4):
        uses = [u.node for n in names for u in view.model.consumers(n)]
        if any(n.op_type == "Softmax" for n in uses):
            return True
        names = [o for n in uses if n.op_type in ("Mul", "Div", "Add", "Where", "QuantizeLinear", "DequantizeLinear") for o in n.output]
    return False


def _reader(view: View, q: Quantizer) -> Quantizer | None:
    """The DQ that belongs to a head: itself, or the one that reads this Q."""
    if not q.is_q:
        return q
    return next((d for d in view.quantizers if d.source is q), None)


def _weighted(view: View) -> Iterator[tuple[Product, Operand]]:
    for product in view.products:
        if product.weight is not None and product.node.op_type != "ConvTranspose":
            yield product, product.weight


def _bad_rank(q: Quantizer) -> bool:
    return q.shape is not None and np.ndim(q.scale) != len(q.shape)


def _bad_shape(q: Quantizer) -> bool:
    return q.shape is not None and q.vector and (not 0 <= q.axis < len(q.shape) or q.shape[q.axis] not in (None, np.size(q.scale)))


def _unsigned_zero(q: Quantizer) -> bool:
    zero = q.zero is not None and bool(np.any(q.zero))
    return q.dtype == TensorProto.UINT8 and not zero and not q.computed_zero


def _computed(view: View, q: Quantizer) -> bool:
    return not view.is_constant(q.node.input[1]) and not _dynamic(view, q.node.input[1])


def _feeds_convolution(view: View, q: Quantizer) -> bool:
    dq = _reader(view, q)
    return dq is not None and any(p.node.op_type in ("Conv", "ConvTranspose") for p, _ in view.products_of(dq))


def _dynamic(view: View, name: str) -> bool:
    """Whether an operator that is reported itself (DynamicQuantizeLinear) makes a tensor."""
    maker = view.model.producer(name)
    return maker is not None and _REFUSED_OPERATORS.match(maker.op_type) is not None


def _third(node: NodeProto) -> str:
    return str(node.input[2]) if len(node.input) > 2 else ""


def _some(values: np.ndarray) -> str:
    """The first value, and how many others there are."""
    flat = np.atleast_1d(values).ravel()
    rest = len(set(flat.tolist())) - 1
    return f"{flat[0]:g}" + (f" and {rest} other values" if rest > 0 else "") if flat.size else "nothing"
