"""LayerNormalization that also makes its mean and deviation, as gradients need them: computed beside it.

    LayerNormalization(x) -> y, m, i   ->  LayerNormalization(x) -> y;  m = mean(x);  i = 1 / sqrt(mean((x - m)^2) + e)

TensorRT's parser takes the first output alone. The operator stays for it, so that it stays one kernel. Statistics are
float32, as the standard says. It must not compute what nothing reads.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto, TensorProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "prepared", 5


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Leave LayerNormalization one output, and compute the others with ReduceMean."""
    return each_node(model, only, ["LayerNormalization"], _apart)


def _apart(model: Model, edit: Edit, node: NodeProto) -> None:
    if not any(node.output[1:]):
        raise Unfit("it makes nothing but the normalized values")
    alone = altered(node)
    del alone.output[1:]
    mean, deviation = (name if name and _read(model, name) else "" for name in (*node.output[1:], "")[:2])
    if not mean and not deviation:
        return edit.replace(node, [alone])
    axis, rank = attribute_value(node, "axis", -1), model.rank(node.input[0])
    if axis >= 0 and rank is None:
        raise Unfit("the rank of what it normalizes is not known")
    axes = edit.constant(f"{node.name}_axes", np.arange(axis, 0) if axis < 0 else np.arange(axis, rank))
    source, nodes = node.input[0], []
    if model.dtype(source) != "float32":
        nodes.append(edit.node("Cast", [source], f"{node.name}_float", to=TensorProto.FLOAT))
        source = nodes[-1].output[0]
    nodes.append(edit.node("ReduceMean", [source, axes], f"{node.name}_mean", mean))
    if deviation:
        epsilon = edit.constant(f"{node.name}_epsilon", np.array(attribute_value(node, "epsilon", 1e-5), np.float32))
        centred = edit.node("Sub", [source, nodes[-1].output[0]], f"{node.name}_centred")
        square = edit.node("Mul", [centred.output[0]] * 2, f"{node.name}_square")
        variance = edit.node("ReduceMean", [square.output[0], axes], f"{node.name}_variance")
        raised = edit.node("Add", [variance.output[0], epsilon], f"{node.name}_raised")
        root = edit.node("Sqrt", [raised.output[0]], f"{node.name}_root")
        inverse = edit.node("Reciprocal", [root.output[0]], f"{node.name}_inverse", deviation)
        nodes += [centred, square, variance, raised, root, inverse]
    edit.replace(node, [*nodes, alone])


def _read(model: Model, tensor: str) -> bool:
    return bool(model.consumers(tensor)) or model.is_output(tensor)
