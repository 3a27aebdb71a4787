"""Channels before InstanceNormalization brought to a multiple of 8, from which the compiler normalizes in one kernel.

    InstanceNormalization(Conv(x, W))  ->  Slice(InstanceNormalization(Conv(x, W with zero channels)))      14 -> 16

Where the count is no multiple of 8, TensorRT-RTX 1.7.1 computes the norm in FP32 by three kernels that read and write
the tensor each (measured, SM89). The added channels are zero and cut off again; the cut fuses with what follows. Conv
and ConvTranspose of one group, without a bias or with a constant one. It must not touch a tensor that others read.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto

from qdq.graph import Model
from qdq.preparation import attribute_value
from qdq.surgery.rewritten import Edit, Rewritten

STAGE, RANK = "float", 15

MULTIPLE = 8


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Add zero channels between a convolution and its InstanceNormalization.

    Args:
        model: prepared float model.
        only: names of the InstanceNormalization nodes that may be changed; None for all.

    Returns:
        The model and the InstanceNormalization nodes fired on.
    """
    edit = Edit(model, only)
    for norm in edit.candidates("InstanceNormalization"):
        conv = model.producer(norm.input[0])
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose") or attribute_value(conv, "group", 1) != 1:
            continue
        constant = all(model.is_constant(t) for t in (*conv.input[1:], *norm.input[1:]))
        alone = len(model.consumers(conv.output[0])) == 1 and not model.is_output(conv.output[0])
        channels = model.array(norm.input[1]).shape[0] if constant else 0
        missing = -channels % MULTIPLE
        if not (missing and alone):
            continue
        edit.replace(conv, [_wider(model, edit, conv, 0 if conv.op_type == "Conv" else 1, missing)], norm)
        wide = _wider(model, edit, norm, 0, missing)
        wide.output[0] = edit.name(f"{norm.output[0]}_wide")
        bounds = {"start": 0, "end": channels, "axis": 1}
        cut = [edit.constant(f"{norm.name}_{key}", np.array([value], np.int64)) for key, value in bounds.items()]
        edit.replace(norm, [wide, edit.node("Slice", [wide.output[0], *cut], f"{norm.name}_Slice", norm.output[0])])
    return edit.finish()


def _wider(model: Model, edit: Edit, node: NodeProto, axis: int, missing: int) -> NodeProto:
    """The node with zeros added to its constants: along `axis` of a weight, at the end of a vector."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for index, name in enumerate(node.input[1:], 1):
        values = model.array(name)
        at = axis if values.ndim > 1 else 0
        amounts = [(0, missing if i == at else 0) for i in range(values.ndim)]
        copy.input[index] = edit.constant(f"{name}_wide", np.pad(values, amounts))
    return copy
