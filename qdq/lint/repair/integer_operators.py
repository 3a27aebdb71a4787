"""QLinearConv and QLinearMatMul, of ONNX's operator-oriented form, as float operators between Q and DQ.

draft -> DequantizeLinear on both factors, the float operator with a float bias, QuantizeLinear: the same integers but
for the rounding of the float sum. Other integer operators are left, and reported by `lint`.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from engines.core.nodes import label
from qdq.lint.repair.draft import RepairDraft


def write_floats(draft: RepairDraft) -> None:
    """Write QLinearConv and QLinearMatMul as float operators. The draft is refreshed, and must be again afterwards."""
    nodes: list[NodeProto] = []
    for node in draft.proto.graph.node:
        if node.op_type not in ("QLinearConv", "QLinearMatMul") or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        x, xs, xz, w, ws, wz, ys, yz = node.input[:8]
        name = label(node)
        float_inputs = []
        for tensor, *params in ((x, xs, xz), (w, ws, wz)):
            out = draft.name(f"{name}_{tensor}_dequantized")
            scale = draft.view.constant(ws)
            made = helper.make_node("DequantizeLinear", [tensor, *params], [out], name=draft.name(out + "_DQ"))
            if tensor == w and scale is not None and scale.size > 1:
                made.attribute.append(helper.make_attribute("axis", 0 if node.op_type == "QLinearConv" else 1))
            nodes.append(made)
            float_inputs.append(out)
        if len(node.input) > 8 and node.input[8]:
            bias, a, b = (draft.view.constant(n) for n in (node.input[8], xs, ws))
            if bias is None or a is None or b is None:
                nodes[:] = [n for n in nodes if n.output[0] not in float_inputs] + [node]
                continue
            values = (bias * (a.ravel() * b.ravel())).astype(np.float32)
            float_inputs.append(draft.init(node.input[8] + "_float", values))
        out = draft.name(f"{name}_float")
        made = helper.make_node(node.op_type.removeprefix("QLinear"), float_inputs, [out], name=name)
        made.attribute.extend(node.attribute)
        last = helper.make_node("QuantizeLinear", [out, ys, yz], [node.output[0]], name=draft.name(name + "_Q"))
        nodes += [made, last]
        draft.log(["operator"], node, f"{node.op_type} written as {made.op_type} between Q and DQ")
    if len(nodes) != len(draft.proto.graph.node):
        copies = [NodeProto() for _ in nodes]
        for copy, node in zip(copies, nodes, strict=True):
            copy.CopyFrom(node)
        del draft.proto.graph.node[:]
        draft.proto.graph.node.extend(copies)
