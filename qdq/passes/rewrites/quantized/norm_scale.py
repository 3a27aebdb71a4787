"""One weight scale for a quantized convolution before InstanceNormalization, which divides the ratios away.

    IN_eps(Conv(x, DQ(W, s_c), b) + c)  ->  IN_eps'(Conv(x, DQ(W, s), (b + c) / r_c))      s = min s_c,  r_c = s_c / s

The norm of a channel does not see a factor r_c except through epsilon, on which it acts like epsilon / r_c^2.
eps' = 2 eps / (min r_c^2 + max r_c^2) makes the largest difference smallest: outputs change by less than a fraction
eps / (2 variance of the channel before the norm). With one scale a convolution writes FP16 and adds its bias itself; no
kernel is left before the norm, where `hoist` leaves its Mul and a shifted input the rest of its bias (TensorRT-RTX
1.7.1; SM86, 89, 120). Codes are unchanged, nothing overflows anew. It must not touch a tensor that others read.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
from onnx import NodeProto, helper

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.draft import assign
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node, require_constants
from qdq.passes.rewrites.quantized.weight_scales import channel_scales, common_scale, dequantized, ratios

STAGE, RANK = "quantized", 5  # before hoist, which takes what this does not fit
NOT_FOR = {"tensorrt": "scales per channel cost TensorRT no kernel"}

EPSILON = 1e-5  # InstanceNormalization's default
LARGEST_EPSILON = 1.01e-3  # of a norm that is to divide by the standard deviation; 1e-3 in float32 is a little more


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Give quantized Conv weights one scale where only InstanceNormalization reads the result; fires on the Conv."""
    return each_node(model, only, ["Conv"], partial(_unify, made={}))


def _unify(model: Model, edit: Edit, conv: NodeProto, made: dict[tuple[str, str], NodeProto]) -> None:
    dequantize, scales = channel_scales(model, conv)
    codes, scale = dequantize.input[:2]
    added, norms = _until_norms(model, conv, len(model.initializers[codes].dims))
    factors = ratios(scales)
    require_constants(model, conv, 2)
    before = dequantized(model, edit, made, dequantize, common_scale(scales))
    inner = altered(conv, {1: made[codes, scale].output[0]})
    if added or any(conv.input[2:]):
        total = _constants(model, conv, added) / factors
        inner.input[:] = [*inner.input[:2], edit.constant(f"{conv.name}_centre", total.astype(scales.dtype))]
    edit.replace(conv, [*before, inner])
    for node in added:
        edit.replace(node, [], conv)
    squares = factors**2
    for norm in norms:
        copy = altered(norm, {0: conv.output[0]})
        kept = [a for a in norm.attribute if a.name != "epsilon"]
        epsilon = 2 * attribute_value(norm, "epsilon", EPSILON) / (squares.min() + squares.max())
        assign(copy.attribute, [*kept, helper.make_attribute("epsilon", float(epsilon))])
        edit.replace(norm, [copy], conv)


def _until_norms(model: Model, conv: NodeProto, rank: int) -> tuple[list[NodeProto], list[NodeProto]]:
    """Nodes that add constants to a Conv's channels, and the norms that alone read the sum; `Unfit` for others."""
    added: list[NodeProto] = []
    while True:
        tensor = (added[-1] if added else conv).output[0]
        uses = model.consumers(tensor)
        if model.is_output(tensor) or not uses:
            raise Unfit(f"{tensor!r} is an output of the model, or nothing reads it")
        if len(uses) == 1 and _adds_constant(model, uses[0].node, tensor, rank):
            added.append(uses[0].node)
            continue
        norms = [u.node for u in uses if u.index == 0 and u.node.op_type == "InstanceNormalization"]
        if len(norms) < len(uses) or any(norm.domain for norm in norms):
            raise Unfit(f"{tensor!r} is not read by InstanceNormalization alone")
        if any(attribute_value(norm, "epsilon", EPSILON) > LARGEST_EPSILON for norm in norms):
            raise Unfit(f"the epsilon of a norm that reads {tensor!r} is above {LARGEST_EPSILON}")
        return added, norms


def _constants(model: Model, conv: NodeProto, added: list[NodeProto]) -> np.ndarray:
    """(channels,) the bias of a Conv and what is added behind it; any difference from their sum, the norm removes."""
    total = sum((model.array(t).astype(np.float64) for t in conv.input[2:] if t), np.zeros(1))
    last = conv.output[0]
    for node in added:
        sign = -1 if node.op_type == "Sub" else 1
        other = node.input[1 if node.input[0] == last else 0]
        total = total + sign * model.array(other).astype(np.float64).reshape(-1)
        last = node.output[0]
    return total


def _adds_constant(model: Model, node: NodeProto, tensor: str, rank: int) -> bool:
    """Whether a node adds one constant per channel to a tensor of that rank, or subtracts it."""
    if node.domain or node.op_type not in ("Add", "Sub") or (node.op_type == "Sub" and node.input[0] != tensor):
        return False
    other = node.input[1 if node.input[0] == tensor else 0]
    if not model.is_constant(other):
        return False
    dims = model.initializers[other].dims
    spread = [1] * (rank - len(dims)) + list(dims)
    return len(spread) == rank and all(size == 1 for axis, size in enumerate(spread) if axis != 1)
