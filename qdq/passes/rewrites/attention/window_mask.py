"""The mask of attention within groups of tokens, multiplied into the scores instead of added to them.

    Softmax(Q K + bias + mask) V  ->  Softmax([Q, A] [K; B] + bias) V        mask is 0 within a group, else -100

A row of B is 1 for the tokens of one group and 0 for the others; A is -100 in the columns of the groups that a token is
not in: A B is the mask. Shifted windows (Swin) have a mask of windows * tokens^2 values, 161 MB for the first stage of
SwinUNETR at 96^3, which every inference reads; the columns of its at most 8 groups take the place of the zeros that
`head_size` adds (TensorRT-RTX 1.7.1; SM89). Scores of tokens in one group do not change by a bit. It must not touch a
mask with other values, or one whose groups overlap.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.attention.scores import alone, product_of
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "float", 35  # behind constants, which makes the masks; behind head_size and attention_scale: it adds to Q
NOT_FOR = {"tensorrt": "TensorRT's fused attention takes a mask that is added"}

MOST_GROUPS = 16
MULTIPLE = 8  # values per head that the fused attention kernel takes
LOWEST = -(2.0**15)  # half of what float16 holds


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOperand:
    """Where columns are added to an operand of the scores: to `base` along `axis`; `turn` is the Transpose behind."""

    base: str
    axis: int
    size: int
    spare: int
    turn: NodeProto | None


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Multiply masks that are constants into the scores; fires on the Softmax."""
    return each_node(model, only, ["Softmax"], partial(_multiply, known={}))


def _multiply(
    model: Model, edit: Edit, softmax: NodeProto, known: dict[str, tuple[np.ndarray, np.floating] | None]
) -> None:
    """Multiply the first mask that can be; `known` are the groups of the masks seen."""
    path = product_of(model, softmax, ("Add", "Reshape"))
    reason = "no constant of 0 within up to 16 groups of tokens and one lower number between them is added"
    for place, add in enumerate(path[:-1]):
        mask = next((t for t in add.input if model.is_constant(t)), "") if add.op_type == "Add" else ""
        if mask and mask not in known:
            known[mask] = _groups(model.array(mask))
        found = known[mask] if mask else None
        if found is not None:
            try:
                return _multiplied(model, edit, softmax, path[place:], *found)
            except Unfit as other:
                reason = f"mask {mask!r}: {other}"
    raise Unfit(reason)


def _groups(mask: np.ndarray) -> tuple[np.ndarray, np.floating] | None:
    """(..., tokens) the group of each token, and the mask's value between groups; None for any other mask."""
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or mask.dtype.kind != "f":
        return None
    value = mask.min(initial=0.0)
    same = mask == 0
    if not LOWEST <= value < 0 or not (same | (mask == value)).all():
        return None
    first = same.argmax(axis=-1)  # the first token of the group
    if not (same == (first[..., :, None] == first[..., None, :])).all():
        return None
    starts = first == np.arange(mask.shape[-1])
    groups = np.take_along_axis(np.cumsum(starts, axis=-1) - 1, first, axis=-1)
    return (groups, value) if groups.max(initial=0) < MOST_GROUPS else None


