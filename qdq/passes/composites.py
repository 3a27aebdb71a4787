"""Composite operators that a compiler or a runtime lacks in some form, written out by ONNX's own definition of them.

    Attention(Q, K, V, mask)  ->  the MatMul, Add, Softmax, MatMul ... of the standard's function

| operator | written out |
|---|---|
| RotaryEmbedding | always: TensorRT-RTX makes the same kernels of it, and ONNX Runtime refuses a cache of one batch |
| Attention | in FP32; with heads of fewer than 10 or more than 256 values, or of unlike sizes; |
| | with a cache inside, a cap on scores, a stated type of the softmax, or a second output |

TensorRT-RTX 1.7.1 has one fused kernel and refuses all else (measured, SM86 and SM89). It must not touch what has that
kernel, which the operator is for, or what gives the scores of masked keys too (the fourth output): the definition has
-infinity there, ONNX Runtime the lowest number.
"""

from __future__ import annotations

import numpy as np
import onnx.inliner
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from qdq.model.model import Model
from qdq.model.nodes import Names, all_nodes, attribute, attribute_value
from qdq.passes.draft import Draft, assign

FUSED = range(10, 257)  # values per head
COMPOSITES = ("Attention", "RotaryEmbedding")


def written_out(model: Model) -> Model:
    """The model without composite operators that have no kernel; itself if there are none. Shapes are inferred."""
    draft = Draft(model)
    return draft.finish() if write_out(draft) else model


def write_out(draft: Draft, *, low: bool = False) -> bool:
    """Write out the composite operators that have no kernel; whether there are any.

    Args:
        draft: shapes inferred.
        low: the float tensors are going to be FP16 or BF16, so that FP32 is no reason.
    """
    chosen = {node.name for node in draft.graph.node if _without_kernel(draft.shown, node, low)}
    if chosen:
        taken = Names(node.name for node in all_nodes(draft.graph))
        nodes = (_body(draft, node, taken) if node.name in chosen else [node] for node in draft.graph.node)
        assign(draft.graph.node, [new for made in nodes for new in made])
        draft.lift_constants()
    return bool(chosen)


def _without_kernel(model: Model, node: NodeProto, low: bool) -> bool:
    if node.domain or node.op_type not in COMPOSITES or any(node.output[3:]):
        return False
    if node.op_type == "RotaryEmbedding":
        return True
    given = [bool(name) for name in node.input]
    odd = any(given[4:]) or any(node.output[1:]) or attribute_value(node, "softcap", 0.0)
    stated = attribute(node, "softmax_precision", 0)
    sizes = [_head_size(model, node, index) for index in (0, 1, 2)]
    fused = all(size in FUSED for size in sizes) and len(set(sizes)) == 1
    return bool(odd or stated or not fused or not (low or model.dtype(node.input[0]) in ("float16", "bfloat16")))


def _head_size(model: Model, node: NodeProto, index: int) -> int | None:
    """Values per head of Q, K or V: (batch, heads, length, size), or (batch, length, heads * size)."""
    info = model.info(node.input[index])
    if info is None or not info.shape or not isinstance(info.shape[-1], int):
        return None
    heads = attribute(node, "kv_num_heads" if index else "q_num_heads", 1) if len(info.shape) == 3 else 1
    return info.shape[-1] // int(heads)


def _body(draft: Draft, node: NodeProto, taken: Names) -> list[NodeProto]:
    """The nodes of ONNX's definition of a node; what it computes on the way has the node's name in front."""
    starts, ends = (
        [_typed(draft, name) for name in dict.fromkeys(names)] for names in (node.input, filter(None, node.output))
    )
    graph = helper.make_graph([node], "alone", starts, ends)
    alone = helper.make_model(graph, opset_imports=draft.proto.opset_import, ir_version=draft.proto.ir_version)
    flat = onnx.inliner.inline_selected_functions(alone, [("", node.op_type)], inline_schema_functions=True)
    kept = {*node.input, *node.output}
    for inner in flat.graph.node:
        inner.name = taken.fresh(f"{node.name}_{inner.op_type}")
        for names in (inner.input, inner.output):
            names[:] = [name if not name or name in kept else f"{node.name}_{name}" for name in names]
    return list(flat.graph.node)


def _typed(draft: Draft, name: str) -> ValueInfoProto:
    if not name:  # an input that is left out: the inliner asks for its type all the same
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    info = draft.info(name)
    if info is None:
        return ValueInfoProto(name=name)
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(info.dtype)), info.shape)
