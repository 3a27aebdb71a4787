"""A constant per channel that InstanceNormalization takes away again: dropped.

    InstanceNormalization(Conv(x, W, b))  ->  InstanceNormalization(Conv(x, W))      ConvTranspose and Add(x, b) too

The mean of a channel moves with the constant and is subtracted. It must not touch a tensor that anything else reads.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import NodeProto

from qdq.model.model import Model
from qdq.passes.rewrites.edit import Edit, Rewritten

STAGE, RANK = "float", 10


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Drop biases in front of InstanceNormalization.

    Args:
        model: prepared float model.
        only: names of the nodes with a bias that may be changed; None for all.

    Returns:
        The model and the nodes that lost their bias.
    """
    edit = Edit(model, only)
    for node in edit.candidates("Conv", "ConvTranspose"):
        if len(node.input) > 2 and node.input[2] and _normalized(model, node.output[0]):
            copy = NodeProto()
            copy.CopyFrom(node)
            del copy.input[2:]
            edit.replace(node, [copy])
    return edit.finish()


def _normalized(model: Model, tensor: str) -> bool:
    """Whether every reader of a tensor is an InstanceNormalization."""
    uses = model.consumers(tensor)
    readers = [u.index == 0 and u.node.op_type == "InstanceNormalization" and not u.node.domain for u in uses]
    return bool(readers) and all(readers) and not model.is_output(tensor)
