"""Channels before InstanceNormalization brought to a multiple of 8, from which the compiler normalizes in one kernel.

    InstanceNormalization(Conv(x, W))  ->  Slice(InstanceNormalization(Conv(x, W with zero channels)))      14 -> 16

Where the count is no multiple of 8, TensorRT-RTX 1.7.1 computes the norm in FP32 by three kernels that read and write
the tensor each (measured, SM89). Where only pointwise operators lie between the norm and the convolutions that read
it, those take the wide tensor, with zero weights for what was added; else it is cut to size, and the cut fuses with
what follows. Conv and ConvTranspose of one group, a bias constant. It must not touch a tensor that others read.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
from onnx import NodeProto

from engines.core.operators import family
from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node, only_reader, require_constants

STAGE, RANK = "float", 15  # behind norm_bias and norm_one_channel, which leave less to widen; before conv_transpose
NOT_FOR = {"tensorrt": "TensorRT has kernels for normalizations of any number of channels"}

MULTIPLE = 8
# finite at 0, where the added channels are
FINITE = family("Relu LeakyRelu PRelu Elu Selu Sigmoid Tanh Erf Gelu HardSwish Clip Add Sub Mul Div Neg Abs")


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Add zero channels between a convolution and its InstanceNormalization; fires on the norm."""
    return each_node(model, only, ["InstanceNormalization"], partial(_widen, made={}))


def _widen(model: Model, edit: Edit, norm: NodeProto, made: dict[str, NodeProto]) -> None:
    """Widen one norm; `made` holds the newest form of a node: two norms may widen the two ends of one Conv."""
    conv = model.producer(norm.input[0])
    if conv is None or not _convolves(model, conv):
        raise Unfit("no Conv or ConvTranspose of one group and constant weights makes what it reads")
    require_constants(model, norm)
    channels = model.initializers[norm.input[1]].dims[0]
    missing = -channels % MULTIPLE
    if not missing:
        raise Unfit(f"its {channels} channels are a multiple of {MULTIPLE}")
    only_reader(model, conv.output[0])
    outputs = 0 if conv.op_type == "Conv" else 1
    made[conv.name] = _wider(edit, made.get(conv.name, conv), outputs, missing, bias=True)
    edit.replace(conv, [made[conv.name]], norm)
    wide = _wider(edit, norm, 0, missing, bias=True)
    readers = _readers(model, norm.output[0])
    for reader in readers or ():
        inputs = 1 if reader.op_type == "Conv" else 0
        made[reader.name] = _wider(edit, made.get(reader.name, reader), inputs, missing, bias=False)
        edit.replace(reader, [made[reader.name]], norm)
    if readers is not None:
        return edit.replace(norm, [wide])
    wide.output[0] = edit.name(f"{norm.output[0]}_wide")
    edit.replace(norm, [wide, edit.first(wide.output[0], channels, 1, norm)])


def _convolves(model: Model, node: NodeProto) -> bool:
    """Whether a node is a convolution of one group whose weight and bias are constant."""
    constant = all(model.is_constant(t) for t in node.input[1:])
    return node.op_type in ("Conv", "ConvTranspose") and constant and attribute_value(node, "group", 1) == 1


def _readers(model: Model, tensor: str) -> list[NodeProto] | None:
    """The convolutions that alone read a tensor, directly or through pointwise nodes; None if anything else does."""
    wide, between, ends = {tensor}, set[str](), dict[str, NodeProto]()
    for node in model.graph.node:
        if not wide.intersection(node.input) or node.domain:
            continue
        others = [t for t in node.input if t not in wide]
        single = all(model.is_constant(t) and np.prod(model.initializers[t].dims) == 1 for t in others)
        divides = node.op_type == "Div" and node.input[1] in wide  # 0 / 0
        if node.op_type in FINITE and single and not divides:
            between.add(node.name)
            wide.update(node.output)
        elif _convolves(model, node):
            ends[node.name] = node
    uses = [use for t in wide for use in model.consumers(t)]
    closed = all(use.node.name in between or (use.node.name in ends and use.index == 0) for use in uses)
    return list(ends.values()) if ends and closed and not any(map(model.is_output, wide)) else None


def _wider(edit: Edit, node: NodeProto, axis: int, missing: int, *, bias: bool) -> NodeProto:
    """The node with zeros added to its constants: along `axis` of the first; at the end of the others, if `bias`."""
    copy = altered(node)
    for index, name in enumerate(node.input[1:], 1):
        values = edit.array(name)
        if index == 1 or bias:
            amounts = [(0, missing if i == (axis if index == 1 else 0) else 0) for i in range(values.ndim)]
            copy.input[index] = edit.constant(f"{name}_wide", np.pad(values, amounts))
    return copy
