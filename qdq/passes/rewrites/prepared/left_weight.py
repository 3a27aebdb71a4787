"""A product whose constant operand stands on the left, where no quantizer reads a weight: on the right.

    MatMul(W, x)            ->  Transpose(MatMul(Transpose(x), W^T))
    Gemm(W, x, C)           ->  Transpose(Gemm(Transpose(x), W^T)) + C         C of one column becomes the bias

Transposes that meet vanish (`passes.transposes`); the compiler takes others into its kernels: TensorRT-RTX 1.7.1 has as
many for the float model as before. It must not touch the scores of attention (learned queries times keys), whose form
the fused kernel needs, products of integers, or a weight that is a vector.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.attention.scores import weighs_values
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node

STAGE, RANK = "prepared", 2

FLOATS = ("float32", "float16", "bfloat16")


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Put the weight on the right; the product keeps its name."""
    return each_node(model, only, ["MatMul", "Gemm"], _swap, inside=True)


def _swap(model: Model, edit: Edit, node: NodeProto) -> None:
    weight, data = node.input[:2]
    if not model.is_constant(weight) or model.is_constant(data):
        raise Unfit("its left operand is not the constant one")
    rank = model.rank(data)
    if len(model.initializers[weight].dims) < 2 or rank is None:
        raise Unfit("its weight is a vector, or the rank of its data is not known")
    if model.dtype(weight) not in FLOATS:
        raise Unfit(f"its weight is {model.dtype(weight)}")
    if weighs_values(model, node.output[0]):
        raise Unfit("it makes the scores of attention")
    (_gemm if node.op_type == "Gemm" else _matmul)(model, edit, node, rank)


def _matmul(model: Model, edit: Edit, node: NodeProto, rank: int) -> None:
    weight, data = node.input
    turned = edit.constant(f"{weight}_transposed", model.array(weight).swapaxes(-1, -2))
    if rank == 1:
        product = edit.node("MatMul", [data, turned], node.name, node.output[0])
        product.name = node.name
        return edit.replace(node, [product])
    before = _transpose(edit, f"{node.name}_data", data, rank)
    product = edit.node("MatMul", [before.output[0], turned], f"{node.name}_product")
    product.name = node.name
    result = max(rank, len(model.initializers[weight].dims))
    edit.replace(node, [before, product, _transpose(edit, f"{node.name}_result", product.output[0], result, node)])


def _gemm(model: Model, edit: Edit, node: NodeProto, rank: int) -> None:
    weight, data = node.input[:2]
    added = node.input[2] if len(node.input) > 2 else ""
    before = [] if attribute_value(node, "transB", 0) else [_transpose(edit, f"{node.name}_data", data, rank)]
    inputs = [before[0].output[0] if before else data, weight]
    beta = attribute_value(node, "beta", 1.0)
    bias = _bias(model, added, model.array(weight).shape[1 if attribute_value(node, "transA", 0) else 0])
    if bias is not None:
        inputs.append(edit.constant(f"{added}_bias", bias))
    turn, alpha = 1 - attribute_value(node, "transA", 0), attribute_value(node, "alpha", 1.0)
    product = edit.node("Gemm", inputs, f"{node.name}_product", transB=turn, alpha=alpha, beta=beta)
    product.name = node.name
    if bias is not None or not added:
        return edit.replace(
            node, [*before, product, _transpose(edit, f"{node.name}_result", product.output[0], 2, node)]
        )
    result = _transpose(edit, f"{node.name}_result", product.output[0], 2)
    scaled = []
    if beta != 1:
        factor = edit.constant(f"{node.name}_beta", np.array(beta, model.dtype(weight)))
        scaled = [edit.node("Mul", [added, factor], f"{node.name}_scaled")]
    total = edit.node(
        "Add", [result.output[0], scaled[0].output[0] if scaled else added], f"{node.name}_sum", node.output[0]
    )
    edit.replace(node, [*before, product, result, *scaled, total])


def _bias(model: Model, added: str, rows: int) -> np.ndarray | None:
    """The summand of a Gemm as a bias of the transposed one: (rows,), None where it is none or differs by column."""
    if not added or not model.is_constant(added):
        return None
    values = model.array(added)
    whole = values.reshape((1,) * (2 - values.ndim) + values.shape)
    return np.broadcast_to(whole[:, 0], (rows,)) if whole.shape[1] == 1 else None


def _transpose(edit: Edit, wanted: str, tensor: str, rank: int, of: NodeProto | None = None) -> NodeProto:
    """A Transpose of the last two axes; it makes the output of a node, if one is given."""
    perm = [*range(rank - 2), rank - 1, rank - 2]
    return edit.node("Transpose", [tensor], wanted, of.output[0] if of else "", perm=perm)
