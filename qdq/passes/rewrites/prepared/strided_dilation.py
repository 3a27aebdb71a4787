"""A transposed convolution with both strides and dilations, which the compiler has no kernel for: without dilation.

    weight w0 w1 w2, dilation 2   ->  weight w0 0 w1 0 w2, dilation 1        the same taps at the same places

TensorRT-RTX 1.7.1 ends with "Strided & Dilated Deconv are currently not supported" and names no node, also where one
axis has the stride and another the dilation. It must not touch one that has strides or dilations alone.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto, helper

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.draft import assign
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "prepared", 7


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Write the dilation of a strided ConvTranspose into its weight."""
    return each_node(model, only, ["ConvTranspose"], _widen)


def _widen(model: Model, edit: Edit, node: NodeProto) -> None:
    strides, dilations = (attribute_value(node, name, [1]) for name in ("strides", "dilations"))
    if max(strides) == 1 or max(dilations) == 1:
        raise Unfit("it has strides or dilations alone, or neither")
    if not model.is_constant(node.input[1]):
        raise Unfit("its weight is computed")
    weight = model.array(node.input[1])
    kernel = [(size - 1) * d + 1 for size, d in zip(weight.shape[2:], dilations, strict=True)]
    wide = np.zeros((*weight.shape[:2], *kernel), weight.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, d) for d in dilations))] = weight
    copy = altered(node, {1: edit.constant(f"{node.input[1]}_dilated", wide)})
    kept = [a for a in copy.attribute if a.name not in ("dilations", "kernel_shape")]
    assign(copy.attribute, [*kept, helper.make_attribute("kernel_shape", kernel)])
    edit.replace(node, [copy])
