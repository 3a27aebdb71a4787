"""The constant that an asymmetric tensor is moved by before it is quantized."""

from __future__ import annotations

from qdq.model.model import Model
from qdq.model.nodes import ints
from qdq.plan.plan import Point


def shifts(model: Model, point: Point) -> bool:
    """Whether the codes of an activation may be asymmetric: that is asked for, and all its readers allow it."""
    return point.spec.shift and all(_can_shift(model, name, index) for name, index in point.uses)


def _can_shift(model: Model, name: str, index: int) -> bool:
    """Whether a constant subtracted from operand `index` of a node can be made up for exactly behind the node.

    Conv needs explicit, non-negative padding (the border is then padded before the shift); Gemm and MatMul always can;
    a shortcut gets the constant back by an Add. A float16 model cannot: the correction c * sum(W) would have to be
    stored in float16, which may not hold it.
    """
    node = model.node(name)
    if model.dtype(node.input[index]) == "float16":
        return False
    if node.op_type != "Conv":
        return True
    auto = next((a.s for a in node.attribute if a.name == "auto_pad"), b"NOTSET")
    return auto in (b"NOTSET", b"VALID") and all(p >= 0 for p in ints(node, "pads", [0]))
