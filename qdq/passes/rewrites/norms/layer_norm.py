"""LayerNormalization written out, as exporters before opset 17 write it: the operator.

    (x - m) / s * gain + shift  m = mean(x), s = sqrt(mean((x - m)^2) + epsilon)  ->  LayerNormalization(x, gain, shift)

In any order of operands; without gain or shift; as x * (gain / s) + (shift - m * gain / s). Over the last axes. The
operator computes its statistics in FP32 and reads and writes FP16; the written form stays FP32 as a whole, for squares
overflow FP16, and what else reads the result reads FP32 (TensorRT-RTX 1.7.1, SM89: BERT, where the norm is read by the
next shortcut too). It must not touch statistics over other axes, or an epsilon added to s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node
from qdq.passes.rewrites.polynomial import ONE, OPERATORS, agrees, ancestors, polynomial, powers

STAGE, RANK = "float", 2  # before norm_late, which moves the operator that this makes

ROOTS = ("Sqrt", "Pow")
STEPS = 6  # operators from the standard deviation to the result, at most


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Put LayerNormalization in the place of what is written out; fires on its Sqrt or Pow."""
    return each_node(model, only, ROOTS, _put)


def _put(model: Model, edit: Edit, root: NodeProto) -> None:
    exponent = _exponent(model, root)
    values, first, epsilon = _mean_square(model, root.input[0])
    source, means = _centre(model, values, first)
    sizes, dtype = model.sizes(source, first), model.dtype(source)
    if not means:
        raise Unfit("the squares are not of values less their mean over the same axes")
    if sizes is None or dtype not in ("float32", "float16"):
        raise Unfit("a normalized axis is dynamic, or the type is neither float32 nor float16")
    rank = first + len(sizes)
    variables = {source: "x", root.output[0]: "s", **dict.fromkeys(means, "m")}
    last, *constants = _result(
        model, root, lambda node: _affine(model, node, variables, -1 if exponent > 0 else 1, rank)
    )
    inputs = [source]
    for name, constant in zip(("gain", "shift"), constants, strict=True):
        if constant is not None:
            inputs.append(edit.constant(f"{root.name}_{name}", _spread(constant, rank, sizes).astype(dtype)))
    name = f"{root.name}_LayerNormalization"
    node = edit.node("LayerNormalization", inputs, name, last.output[0], axis=-len(sizes), epsilon=epsilon)
    edit.replace(last, [node], root)


def _exponent(model: Model, root: NodeProto) -> float:
    """0.5 or -0.5; `Unfit` for any other node."""
    if root.op_type == "Sqrt":
        return 0.5
    exponent = model.array(root.input[1]) if model.is_constant(root.input[1]) else np.zeros(0)
    if exponent.size != 1 or abs(exponent.item()) != 0.5:
        raise Unfit("its exponent is neither 0.5 nor -0.5")
    return float(exponent.item())


def _mean_square(model: Model, tensor: str) -> tuple[str, int, float]:
    """The values d, the first axis and epsilon where a tensor is mean(d^2) + epsilon over the last axes."""
    for mean in ancestors(model, tensor):
        below = _mean(model, mean)
        found = polynomial(model, tensor, {mean: "v"}) if below else None
        if below is None or found is None or found.keys() != {powers(v=1), ONE}:
            continue
        epsilon = found[ONE]
        if epsilon.size != 1 or epsilon.item() <= 0 or not agrees({powers(v=1): found[powers(v=1)]}, {powers(v=1): 1}):
            continue
        square, axis = below
        for values in ancestors(model, square):
            if agrees(polynomial(model, square, {values: "d"}), {powers(d=2): 1}):
                return values, axis, float(epsilon.item())
    raise Unfit("it is not the root of a mean of squares over the last axes, which are kept, and an epsilon above 0")


