"""Attention with small heads, padded with zeros to the size from which the compiler fuses it into one kernel.

    Softmax(f(Q K)) V  ->  Slice(Softmax(f(Pad(Q) Pad(K))) Pad(V))        heads of fewer than 16 values become 16

TensorRT-RTX 1.7.1 writes the scores of heads of 8 values to memory, several times; its fused attention kernel takes
12 and more (measured, SM89). Zeros add nothing to Q K, and the columns that they add to the result are cut off again.
An operand that a Transpose makes is padded before it: one kernel then pads and turns Q, K and V. It must not touch what
lies between the two products.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.attention.scores import BETWEEN, product_of
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "float", 30  # before window_mask, which puts its columns in the place of these zeros

FUSED = 12  # values per head that the fused kernel takes without help
SIZE = 16


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Pad the heads of attention, of a static size; fires on the Softmax."""
    return each_node(model, only, ["Softmax"], _pad_heads)


def _pad_heads(model: Model, edit: Edit, softmax: NodeProto) -> None:
    product, uses = product_of(model, softmax, BETWEEN)[-1], model.consumers(softmax.output[0])
    if len(uses) != 1 or uses[0].node.op_type != "MatMul" or uses[0].index != 0:
        raise Unfit("its result is not read by one MatMul alone, as the left operand")
    mix = uses[0].node
    inner, outer = _size(model, product.input[0], -1), _size(model, mix.input[1], -1)
    if inner is None or outer is None or _size(model, product.input[1], -2) != inner:
        raise Unfit("the size of the heads is dynamic, or an operand has no axis of heads")
    if inner >= FUSED and outer >= FUSED:
        raise Unfit(f"heads of {min(inner, outer)} values are fused as they are: {FUSED} suffice")
    if inner < FUSED:
        edit.replace(product, _padded(model, edit, product, {0: -1, 1: -2}, inner), softmax)
    if outer < FUSED:
        nodes = _padded(model, edit, mix, {1: -1}, outer)
        nodes[-1].output[0] = edit.name(f"{mix.output[0]}_wide")
        edit.replace(mix, [*nodes, edit.first(nodes[-1].output[0], outer, -1, mix)], softmax)


def _size(model: Model, tensor: str, axis: int) -> int | None:
    info = model.info(tensor)
    size = info.shape[axis] if info is not None and info.shape is not None and len(info.shape) > 2 else None
    return size if isinstance(size, int) else None


def _padded(model: Model, edit: Edit, product: NodeProto, axes: dict[int, int], size: int) -> list[NodeProto]:
    """Nodes that pad some operands of a MatMul, each along an axis from `size` to SIZE, and the MatMul on them."""
    copy = altered(product)
    nodes = []
    for index, axis in axes.items():
        source, turn = product.input[index], model.producer(product.input[index])
        rank = model.rank(source) or 0
        order = attribute_value(turn, "perm", []) if turn is not None and turn.op_type == "Transpose" else []
        if model.only_use(source) is None or len(order) != rank:
            turn = None
        if turn is not None:
            source, axis = turn.input[0], order[axis]
        ends = np.zeros((2, rank), np.int64)  # ONNX Runtime 1.31 moves a Transpose wrongly past `axes`
        ends[1, axis] = SIZE - size
        amounts = edit.constant(f"{product.name}_pads", ends.reshape(-1))
        nodes.append(edit.node("Pad", [source, amounts], f"{product.name}_Pad"))
        if turn is not None:
            nodes.append(edit.node("Transpose", [nodes[-1].output[0]], f"{turn.name}_wide", perm=order))
        copy.input[index] = nodes[-1].output[0]
    return [*nodes, copy]
