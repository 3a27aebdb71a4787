"""A constant per channel that InstanceNormalization takes away again: dropped.

    InstanceNormalization(Conv(x, W, b))  ->  InstanceNormalization(Conv(x, W))      ConvTranspose and Add(x, b) too

The mean of a channel moves with the constant and is subtracted. It must not touch a tensor that anything else reads.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import NodeProto

from qdq.model.model import Model
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "float", 10  # before norm_one_channel and norm_channels: a bias that goes needs no zeros


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Drop biases in front of InstanceNormalization; fires on the nodes that lose theirs."""
    return each_node(model, only, ("Conv", "ConvTranspose"), _drop)


def _drop(model: Model, edit: Edit, node: NodeProto) -> None:
    if not any(node.input[2:]):
        raise Unfit("it has no bias")
    uses = model.consumers(node.output[0])
    readers = [u.index == 0 and u.node.op_type == "InstanceNormalization" and not u.node.domain for u in uses]
    if not readers or not all(readers) or model.is_output(node.output[0]):
        raise Unfit(f"{node.output[0]!r} is not read by InstanceNormalization alone")
    bare = altered(node)
    del bare.input[2:]
    edit.replace(node, [bare])
