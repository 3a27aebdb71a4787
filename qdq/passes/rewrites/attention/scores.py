"""Where the scores of attention come from: what the rewrites of attention share.

Softmax's operand -> `scores`: back through scale, bias and mask -> the product of Q and K.
It must not decide what a rewrite does there, or change a graph.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute
from qdq.passes.rewrites.edit import Unfit

BETWEEN = ("Add", "Sub", "Mul", "Div", "Where", "Reshape", "Cast")  # scale, bias and mask


def alone(model: Model, tensor: str) -> NodeProto | None:
    """The node that makes a tensor that is read once, and is no output of the graph; None for any other tensor."""
    return None if model.only_use(tensor) is None else model.producer(tensor)


def product_of(model: Model, softmax: NodeProto, between: Collection[str]) -> list[NodeProto]:
    """`scores` of a Softmax; raises `Unfit` where it is not that of attention."""
    path = scores(model, softmax.input[0], between)
    if not path:
        what = f"past {', '.join(between)} whose results are read once"
        raise Unfit(f"what it normalizes does not come from a MatMul of two computed tensors, {what}")
    return path


def scores(model: Model, tensor: str, between: Collection[str]) -> list[NodeProto]:
    """The nodes from the one that makes a tensor back to the product of two computed tensors that it comes from.

    The last node first, the MatMul at the end; none where there is no such product. Types of `between` may lie between;
    each result on the way is read once.
    """
    node = alone(model, tensor)
    if node is None or node.domain:
        return []
    if node.op_type == "MatMul":
        return [] if any(model.is_constant(t) for t in node.input) else [node]
    operands = node.input if node.op_type in between else ()
    below = next((path for t in operands if (path := scores(model, t, between))), [])
    return [node, *below] if below else []


def attends(model: Model, node: NodeProto) -> tuple[NodeProto, NodeProto] | None:
    """The product of Q and K and that with V, of which a MatMul is one; None where it is neither.

    Scores, softmax (over the last axis) and what lies between are each read once.
    """
    if node.op_type != "MatMul" or node.domain or any(model.is_constant(t) for t in node.input):
        return None
    softmax = alone(model, node.input[0])
    if softmax is not None and softmax.op_type == "Softmax":
        path = scores(model, softmax.input[0], BETWEEN)
        return (path[-1], node) if path and _over_last(model, softmax) else None
    tensor = node.output[0]
    for _ in range(8):
        use = model.only_use(tensor)
        if use is None or use.index < 0 or use.node.domain:
            return None
        tensor = use.node.output[0]
        if use.node.op_type == "Softmax":
            last = model.only_use(tensor)
            found = attends(model, last.node) if last is not None and last.index == 0 else None
            return found if found is not None and found[0] is node else None
        if use.node.op_type not in BETWEEN:
            return None
    return None


def _over_last(model: Model, softmax: NodeProto) -> bool:
    axis, rank = attribute(softmax, "axis", -1), model.rank(softmax.input[0])
    return axis == -1 or (rank is not None and axis == rank - 1)


def weighs_values(model: Model, tensor: str) -> bool:
    """Whether a tensor becomes the weights of attention: past scale, bias and mask to a Softmax before a product."""
    for _ in range(8):
        use = model.only_use(tensor)
        if use is None or use.index < 0 or use.node.domain:
            return False
        tensor = use.node.output[0]
        if use.node.op_type == "Softmax":
            readers = [u.node.op_type for u in model.consumers(tensor)]
            return bool(readers) and all(op in ("MatMul", "Einsum") for op in readers)
        if use.node.op_type not in (*BETWEEN, "Transpose"):
            return False
    return False
