"""Transposes that follow each other, merged: what the rewrites that turn products leave behind."""

from __future__ import annotations

from onnx import NodeProto, helper

from qdq.model.nodes import attribute_value
from qdq.passes.draft import Draft, assign


def merge_transposes(draft: Draft) -> None:
    """Let a Transpose of a transposed tensor read what that one reads; two that undo each other become an Identity."""
    made: dict[str, NodeProto] = {}
    for node in draft.graph.node:
        if node.op_type != "Transpose" or node.domain:
            continue
        before = made.get(node.input[0])
        order = _order(draft, node)
        if before is not None and order is not None:
            order = [_order(draft, before)[i] for i in order]  # type: ignore[index]
            node.input[0] = before.input[0]
            assign(node.attribute, [helper.make_attribute("perm", order)])
        if order is not None and order == sorted(order):
            node.op_type = "Identity"
            assign(node.attribute, [])
        elif order is not None:
            made[node.output[0]] = node


def _order(draft: Draft, node: NodeProto) -> list[int] | None:
    """The order of the axes of a Transpose; None where it reverses an unknown number of them."""
    info = draft.info(node.input[0])
    rank = len(info.shape) if info is not None and info.shape is not None else None
    return attribute_value(node, "perm", None if rank is None else list(range(rank))[::-1])  # type: ignore[no-any-return]
