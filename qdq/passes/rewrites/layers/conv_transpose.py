"""Transposed convolution as a convolution, which has INT8 kernels where the transposed one has none.

    ConvTranspose  ->  Conv to prod(stride) * C channels, stride 1  ->  channels moved to space

Output position stride * q + r (phase r) sums the kernel taps j = (r + pad) mod stride + stride * t times the input at
q + (r + pad) // stride - t. Each phase becomes C channels of one Conv over all offsets that a phase needs; taps that a
phase lacks are zero. Kernel = stride: a 1 x 1 Conv without a zero. The shuffle is DepthToSpace in 2-D, else Reshape,
Transpose, Reshape; it fuses with Relu and Q. Fires on group 1 and outputs that are stride * (input + constant) long.
It must not touch any other operator.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node, require_constants

STAGE, RANK = "float", 20  # behind norm_bias and norm_channels, which look for ConvTranspose: phases multiply channels
NOT_FOR = {"tensorrt": "TensorRT moves the channels of an INT8 convolution to space in a kernel of its own"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One spatial axis: `taps[phase, offset]` is an index into the kernel, or its length for a zero."""

    taps: np.ndarray
    before: int
    after: int


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Write ConvTranspose with constant weights as Conv, which takes its name, and a shuffle."""
    return each_node(model, only, ["ConvTranspose"], _convolve)


def _axes(model: Model, node: NodeProto) -> list[Axis]:
    """How each axis decomposes; `Unfit` where the node is to stay."""
    require_constants(model, node)
    if (group := attribute_value(node, "group", 1)) != 1:
        raise Unfit(f"it has {group} groups, not one")
    rank = len(kernel := model.initializers[node.input[1]].dims[2:])
    ones, zeros = [1] * rank, [0] * rank
    strides, pads = attribute_value(node, "strides", ones), attribute_value(node, "pads", zeros + zeros)
    extra = attribute_value(node, "output_padding", zeros)
    automatic = attribute_value(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    if automatic or any(a.name == "output_shape" for a in node.attribute):
        raise Unfit("it says auto_pad or output_shape")
    if strides == ones:  # else it has no dilation: `strided_dilation` has put that into the weight
        raise Unfit("its stride is 1")
    return [_axis(*a) for a in zip(kernel, strides, pads[:rank], pads[rank:], extra, strict=True)]


def _axis(kernel: int, stride: int, begin: int, end: int, extra: int) -> Axis:
    """The taps of one axis; `Unfit` where the output is no multiple of the stride, or the Conv would have to crop."""
    longer, odd = divmod(kernel - stride + extra - begin - end, stride)  # output = stride * (input + longer)
    phases = [(r, j) for r in range(stride) for j in range((r + begin) % stride, kernel, stride)]
    reach = {(r, (r + begin - j) // stride): j for r, j in phases}  # (phase, offset): tap
    first, last = min(d for _, d in reach), max(d for _, d in reach)
    after = longer + last
    if odd or first > 0 or after < 0:
        raise Unfit(f"its output is not {stride} * (input + constant) long, or cropped beyond the reach of the kernel")
    taps = [[reach.get((r, d), kernel) for d in range(first, last + 1)] for r in range(stride)]
    return Axis(taps=np.array(taps), before=-first, after=after)


def _convolve(model: Model, edit: Edit, node: NodeProto) -> None:
    """Conv and shuffle in place of one node."""
    axes, weight = _axes(model, node), model.array(node.input[1])
    rank, channels = len(axes), weight.shape[1]
    wide = np.pad(weight, [(0, 0), (0, 0), *[(0, 1)] * rank])
    for number, axis in enumerate(axes):  # (input, output, phase, offset, phase, offset, ...)
        wide = np.take(wide, axis.taps, axis=2 + 2 * number)
    phases, offsets = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    wide = wide.transpose(*phases, 1, 0, *offsets)
    strides = [len(a.taps) for a in axes]
    wide = wide.reshape(-1, *wide.shape[rank + 1 :])
    inputs = [node.input[0], edit.constant(f"{node.input[1]}_phases", wide)]
    if len(node.input) > 2 and node.input[2]:
        bias = np.tile(model.array(node.input[2]), int(np.prod(strides)))
        inputs.append(edit.constant(f"{node.input[2]}_phases", bias))
    pads = [a.before for a in axes] + [a.after for a in axes]
    conv = edit.node("Conv", inputs, f"{node.name}_Conv", kernel_shape=wide.shape[2:], pads=pads)
    conv.name = node.name
    source, output = conv.output[0], node.output[0]
    if rank == 2 and strides[0] == strides[1]:
        shuffle = edit.node("DepthToSpace", [source], f"{node.name}_DepthToSpace", output, blocksize=strides[0])
        return edit.replace(node, [conv, shuffle])
    order = [0, rank + 1, *(i for axis in range(rank) for i in (rank + 2 + axis, 1 + axis))]
    apart, joined, shapes = _targets(model, edit, node, source, channels, axes)
    split = edit.node("Reshape", [source, apart], f"{node.name}_split")
    turn = edit.node("Transpose", [split.output[0]], f"{node.name}_Transpose", perm=order)
    join = edit.node("Reshape", [turn.output[0], joined], f"{node.name}_join", output)
    edit.replace(node, [conv, *shapes, split, turn, join])


def _targets(
    model: Model, edit: Edit, node: NodeProto, source: str, channels: int, axes: list[Axis]
) -> tuple[str, str, list[NodeProto]]:
    """Targets of the two Reshapes: constants, or computed by the nodes returned where a spatial size is dynamic."""
    strides = [len(a.taps) for a in axes]
    sizes = model.sizes(node.input[0], 2)
    if sizes is not None:
        grid = np.array([d + a.before + a.after - a.taps.shape[1] + 1 for d, a in zip(sizes, axes, strict=True)])
        apart = edit.constant(f"{node.name}_apart", np.array([0, *strides, channels, *grid], np.int64))
        return apart, edit.constant(f"{node.name}_joined", np.array([0, channels, *grid * strides], np.int64)), []
    steps = edit.constant(f"{node.name}_strides", np.array(strides, np.int64))
    phases = edit.constant(f"{node.name}_phases", np.array([0, *strides, channels], np.int64))
    copied = edit.constant(f"{node.name}_channels", np.array([0, channels], np.int64))
    shape = edit.node("Shape", [source], f"{node.name}_Shape", start=2)
    apart_node = edit.node("Concat", [phases, shape.output[0]], f"{node.name}_apart", axis=0)
    size = edit.node("Mul", [shape.output[0], steps], f"{node.name}_size")
    joined = edit.node("Concat", [copied, size.output[0]], f"{node.name}_joined", axis=0)
    return apart_node.output[0], joined.output[0], [shape, apart_node, size, joined]