def _mean(model: Model, tensor: str) -> tuple[str, int] | None:
    """The source and the first axis where a tensor is a mean over the last axes, which stay with size 1."""
    for total in ancestors(model, tensor):
        node = model.producer(total)
        if node is None or node.domain or node.op_type not in ("ReduceMean", "ReduceSum"):
            continue
        axis = _first_axis(model, node)
        if axis is None:
            return None
        count = 1.0
        if node.op_type == "ReduceSum":
            sizes = model.sizes(node.input[0], axis)
            count = math.nan if sizes is None else math.prod(sizes)
        exact = agrees(polynomial(model, tensor, {total: "v"}), {powers(v=1): 1 / count})
        return (node.input[0], axis) if exact else None
    return None


def _first_axis(model: Model, node: NodeProto) -> int | None:
    """The first of the axes that a reduction runs over, if they are the last ones, kept and not empty."""
    info, constant = model.info(node.input[0]), len(node.input) > 1 and model.is_constant(node.input[1])
    if info is None or not info.shape or not attribute_value(node, "keepdims", 1) or not constant:
        return None
    rank = len(info.shape)
    axes = sorted(int(a) % rank for a in model.array(node.input[1]).ravel())
    last = axes and axes == list(range(axes[0], rank)) and 0 not in info.shape[axes[0] :]
    return axes[0] if last else None


def _centre(model: Model, values: str, axis: int) -> tuple[str, tuple[str, ...]]:
    """The tensor x and all tensors that are its mean, where values are x - mean(x); else no means."""
    for mean in ancestors(model, values):
        below = _mean(model, mean)
        if below is None or below[1] != axis:
            continue
        source = below[0]
        if agrees(polynomial(model, values, {source: "x", mean: "m"}), {powers(x=1): 1, powers(m=1): -1}):
            made = (use.node.output[0] for use in model.consumers(source))
            same = (t for t in made if t != mean and _mean(model, t) == below)
            return source, (mean, *dict.fromkeys(same))
    return values, ()


def _result(
    model: Model, root: NodeProto, affine: Callable[[NodeProto], tuple[np.ndarray, np.ndarray | None] | None]
) -> tuple[NodeProto, np.ndarray, np.ndarray | None]:
    """The last node that makes d / s * gain + shift, with gain and shift."""
    front, seen = [root.output[0]], set[str]()
    for _ in range(STEPS):
        nodes = [u.node for t in front for u in model.consumers(t) if u.node.op_type in OPERATORS and not u.node.domain]
        for node in nodes:
            found = last = affine(node)
            while found is not None:  # further factors and summands, while nothing else reads what lies between
                use, last = model.only_use(node.output[0]), found
                found = None if use is None or use.node.op_type not in OPERATORS else affine(use.node)
                node = node if use is None or found is None else use.node
            if last is not None:
                return node, *last
        seen.update(front)
        front = [node.output[0] for node in nodes if node.output[0] not in seen]
    raise Unfit("nothing makes (x - mean) / deviation * gain + shift with it")


def _affine(
    model: Model, node: NodeProto, variables: Mapping[str, str], sign: int, rank: int
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Gain and shift where a node makes d / s * gain + shift, as wide as x."""
    found = polynomial(model, node.output[0], variables)
    data, mean = powers(x=1, s=sign), powers(m=1, s=sign)
    if found is None or model.rank(node.output[0]) != rank or data not in found:
        return None
    gain = found[data]
    if found.keys() - {ONE} != {data, mean} or not np.allclose(found[mean], -gain, rtol=1e-6, atol=0):
        return None
    return gain, found.get(ONE)


def _spread(values: np.ndarray, rank: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Values that broadcast to the last axes of a tensor, as large as those."""
    whole = values.reshape((1,) * (rank - values.ndim) + values.shape) if values.ndim <= rank else values
    axis = rank - len(sizes)
    if whole.ndim != rank or any(d not in (1, n) for d, n in zip(whole.shape, (*[1] * axis, *sizes), strict=True)):
        raise Unfit("its gain or shift differs along axes that are not normalized")
    return np.broadcast_to(whole.reshape(whole.shape[axis:]), sizes)
