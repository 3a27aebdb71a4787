"""MatMul of tensors with four axes or more, and the arithmetic behind it, on matrices.

    MatMul(x, W) + b     x of (8, 56, 56, 96)  ->  Reshape(MatMul(Reshape(x), W) + b)     x of (25088, 96)

TensorRT-RTX 1.7.1 takes bias and activation into the product where it reads a matrix, and leaves them to another pass
over the result where it reads more axes (measured, SM89). What follows elementwise goes along, so that no Reshape comes
between, if its other operands are constants along the last axis or flat as well. It must not touch weights of more
than two axes, or tensors of which two sizes are dynamic.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from onnx import NodeProto

from engines.core.operators import family
from qdq.model.model import Model
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered

STAGE, RANK = "float", 50  # behind all: it takes along what they made elementwise, as Gelu, and they look for the rest
NOT_FOR = {"tensorrt": "TensorRT takes bias and activation into products of any rank"}

LEAST_AXES = 4
ELEMENTWISE = family(
    "Abs Add Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Mul Neg Pow Reciprocal Relu Sigmoid Softplus "
    "Sqrt Sub Tanh"
)


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Flatten what MatMul nodes with constant matrices read; fires on those."""
    edit = Edit(model, only)
    products: set[str] = set()
    edit.each(["MatMul"], lambda node: products.add(_require_flat(model, node).name))
    flat: dict[str, str] = {}  # tensor -> the name of its matrix
    origin: dict[str, NodeProto] = {}  # tensor of `flat` -> the product that it comes from
    for node in model.graph.node:
        follows = next((t for t in node.input if t in flat), "") if _follows(model, node, flat) else ""
        if node.name in products or follows:
            origin[node.output[0]] = origin[follows] if follows and node.name not in products else node
            flat[node.output[0]] = edit.name(f"{node.output[0]}_flat")
    entered: dict[str, str] = {}  # tensor from outside -> the name of its matrix
    for node in [n for n in model.graph.node if n.output and n.output[0] in flat]:
        output = node.output[0]
        copy = altered(node, output=flat[output])
        new = []
        for index, tensor in enumerate(node.input):
            if tensor in flat:
                copy.input[index] = flat[tensor]
            elif model.is_constant(tensor):
                copy.input[index] = tensor if node.name in products else _row(model, edit, tensor)
            elif tensor:
                if tensor not in entered:
                    new.append(_reshaped(model, edit, tensor, tensor))
                    entered[tensor] = new[-1].output[0]
                copy.input[index] = entered[tensor]
        new.append(copy)
        inside = (use.index >= 0 and use.node.output[0] in flat for use in model.consumers(output))
        if model.is_output(output) or not all(inside):
            new.append(_reshaped(model, edit, flat[output], output, output))
        edit.replace(node, new, origin[output])
    return edit.finish()


def _sizes(model: Model, tensor: str) -> list[int] | None:
    """The sizes of a tensor, -1 for a dynamic one; None if two are, or the last one, or any is zero."""
    info = model.info(tensor)
    if info is None or not info.shape:
        return None
    sizes = [size if isinstance(size, int) else -1 for size in info.shape]
    return sizes if sizes.count(-1) <= 1 and sizes[-1] > 0 and 0 not in sizes else None


def _require_flat(model: Model, node: NodeProto) -> NodeProto:
    """A MatMul itself, if it multiplies a computed tensor of enough axes with a constant matrix."""
    if model.is_constant(node.input[0]) or not model.is_constant(node.input[1]):
        raise Unfit("it does not multiply a computed tensor with a constant one")
    before, after = (_sizes(model, t) for t in (node.input[0], node.output[0]))
    if len(model.initializers[node.input[1]].dims) != 2:
        raise Unfit("its weight is no matrix")
    if before is None or after is None:
        raise Unfit("two sizes of what it reads or makes are dynamic, or the last one, or one is zero")
    if len(before) < LEAST_AXES:
        raise Unfit(f"what it reads has {len(before)} axes; from {LEAST_AXES} on it pays")
    return node


def _follows(model: Model, node: NodeProto, flat: Mapping[str, str]) -> bool:
    """Whether an elementwise node reads nothing but flat tensors, as large as its result, and constants per column."""
    if node.op_type not in ELEMENTWISE or node.domain or not any(t in flat for t in node.input):
        return False
    made = model.info(node.output[0])
    for tensor in filter(None, node.input):
        info = model.info(tensor)
        if tensor in flat:
            if info is None or made is None or info.shape != made.shape:
                return False
        elif not model.is_constant(tensor) or any(d != 1 for d in model.initializers[tensor].dims[:-1]):
            return False
    return True


def _row(model: Model, edit: Edit, constant: str) -> str:
    """A constant that has one axis at most."""
    if len(model.initializers[constant].dims) <= 1:
        return constant
    return edit.constant(f"{constant}_row", model.array(constant).reshape(-1))


def _reshaped(model: Model, edit: Edit, source: str, like: str, output: str = "") -> NodeProto:
    """A Reshape to the sizes of a tensor, or to a matrix where no output is named."""
    sizes, name = _sizes(model, like) or [], f"{like}_{'axes' if output else 'matrix'}"
    shape = edit.constant(name, np.array(sizes if output else [-1, sizes[-1]], np.int64))
    return edit.node("Reshape", [source, shape], name, output)
