"""The scale of attention in one place: on Q, before the product.

    Softmax((Q a) (K b) c + mask)  ->  Softmax((Q abc) K + mask)        also Q K / sqrt(d), as written by hand

PyTorch's exporters scale Q and K by the fourth root of the head size each, and some models the scores. TensorRT-RTX
1.7.1 takes a scaled Q into the fused attention kernel, or the kernel before it, in every form of mask; a scaled K or
scaled scores not in all (measured, SM89). No score becomes larger on the way. It must not touch a scale that is no
single number, or one on the far side of a mask.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.passes.rewrites.attention.scores import BETWEEN, alone, product_of
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "float", 32  # behind head_size, which looks for the Transpose behind which this puts a Mul


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Scale Q alone; fires on the Softmax, unless Q alone is scaled already."""
    return each_node(model, only, ["Softmax"], _scale_queries)


def _scale_queries(model: Model, edit: Edit, softmax: NodeProto) -> None:
    product = product_of(model, softmax, BETWEEN)[-1]
    query, left = _unscaled(model, product.input[0])
    key, right = _unscaled(model, product.input[1])
    last, behind = _scaled(model, product)
    if right is None and behind is None:
        raise Unfit("neither the keys nor the scores are scaled by one number")
    info = model.info(query)
    if info is None or info.dtype not in ("float32", "float16"):
        raise Unfit(f"the type of {query!r} is neither float32 nor float16")
    factor = np.prod([f for f in (left, right, behind) if f is not None])
    scale = edit.constant(f"{product.name}_scale", np.asarray(factor, info.dtype))
    mul = edit.node("Mul", [query, scale], f"{product.name}_Mul")
    edit.replace(product, [mul, altered(product, {0: mul.output[0], 1: key}, last.output[0])], softmax)
    if last.name != product.name:
        edit.replace(last, [], softmax)


def _factor(model: Model, node: NodeProto | None, tensor: str) -> float | None:
    """The number that a node multiplies a tensor with; None for any other node."""
    if node is None or node.domain or node.op_type not in ("Mul", "Div") or node.input[0] == node.input[1]:
        return None
    other = node.input[1] if node.input[0] == tensor else node.input[0]
    if not model.is_constant(other) or (node.op_type == "Div" and node.input[0] != tensor):
        return None
    values = model.array(other)
    if values.size != 1 or values.ndim > 1 or not np.isfinite(values).all() or not values.all():
        return None
    return float(values.item()) if node.op_type == "Mul" else 1 / float(values.item())


def _unscaled(model: Model, tensor: str) -> tuple[str, float | None]:
    """An operand before its scale, and the scale."""
    node = alone(model, tensor)
    computed = [t for t in node.input if not model.is_constant(t)] if node is not None else []
    factor = _factor(model, node, computed[0]) if len(computed) == 1 else None
    return (tensor, None) if factor is None else (computed[0], factor)


def _scaled(model: Model, product: NodeProto) -> tuple[NodeProto, float | None]:
    """The node behind a product that scales it, and the scale; the product itself where there is none."""
    tensor = product.output[0]
    use = model.only_use(tensor)
    factor = None if use is None else _factor(model, use.node, tensor)
    return (product, None) if use is None or factor is None else (use.node, factor)
