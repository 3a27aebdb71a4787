"""Quantized convolutions that must compute in FP32 because FP16 or BF16 rounds each dequantized weight.

Behind a shift every input of a product lies near one value, that of zero, and the bias cancels what it makes of the
weights: zero times their sum. The standard's DequantizeLinear rounds each weight to the low type, so that the sum is
another one by the sum of these roundings, also of the scales for which it is least (`shift.steady`). Where that moves
an output by more than rounding the output itself does, the product stays FP32 and weights are as exact as in an integer
kernel. With a scale per channel TensorRT-RTX's INT8 convolutions write FP32 in an FP16 graph (measured, see
`passes.rewrites.quantized.hoist`); of those with one scale, a power of two, no weight is rounded. Gemm and MatMul are
left alone: in FP32 between FP16 neighbours TensorRT-RTX 1.7.1 fails on their integer kernels ("Invalid binary pointwise
types"). It must not change a graph.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import NodeProto

from qdq.assemble.precision.shift import rounded, shift_of, steadied
from qdq.assemble.precision.types import finfo
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.model.nodes import attribute, weight_axis
from qdq.plan.plan import Skip

RULE = "cancelled"
SLICE = 1 << 18  # weights at a time: of all at once the float64 would be eight times as large


def cancelled(model: Model, low: str, table: CalibrationTable | None, spared: Collection[str]) -> dict[str, Skip]:
    """The convolutions of a Q/DQ model that must stay FP32, by name; `spared` are nodes that will have one scale.

    Without a table none is known to have outputs so small.
    """
    if table is None:
        return {}
    reason = f"its bias cancels most of it, and {low} rounds each weight: the sum of them would be another one"
    convolutions = (node for node in model.graph.node if node.op_type == "Conv" and node.name not in spared)
    return {
        node.name: Skip(node=node.name, op_type=node.op_type, rule=RULE, reason=reason)
        for node in convolutions
        if _moved(model, node, low) > float(finfo(low).eps) / 2 * _reach(model, node, table)
    }


def _moved(model: Model, node: NodeProto, low: str) -> float:
    """By how much the rounding of the weights moves the output where the data are zero, at most; 0 without a shift."""
    shift, weight = shift_of(model, node, low), model.producer(node.input[1])
    if shift is None or weight is None or weight.op_type != "DequantizeLinear":
        return 0.0
    if not all(map(model.is_constant, weight.input[:2])) or attribute(weight, "block_size", 0):
        return 0.0
    codes, scale = model.array(weight.input[0]), model.array(weight.input[1])
    outputs, axis = weight_axis(node, codes.ndim), attribute(weight, "axis", 1) % codes.ndim
    if scale.size > 1 and (scale.ndim != 1 or axis != outputs):
        return 0.0
    by_output = np.moveaxis(codes, outputs, 0).reshape(codes.shape[outputs], -1)
    own, most = steadied(model, node, low), 0.0
    stored = (rounded(scale, low) if own is None else own).reshape(-1, 1)
    stored = np.broadcast_to(stored, (len(by_output), 1))
    some = max(1, SLICE // max(by_output.shape[1], 1))
    for start in range(0, len(by_output), some):
        exact = by_output[start : start + some].astype(np.float64) * stored[start : start + some]
        most = max(most, float(np.abs((rounded(exact, low) - exact).sum(axis=1)).max()))
    return abs(shift.zero) * most


def _reach(model: Model, node: NodeProto, table: CalibrationTable) -> float:
    """The largest magnitude of a product's output, or of what a Relu alone makes of it; infinite if unknown."""
    use, known = model.only_use(node.output[0]), {**{n: h.amax for n, h in table.tensors.items()}, **table.ranges}
    behind = [use.node.output[0]] if use is not None and use.node.op_type == "Relu" else []
    return min((known[name] for name in (node.output[0], *behind) if name in known), default=np.inf)
