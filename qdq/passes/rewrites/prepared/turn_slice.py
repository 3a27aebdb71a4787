"""A Slice in a Loop whose place depends on the turn, as a Gather of the same elements.

    Slice(x, turn * m + k, turn * m + k + c)     becomes     Gather(x, turn * m + k + [0 .. c - 1])

TensorRT-RTX 1.7.1 fails on such a Slice ("makeScopeNodesContiguous", whatever the trip count), and compiles the Gather.
A Slice that ends beyond the tensor is shorter, which a Gather is not: so either it takes one element, as x[t:t+1], or
parts that divide the axis, or the last turn is known not to go beyond. It must not touch a Slice with steps, or with
bounds from anything else than the number of the turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from onnx import NodeProto, TensorProto

from qdq.model.model import Model
from qdq.model.nodes import all_nodes, bodies
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node

STAGE, RANK = "prepared", 9

ENDLESS = 2**31  # turns that a loop which something else ends may be given
_SAME = ("Unsqueeze", "Squeeze", "Reshape", "Identity", "Cast")


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Put Gather in the place of Slice; fires on those in bodies."""
    loops = [node for node in all_nodes(model.graph) if node.op_type == "Loop" and not node.domain]
    counters = {body.input[0].name: model.held(node.input[0]) for node in loops for body in bodies(node)}
    if not counters:
        return Rewritten(model=model, fired=())
    return each_node(
        model, only, ["Slice"], lambda model, edit, node: _gather(model, edit, node, counters), inside=True
    )


def _gather(model: Model, edit: Edit, node: NodeProto, counters: Mapping[str, np.ndarray | None]) -> None:
    start, end = (_place(model, name) for name in node.input[1:3])
    axes, steps = (model.held(name) for name in [*node.input[3:], "", ""][:2])
    if start is None or end is None or start[0] != end[0] or start[1] < 0:
        raise Unfit("its bounds do not lie a constant number of elements apart")
    counted = _counted(model, start[0], counters)
    if counted is None:
        raise Unfit("its bounds are not computed of the number of a turn alone")
    if axes is None or axes.size != 1 or (steps is not None and steps.item() != 1):
        raise Unfit("it does not take every element along one axis")
    count, axis = end[1] - start[1], int(axes.item())
    info, (trip, factor) = model.info(node.input[0]), counted
    size = info.shape[axis] if info is not None and info.shape is not None else None
    fits = _fits(size, count, factor, start[1], trip) if isinstance(size, int) else None
    if count < 1 or (not fits and (count > 1 or (fits is False and trip is not None and trip.item() < ENDLESS))):
        raise Unfit("it may end beyond the tensor")
    index, nodes = node.input[1], list[NodeProto]()
    if count > 1:
        if (place := model.info(index)) is None or place.dtype != "int64":
            nodes.append(edit.node("Cast", [index], f"{node.name}_start", to=TensorProto.INT64))
            index = nodes[-1].output[0]
        steps_of, made = edit.small(f"{node.name}_elements", np.arange(count), node)
        nodes += made
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


def _counted(
    model: Model, name: str, counters: Mapping[str, np.ndarray | None]
) -> tuple[np.ndarray | None, int] | None:
    """The trip count, where it is constant, and the factor, where a tensor is a multiple of the number of a turn."""
    factor = 1
    while name not in counters:
        node = model.producer(name)
        if node is None:
            return None
        values = [model.held(other) for other in node.input]
        factors = [v for v in values if v is not None and v.size == 1 and v.item() > 0]
        if node.op_type == "Mul" and len(factors) == 1:
            factor *= int(factors[0].item())
            name = node.input[0] if values[0] is None else node.input[1]
        elif node.op_type in _SAME:
            name = node.input[0]
        else:
            return None
    return counters[name], factor


def _fits(size: int, count: int, factor: int, offset: int, trip: np.ndarray | None) -> bool:
    """Whether no part that begins in a tensor ends beyond it."""
    if trip is not None:
        return (int(trip.item()) - 1) * factor + offset + count <= size
    return size % count == factor % count == offset % count == 0
