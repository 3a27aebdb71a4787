"""LayerNormalization behind the moves that cut its result into windows, instead of before them.

    Reshape(Transpose(Pad(LayerNormalization(x))))  ->  LayerNormalization(Reshape(Transpose(Pad(x)))) * mask

Each row along the last axis is normalized alone, wherever it lies; rows that Pad added are made zero again by a mask of
0 and 1. TensorRT-RTX 1.7.1 writes the centred rows in FP32 for a norm whose result it pads and turns, and reads them
again; the other way round one kernel adds the shortcut, moves and normalizes (measured, SM89). It must not touch moves
along the last axis, a norm whose result leaves them at two places, or one whose gain or shift differs from row to row.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.core.operators import MOVERS
from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.draft import assign
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "float", 5  # behind layer_norm, which makes the operator that this moves
NOT_FOR = {"tensorrt": "TensorRT is not known to write what a normalization centres"}

# What `_keeps` can judge: without copies, and without what `prepare` or another rewrite replaces.
MOVES = MOVERS - {"Expand", "Flatten", "Identity", "Tile"} | {"Concat", "Pad"}
WORTH = ("Pad", "Slice", "Transpose")  # a norm is not moved past others alone


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Move LayerNormalization over the last axis behind moves, all sizes static."""
    return each_node(model, only, ["LayerNormalization"], _move)


def _move(model: Model, edit: Edit, norm: NodeProto) -> None:
    moves = _moves(model, norm)
    last = moves[-1].output[0]
    mask = _mask(model, norm.output[0], moves)
    moved = edit.name(f"{last}_moved")
    for node in moves:
        early = altered(node, {i: norm.input[0] for i, tensor in enumerate(node.input) if tensor == norm.output[0]})
        edit.replace(node, [early], norm)
    early.output[0] = moved
    late = altered(norm, {0: moved}, last)
    for index, tensor in enumerate(norm.input[1:], 1):
        if len(model.initializers[tensor].dims if tensor else ()) > 1:  # more axes than the moved rows may have
            late.input[index] = edit.constant(f"{tensor}_row", model.array(tensor).reshape(-1))
    kept = [a for a in norm.attribute if a.name != "axis"]
    assign(late.attribute, [*kept, helper.make_attribute("axis", -1)])
    new = [early, late]
    if not mask.all():
        late.output[0] = edit.name(f"{last}_unmasked")
        zeros = edit.constant(f"{norm.name}_mask", mask.astype(model.array(norm.input[1]).dtype))
        new.append(edit.node("Mul", [late.output[0], zeros], f"{norm.name}_Mul", last))
    edit.replace(moves[-1], new, norm)
    edit.replace(norm, [])


def _moves(model: Model, norm: NodeProto) -> list[NodeProto]:
    """The nodes that move rows of a norm and end in one tensor that others read, if they are worth it."""
    shape = model.sizes(norm.output[0])
    axis = attribute_value(norm, "axis", -1)
    if not shape or axis not in (-1, len(shape) - 1) or any(norm.output[1:]):
        raise Unfit("it normalizes other axes than the last, a size is dynamic, or its mean is read")
    if not all(_is_row(model, t) for t in norm.input[1:] if t):
        raise Unfit("its gain or shift is computed, or differs from row to row")
    inside, moves = {norm.output[0]}, []
    for node in model.graph.node:
        if node.op_type not in MOVES or node.domain:
            continue
        data = node.input if node.op_type == "Concat" else node.input[:1]
        if inside.issuperset(data) and _keeps(model, node, shape[-1]):
            moves.append(node)
            inside.add(node.output[0])
    leaving = {t for t in inside if any(use.node.output[0] not in inside for use in model.consumers(t))}
    if not any(node.op_type in WORTH for node in moves):
        raise Unfit(f"none of {', '.join(WORTH)} moves whole rows of its result")
    if leaving != {moves[-1].output[0]} or any(map(model.is_output, inside)):
        raise Unfit("its result, or a moved one, is also read by other nodes, or an output of the model")
    return moves


def _is_row(model: Model, tensor: str) -> bool:
    """Whether a gain or shift is constant, and the same for all rows."""
    return model.is_constant(tensor) and all(d == 1 for d in model.initializers[tensor].dims[:-1])


def _keeps(model: Model, node: NodeProto, size: int) -> bool:
    """Whether a move leaves each row of `size` along the last axis as it is."""
    before, after = model.sizes(node.input[0]), model.sizes(node.output[0])
    if not before or not after or before[-1] != size or after[-1] != size:
        return False
    others = [t for t in node.input[1:] if t]
    if node.op_type != "Concat" and not all(model.is_constant(t) for t in others):
        return False
    rank = len(before)
    match node.op_type:
        case "Concat":
            return int(attribute_value(node, "axis", 0)) % rank != rank - 1
        case "Pad":
            zeros = attribute_value(node, "mode", b"constant") == b"constant" and not any(node.input[2:])
            amounts = model.array(node.input[1])  # negative ones crop, which the evaluator of `_mask` cannot
            return zeros and bool((amounts >= 0).all()) and not amounts.reshape(2, -1)[:, -1].any()
        case "Slice":
            return len(node.input) < 5 or bool((model.array(node.input[4]) > 0).all())
        case "Transpose":
            return bool(attribute_value(node, "perm", list(range(rank))[::-1])[-1] == rank - 1)
        case "Squeeze" | "Unsqueeze":
            return size > 1
        case _:
            return True  # rows are contiguous, and of the same size


def _mask(model: Model, tensor: str, moves: list[NodeProto]) -> np.ndarray:
    """(..., 1) where the moved rows are rows of the tensor, and not what Pad added."""
    ones, last = np.ones(model.sizes(tensor) or (), np.float32), moves[-1].output[0]
    constants = dict.fromkeys(t for node in moves for t in node.input if model.is_constant(t))
    stored = [numpy_helper.from_array(model.array(t), t) for t in constants]
    ends = [helper.make_tensor_value_info(t, TensorProto.FLOAT, model.sizes(t)) for t in (tensor, last)]
    graph = helper.make_graph(moves, "moves", ends[:1], ends[1:], stored)
    proto = helper.make_model(graph, opset_imports=list(model.proto.opset_import))
    (moved,) = ReferenceEvaluator(proto).run(None, {tensor: ones})
    return np.asarray(np.asarray(moved)[..., :1] != 0)
