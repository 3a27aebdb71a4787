"""A quantizer behind Concat moved before it where a part is quantized in the same way already.

    DQ(Q(Pad(Concat(a, b)) - c))  ->  Concat(DQ(Q(Pad(a) - c)), DQ(Q(Pad(b) - c)))

The skip connection of a U-Net is read by a convolution on its level and by a Concat further down. With a padded and
shifted quantizer behind each, TensorRT-RTX 1.7.1 keeps the connection in FP16 too, writes and reads it again; with both
before the Concat it is one INT8 tensor (measured: SM89). Codes are the same. Fires on quantizers of one scale for all
parts and with the same numbers (`placement` ties them). It must not touch a quantizer that pads along that axis.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
from onnx import NodeProto, helper

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "quantized", 20  # no other rewrite depends on it; initializers are written in this order
NOT_FOR = {"tensorrt": "TensorRT clones a quantizer behind Concat into its inputs itself"}

STEPS = ("Pad", "Cast", "Sub", "QuantizeLinear", "DequantizeLinear")  # what a quantizer is made of


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Quantize the parts of a Concat; fires on it."""
    place = {node.name: index for index, node in enumerate(model.graph.node)}
    return each_node(model, only, ["Concat"], partial(_quantize_parts, place=place))


def _quantize_parts(model: Model, edit: Edit, concat: NodeProto, place: dict[str, int]) -> None:
    """Move each quantizer that reads a Concat before it, if it can be; `place` of each node in the graph."""
    reason: str | None = "no quantizer of one scale reads its result"
    for use in model.consumers(concat.output[0]):
        steps = _quantizer(model, use.node) if use.index == 0 else []
        if not steps or not _elementwise(model, steps, concat):
            continue
        last = steps[-1]
        made = [_alike(model, part, steps, place[last.name], place) for part in concat.input]
        if not any(made):
            reason = reason and f"no part of it is quantized by the same numbers as {last.name!r}, and before that"
            continue
        reason = None
        new: list[NodeProto] = []
        for index, part in enumerate(concat.input):
            for step in () if made[index] else steps:
                name, part = edit.name(f"{step.name}_part"), part if step is steps[0] else new[-1].output[0]
                new.append(altered(step, {0: part}, name))
                new[-1].name = name
            made[index] = made[index] or new[-1].output[0]
        axis = attribute_value(concat, "axis", 0)
        new.append(helper.make_node("Concat", made, [last.output[0]], edit.name(f"{concat.name}_codes"), axis=axis))
        for step in steps[:-1]:
            edit.replace(step, [], concat)
        edit.replace(last, new, concat)
    if reason:
        raise Unfit(reason)


def _quantizer(model: Model, first: NodeProto) -> list[NodeProto]:
    """The nodes from `first` to DequantizeLinear, each the only reader of the one before; none for anything else."""
    steps = [first]
    while steps[-1].op_type in STEPS and not steps[-1].domain:
        if any(not model.is_constant(t) for t in steps[-1].input[1:] if t):
            return []
        if steps[-1].op_type == "DequantizeLinear":
            return steps if any(s.op_type == "QuantizeLinear" for s in steps) else []
        use = model.only_use(steps[-1].output[0])
        if use is None or use.index != 0:
            return []
        steps.append(use.node)
    return []


def _elementwise(model: Model, steps: list[NodeProto], concat: NodeProto) -> bool:
    """Whether the steps do the same to every slice along the axis of a Concat."""
    for step in steps:
        if step.op_type == "Pad":
            pads = model.array(step.input[1])
            rank = pads.size // 2
            if len(step.input) > 3 and step.input[3]:
                return False
            axis = attribute_value(concat, "axis", 0) % rank
            if pads[axis] or pads[axis + rank]:
                return False
        elif any(np.prod(model.initializers[t].dims) != 1 for t in step.input[1:] if t):
            return False
    return True


def _alike(model: Model, part: str, steps: list[NodeProto], before: int, place: dict[str, int]) -> str:
    """The output of the same steps on a part, made before a place in the graph; "" where there are none."""
    for use in model.consumers(part):
        others = _quantizer(model, use.node) if use.index == 0 else []
        if len(others) == len(steps) and all(_same(model, *pair) for pair in zip(steps, others, strict=True)):
            return others[-1].output[0] if place[others[-1].name] < before else ""
    return ""


def _same(model: Model, one: NodeProto, other: NodeProto) -> bool:
    """Whether two steps compute the same from their first inputs."""
    if one.op_type != other.op_type or len(one.input) != len(other.input):
        return False
    if sorted(a.SerializeToString() for a in one.attribute) != sorted(a.SerializeToString() for a in other.attribute):
        return False
    pairs = [(a, b) for a, b in zip(one.input[1:], other.input[1:], strict=True) if a != b]
    values = [(model.array(a), model.array(b)) for a, b in pairs if a and b]
    return len(values) == len(pairs) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in values)
