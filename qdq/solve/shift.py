"""The constant that an asymmetric tensor is moved by before it is quantized, and where it may not be.

A shift is made up for behind the product but for a float rounding: zeros that were exact come out as 1e-7. Most
operators do not mind; what divides by a magnitude, or asks whether a value is zero, does: x / max(|x|, 1e-12) makes
ones of such rows. A tensor whose product leads there without a bias keeps symmetric codes, in which zero is exact.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto, TensorProto

from engines.core.operators import ARRANGERS, PICKERS, POOLS, family
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, attribute, ints
from qdq.plan.plan import Point

TINY = 1e-7  # an epsilon below it does not hide the rounding of a shift
# Zero where all their inputs are, or where the first is: the way goes on behind them.
_ZEROS = (
    ARRANGERS
    | PICKERS
    | POOLS
    | family(
        "Abs Add Cast CastLike Clip Div Dropout Elu Erf Gelu LeakyRelu LpPool MatMul Max Mean Min Mish Mul Neg "
        "Pow PRelu ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu Resize "
        "Selu Softsign Sqrt Sub Sum Swish Tanh ThresholdedRelu"
    )
)
_STEPS = family("Ceil Floor Log LpNormalization NonZero Reciprocal ReduceLogSum Sign")  # of another value beside zero
_COMPARISONS = family("Equal Greater GreaterOrEqual Less LessOrEqual")


def shifts(model: Model, point: Point) -> bool:
    """Whether the codes of an activation may be asymmetric: that is asked for, and all its readers allow it."""
    return point.spec.shift and all(_can_shift(model, name, index) for name, index in point.uses)


def _can_shift(model: Model, name: str, index: int) -> bool:
    """Whether a constant subtracted from operand `index` of a node can be made up for exactly behind the node.

    Conv needs explicit, non-negative padding (the border is then padded before the shift); Gemm and MatMul always can;
    a shortcut gets the constant back by an Add. A float16 model cannot: the correction c * sum(W) would have to be
    stored in float16, which may not hold it. None can where exact zeros count behind the node.
    """
    node = model.node(name)
    if model.dtype(node.input[index]) == "float16" or _zeros_count(model, node):
        return False
    if node.op_type == "ConvTranspose":  # at its borders fewer taps read the constant
        return False
    if node.op_type != "Conv":
        return True
    auto = next((a.s for a in node.attribute if a.name == "auto_pad"), b"NOTSET")
    return auto in (b"NOTSET", b"VALID") and all(p >= 0 for p in ints(node, "pads", [0]))


def _zeros_count(model: Model, node: NodeProto) -> bool:
    """Whether a node's zeros reach, still zero and in float, an operator that tells them from 1e-7."""
    if node.op_type in ("Conv", "Gemm") and _large(model, node.input[2:3]):
        return False
    seen, ways = set(node.output), list(node.output)
    while ways:
        for use in model.consumers(ways.pop()):
            if _tells_zero(model, use.node, use.index):
                return True
            after = use.node
            quantized = after.op_type in WEIGHTED and len(after.input) > 1 and model.is_constant(after.input[1])
            if after.op_type not in _ZEROS or quantized or (use.index and after.op_type == "Pow"):
                continue
            guarded = after.op_type in ("Add", "Sub", "Sum", "Max", "Clip") and _large(model, after.input)
            new = [] if guarded else [name for name in after.output if name and name not in seen]
            seen.update(new)
            ways += new
    return False


def _tells_zero(model: Model, node: NodeProto, index: int) -> bool:
    """Whether a node makes something else of 1e-7 at an operand than of zero."""
    if node.op_type in _COMPARISONS:
        return not _large(model, node.input)
    if node.op_type == "Pow":
        exponent = node.input[1]
        return index == 0 and model.is_constant(exponent) and bool((model.array(exponent) < 0).any())
    to_bool = node.op_type == "Cast" and attribute(node, "to", 0) == TensorProto.BOOL
    return node.op_type in _STEPS or (node.op_type == "Div" and index == 1) or to_bool


def _large(model: Model, names: Iterable[str]) -> bool:
    """Whether one of some tensors is a constant that hides a rounding: not all of it is tiny."""
    arrays = [model.array(name) for name in names if name and model.is_constant(name)]
    return any(a.dtype.kind == "f" and a.size and bool((abs(a) >= TINY).any()) for a in arrays)
