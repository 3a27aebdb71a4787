"""What a rule of `lint` is, and the questions about quantizers that several rules ask.

A rule module holds a list RULES; `@rule(RULES, effect, tensorrt, remedy)` appends a check to it, and modules shorten
that to `@effect(tensorrt, remedy)`. The name of `_weight_axis` is weight-axis.
It must not hold a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from onnx import NodeProto, TensorProto

from engines.core.operators import CURVES, NORMS, RAMPS, SOFTMAXES
from engines.core.quantizers import Operand, Product, Quantizer
from qdq.lint.view import View
from qdq.model.model import dtype_name
from qdq.model.nodes import FP4_QUANTIZE

ERRORS = ("refused", "crash", "wrong")
EIGHT_BIT = (TensorProto.INT8, TensorProto.UINT8)
FP8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)
# as `Profile.types` calls them
CALLED: dict[int, str] = {TensorProto.INT4: "int4", TensorProto.FLOAT8E4M3FN: "fp8", TensorProto.FLOAT4E2M1: "fp4"}
ACCEPTED = (*EIGHT_BIT, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)
REFUSED_OPERATORS = re.compile(
    r"^(QLinear\w+|QGemm|QAttention|QOrdered\w+|QEmbed\w+|QMoE|DynamicQuantize\w+|ConvInteger|MatMulInteger(ToFloat)?|MatMulNBits)$"
)
FLOAT_OPERATORS = CURVES | RAMPS | SOFTMAXES | NORMS | {"Swish"}

Found = Iterator[tuple[NodeProto, str]]
Check = Callable[[View], Found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One check: `find` yields nodes and what is found there."""

    name: str
    effect: str
    tensorrt: str
    remedy: str
    find: Check

    @property
    def severity(self) -> str:
        """By the effect."""
        return "error" if self.effect in ERRORS else "warning"


def rule(rules: list[Rule], effect: str, tensorrt: str, remedy: str) -> Callable[[Check], Check]:
    """Append a check to a list of rules, under the name of its function."""

    def register(find: Check) -> Check:
        name = find.__name__.removeprefix("_").replace("_", "-")
        rules.append(Rule(name=name, effect=effect, tensorrt=tensorrt, remedy=remedy, find=find))
        return find

    return register


def type_name(q: Quantizer) -> str:
    """The type of the codes, for a message."""
    return dtype_name(q.dtype).upper() if q.dtype else "unknown"


def smallest(scale: np.ndarray) -> float:
    """The smallest normal number of a scale's type."""
    return float(ml_dtypes.finfo(scale.dtype).tiny)  # type: ignore[no-untyped-call]


def least_divisor(scale: np.ndarray) -> float:
    """The smallest number of a scale's type whose reciprocal is one too; float32 flushes subnormal numbers to 0."""
    limits = ml_dtypes.finfo(scale.dtype)  # type: ignore[no-untyped-call]
    return 1 / float(limits.max) if scale.dtype == np.float16 else float(limits.tiny)


def reader(view: View, q: Quantizer) -> Quantizer | None:
    """The DQ that belongs to a head: itself, or the one that reads this Q."""
    return next((d for d in view.quantizers if d.source is q), None) if q.is_q else q


def weighted(view: View) -> Iterator[tuple[Product, Operand]]:
    """Products with a constant factor, except transposed convolutions, and that factor."""
    for product in view.products:
        if product.weight is not None and product.node.op_type != "ConvTranspose":
            yield product, product.weight


def bad_rank(q: Quantizer) -> bool:
    """Whether scales of several axes are of another rank than the tensor."""
    return q.shape is not None and q.scale is not None and q.scale.ndim != len(q.shape)


def bad_shape(q: Quantizer) -> bool:
    """Whether a vector of scales does not fit its axis."""
    if q.shape is None or not q.vector:
        return False
    return not 0 <= q.axis < len(q.shape) or q.shape[q.axis] not in (None, q.count)


def computed(view: View, q: Quantizer) -> bool:
    """Whether the scale depends on an input, and neither NVFP4 has it so nor an operator that is reported itself."""
    maker = view.model.producer(q.node.input[0])
    if maker is not None and maker.op_type == FP4_QUANTIZE:
        return False
    return q.computed_scale and not made_dynamically(view, q.node.input[1])


def feeds_convolution(view: View, q: Quantizer) -> bool:
    """Whether a quantizer is on an operand of a convolution."""
    dq = reader(view, q)
    return dq is not None and any(p.node.op_type in ("Conv", "ConvTranspose") for p, _ in view.products_of(dq))


def made_dynamically(view: View, name: str) -> bool:
    """Whether an operator that is reported itself (DynamicQuantizeLinear) makes a tensor."""
    maker = view.model.producer(name)
    return maker is not None and REFUSED_OPERATORS.match(maker.op_type) is not None


def zero_name(node: NodeProto) -> str:
    """The name of a quantizer's zero point, '' for none."""
    return str(node.input[2]) if len(node.input) > 2 else ""


def some(values: np.ndarray) -> str:
    """The first value, and how many others there are."""
    flat = np.atleast_1d(values).ravel()
    rest = len(set(flat.tolist())) - 1
    return f"{flat[0]:g}" + (f" and {rest} other values" if rest > 0 else "") if flat.size else "nothing"
