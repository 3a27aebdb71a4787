"""A Slice in a Loop whose place depends on the turn, as a Gather of the same elements.

    Slice(x, turn * c + k, turn * c + k + c)     becomes     Gather(x, turn * c + k + [0 .. c - 1])

TensorRT-RTX 1.7.1 fails on such a Slice ("makeScopeNodesContiguous", whatever the trip count), and compiles the Gather.
A Slice that ends beyond the tensor is shorter, which a Gather is not: so c is 1, as in x[t:t+1], or divides the size of
the axis. It must not touch a Slice with steps, or with bounds from anything else than the number of the turn.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import all_nodes, bodies
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node

STAGE, RANK = "prepared", 9

_SAME = ("Unsqueeze", "Squeeze", "Reshape", "Identity", "Cast")


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Put Gather in the place of Slice; fires on those in bodies."""
    loops = [node for node in all_nodes(model.graph) if node.op_type == "Loop" and not node.domain]
    counters = {body.input[0].name for node in loops for body in bodies(node)}
    if not counters:
        return Rewritten(model=model, fired=())
    return each_node(
        model, only, ["Slice"], lambda model, edit, node: _gather(model, edit, node, counters), inside=True
    )


def _gather(model: Model, edit: Edit, node: NodeProto, counters: Collection[str]) -> None:
    start, end = (_place(model, name) for name in node.input[1:3])
    axes, steps = (model.held(name) for name in [*node.input[3:], "", ""][:2])
    if start is None or end is None or start[0] != end[0] or start[1] < 0:
        raise Unfit("its bounds do not lie a constant number of elements apart")
    if not _counts(model, start[0], counters):
        raise Unfit("its bounds are not computed of the number of a turn alone")
    if axes is None or axes.size != 1 or (steps is not None and steps.item() != 1):
        raise Unfit("it does not take every element along one axis")
    count, axis = end[1] - start[1], int(axes.item())
    sizes = model.sizes(node.input[0])
    if count < 1 or (count > 1 and (sizes is None or sizes[axis] % count)):
        raise Unfit("it may end beyond the tensor")
    index, nodes = node.input[1], list[NodeProto]()
    if count > 1:
        steps_of, nodes = edit.small(f"{node.name}_elements", np.arange(count), node)
        nodes.append(edit.node("Add", [index, steps_of], f"{node.name}_indices"))
        index = nodes[-1].output[0]
    nodes.append(edit.node("Gather", [node.input[0], index], f"{node.name}_Gather", node.output[0], axis=axis))
    edit.replace(node, nodes)


def _place(model: Model, name: str) -> tuple[str, int] | None:
    """A bound as a tensor and a number that is added to it; None where it is constant."""
    offset = 0
    while (node := model.producer(name)) is not None:
        added = [model.held(other) for other in node.input] if node.op_type == "Add" else []
        if node.op_type in _SAME:
            name = node.input[0]
        elif node.op_type == "Add" and sum(v is not None and v.size == 1 for v in added) == 1:
            constant = next(v for v in added if v is not None)
            offset += int(constant.item())
            name = node.input[0] if added[0] is None else node.input[1]
        else:
            break
    return None if model.held(name) is not None else (name, offset)


def _counts(model: Model, name: str, counters: Collection[str]) -> bool:
    """Whether a tensor is the number of a turn, or a positive multiple of it."""
    while name not in counters:
        node = model.producer(name)
        if node is None:
            return False
        values = [model.held(other) for other in node.input]
        if node.op_type == "Mul" and sum(v is not None and v.size == 1 and v.item() > 0 for v in values) == 1:
            name = node.input[0] if values[0] is None else node.input[1]
        elif node.op_type in _SAME:
            name = node.input[0]
        else:
            return False
    return True