def _multiplied(
    model: Model, edit: Edit, softmax: NodeProto, path: list[NodeProto], groups: np.ndarray, value: np.floating
) -> None:
    """Take the Add at the start of the path out, and widen the product at its end."""
    add, below, product = path[0], path[1], path[-1]
    shapes = [model.sizes(t) for t in (add.output[0], product.output[0], *product.input)]
    if any(shape is None for shape in shapes):
        raise Unfit("a size of the scores or of an operand is dynamic")
    added, whole, left, right = (shape or () for shape in shapes)
    if model.sizes(below.output[0]) != added or math.prod(added) != math.prod(whole):
        raise Unfit("it, or another summand, is larger than the scores")
    if added[-2:] != whole[-2:] or not left[:-2] == right[:-2] == whole[:-2]:
        raise Unfit("the scores are reshaped across tokens, or an operand is broadcast")
    query, key = _operand(model, product.input[0], -1), _operand(model, product.input[1], -2)
    if query is None or key is None or (query.size, query.spare) != (key.size, key.spare):
        raise Unfit("the head size of queries and keys, or the zeros behind them, cannot be told or differ")
    count = int(groups.max()) + 1
    width = query.spare if query.spare >= count else -(query.size + count) % MULTIPLE + count
    labels = _narrow(np.broadcast_to(groups, added[:-1]).reshape(whole[:-1]))
    inside = labels[..., None] == np.arange(width)
    outside = np.where(inside | (np.arange(width) >= count), 0, value)
    wide = altered(product)
    new = []
    for index, operand, columns in ((0, query, outside), (1, key, inside.swapaxes(-1, -2))):
        new += _widened(model, edit, operand, columns.astype(value.dtype), f"{product.name}_{'ab'[index]}")
        wide.input[index] = new[-1].output[0]
    moved = altered(wide if below.name == product.name else below, output=add.output[0])
    edit.replace(product, [*new, wide], softmax)
    edit.replace(below, [*new, moved] if below.name == product.name else [moved], softmax)
    edit.replace(add, [], softmax)


def _operand(model: Model, tensor: str, axis: int) -> ScoreOperand | None:
    """What makes an operand, past a Transpose and past zeros that are added to it."""
    made, turn = alone(model, tensor), None
    if made is not None and made.op_type == "Transpose" and (order := attribute_value(made, "perm", [])):
        turn, tensor, axis = made, made.input[0], order[axis]
        made = alone(model, tensor)
    shape = model.sizes(tensor)
    if shape is None:
        return None
    axis %= len(shape)
    spare = _zeros_behind(model, made, axis, len(shape)) if made is not None else 0
    base = made.input[0] if made is not None and spare else tensor
    return ScoreOperand(base=base, axis=axis, size=shape[axis] - spare, spare=spare, turn=turn)


def _zeros_behind(model: Model, node: NodeProto, axis: int, rank: int) -> int:
    """How many zeros a node adds at the end of an axis, if that is all it does."""
    constant = node.op_type == "Pad" and model.is_constant(node.input[1]) and not any(node.input[2:])
    if not constant or attribute_value(node, "mode", b"constant") != b"constant":
        return 0
    ends = model.array(node.input[1]).reshape(2, rank).copy()
    spare = int(ends[1, axis])
    ends[1, axis] = 0
    return 0 if ends.any() else max(spare, 0)


def _narrow(groups: np.ndarray) -> np.ndarray:
    """The same with size 1 along axes on which nothing depends."""
    for axis in range(groups.ndim - 1):
        if (groups == groups.take([0], axis)).all():
            groups = groups.take([0], axis)
    return groups


def _widened(model: Model, edit: Edit, operand: ScoreOperand, columns: np.ndarray, name: str) -> list[NodeProto]:
    """Nodes that put columns, which are in the layout of the product, behind an operand."""
    order = attribute_value(operand.turn, "perm", []) if operand.turn is not None else list(range(columns.ndim))
    columns = np.ascontiguousarray(columns.transpose(np.argsort(order)))
    shape = list(model.sizes(operand.base) or ())
    shape[operand.axis] = columns.shape[operand.axis]
    added, target = edit.constant(name, columns), edit.constant(f"{name}_shape", np.array(shape, np.int64))
    spread = edit.node("Expand", [added, target], f"{name}_Expand")
    nodes = [spread, edit.node("Concat", [operand.base, spread.output[0]], f"{name}_Concat", axis=operand.axis)]
    if operand.turn is not None:
        nodes.append(edit.node("Transpose", [nodes[-1].output[0]], f"{operand.turn.name}_wide", perm=order))
    return nodes
