"""InstanceNormalization behind a 1 x 1 convolution of one channel: the one channel is normalized, the others follow.

    IN(Conv(x, w, b), g, h)  ->  (x - mean x) * f + h      f_c = g_c w_c / sqrt(w_c^2 var x + epsilon)

Every output channel is the input times w_c, so mean and variance of the C channels are those of one. Convolution and
norm of C channels, two passes over the widest tensors of a network for one-channel images, become a pointwise operation
that fuses with what follows. It must not touch convolutions with more taps, input channels or another stride.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node, require_constants

STAGE, RANK = "float", 12  # before norm_channels: a norm that goes needs no more channels

EPSILON = 1e-5  # InstanceNormalization's default


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Normalize one channel instead of its multiples; fires on the norm."""
    return each_node(model, only, ["InstanceNormalization"], _pointwise)


def _one_channel(model: Model, norm: NodeProto) -> NodeProto:
    """The convolution before a norm, if it multiplies one channel by constants."""
    conv = model.producer(norm.input[0])
    if conv is None or conv.op_type != "Conv" or conv.domain:
        raise Unfit("no Conv makes what it reads")
    require_constants(model, conv)
    require_constants(model, norm)
    dims = model.initializers[conv.input[1]].dims
    one = all(s == 1 for s in attribute_value(conv, "strides", [1])) and not any(attribute_value(conv, "pads", [0]))
    if any(d != 1 for d in dims[1:]) or attribute_value(conv, "group", 1) != 1 or not one or len(dims) <= 2:
        what = f"Conv {conv.name!r} before it, with a weight of {list(dims)},"
        raise Unfit(f"{what} does not multiply one channel by numbers, or has a stride or padding")
    return conv


def _pointwise(model: Model, edit: Edit, norm: NodeProto) -> None:
    conv = _one_channel(model, norm)
    weight, gain, shift = (model.array(t) for t in (conv.input[1], *norm.input[1:]))
    dtype, along = weight.dtype, (1, -1, *(1,) * (weight.ndim - 2))
    wide = weight.astype(np.float64).reshape(along)

    def constant(wanted: str, values: np.ndarray) -> str:
        return edit.constant(f"{norm.name}_{wanted}", np.asarray(values).astype(dtype))

    axes = edit.constant(f"{norm.name}_axes", np.arange(2, weight.ndim))
    factor = constant("factor", wide * gain.astype(np.float64).reshape(along))
    square, epsilon = constant("square", wide**2), constant("epsilon", attribute_value(norm, "epsilon", EPSILON))
    steps: list[NodeProto] = []

    def step(op_type: str, *inputs: str, output: str = "") -> str:
        steps.append(edit.node(op_type, inputs, f"{norm.name}_{op_type}", output))
        return str(steps[-1].output[0])

    centred = step("Sub", conv.input[0], step("ReduceMean", conv.input[0], axes))
    variance = step("ReduceMean", step("Mul", centred, centred), axes)
    deviation = step("Sqrt", step("Add", step("Mul", variance, square), epsilon))
    scaled = step("Mul", centred, step("Div", factor, deviation))
    step("Add", scaled, edit.constant(f"{norm.name}_shift", shift.reshape(along)), output=norm.output[0])
    edit.replace(norm, steps)
