"""A shortcut around one convolution: added to its weights.

    Add(Conv(x, W, b), x)  ->  Conv(x, W + I, b)      I is 1 where an output channel meets its own input at the centre

Saves reading x a second time. Fires where the output of the Conv has the shape of its input and nothing else reads it;
any rank, groups, dilation and odd padding. Where the Conv is to be quantized, W + I has channels that the 1 dominates:
the codes of W become coarse. It must not touch an Add of anything but the convolution's own input.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node, only_reader, require_constants

STAGE, RANK = "float", 18  # no other rewrite depends on it; initializers are written in this order
NOT_FOR = {"tensorrt": "TensorRT adds a shortcut inside the convolution, and the codes of W + I are coarse"}


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Fold shortcuts around single convolutions; fires on the Conv, which then makes the output of its Add."""
    return each_node(model, only, ["Conv"], _fold)


def _fold(model: Model, edit: Edit, conv: NodeProto) -> None:
    add = only_reader(model, conv.output[0])
    if add.op_type != "Add" or add.domain or set(add.input) != {conv.input[0], conv.output[0]}:
        raise Unfit(f"its result is read by {add.op_type} {add.name!r}, which does not add what the convolution reads")
    tap = _own_tap(model, conv)
    weight = model.array(conv.input[1]).copy()
    channels = np.arange(weight.shape[0])
    weight[(channels, channels % weight.shape[1], *tap)] += 1
    wanted = edit.constant(f"{conv.input[1]}_shortcut", weight)
    edit.replace(conv, [])
    edit.replace(add, [altered(conv, {1: wanted}, add.output[0])], conv)


def _own_tap(model: Model, conv: NodeProto) -> tuple[int, ...]:
    """The kernel position at which every output reads the input of its own place; `Unfit` where there is none."""
    require_constants(model, conv)
    outputs, inputs, *kernel = model.initializers[conv.input[1]].dims
    ones = [1] * len(kernel)
    dilations = attribute_value(conv, "dilations", ones)
    pads = attribute_value(conv, "pads", [0] * 2 * len(kernel))
    begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    automatic = attribute_value(conv, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    if automatic or any(b % d for b, d in zip(begins, dilations, strict=True)):
        raise Unfit("it says auto_pad, or its padding is no multiple of its dilation")
    same = all(b + e == d * (k - 1) for b, e, d, k in zip(begins, ends, dilations, kernel, strict=True))
    wide = inputs * attribute_value(conv, "group", 1) != outputs
    if not same or wide or attribute_value(conv, "strides", ones) != ones:
        raise Unfit("its output has not the shape of its input")
    return tuple(b // d for b, d in zip(begins, dilations, strict=True))
