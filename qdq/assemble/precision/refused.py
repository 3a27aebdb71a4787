"""What ONNX defines in a low float type, or in two, and a compiler or runtime refuses. Must not know ranges.

Measured over onnx's own node tests and 50 forms of recurrent nodes (`tools/low_types.py --compile`) with TensorRT-RTX
1.7.1 for SM89 and ONNX Runtime 1.31; each of these compiles and runs in FP32.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto

from engines.core.operators import family
from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.plan.plan import Skip

_RECURRENT = family("GRU LSTM RNN")
_BF16 = family("ConvTranspose GRU HardSwish LpNormalization LpPool Mish RandomNormalLike RandomUniformLike")
_SEQUENCE_LENS = 4  # the input of recurrent nodes
_SCATTERS = family("ScatterElements ScatterND")


def refused(low: str, node: NodeProto) -> str:
    """Why a node stays FP32, '' if it need not."""
    if node.op_type in _RECURRENT and len(node.input) > _SEQUENCE_LENS and node.input[_SEQUENCE_LENS]:
        return f"TensorRT-RTX does not compile {node.op_type} with sequence_lens in a low type"  # ISelectLayer
    if low == "bfloat16" and node.op_type in _BF16:
        return "TensorRT-RTX does not compile it in BF16"
    if node.op_type in _SCATTERS and attribute_value(node, "reduction", b"none") != b"none":
        return "ONNX Runtime does not add or compare scattered values in a low type"
    return ""


def together(model: Model, kept: Mapping[str, Skip]) -> dict[str, Skip]:
    """What stays FP32 beside kept nodes: both products of one weight's codes, and the Add of them.

    Data in two codes or pieces have two scales, and a low type may hold one of these alone. TensorRT-RTX 1.7.1 makes
    one kernel of the products, and fails where their types differ ("Invalid binary pointwise types").
    """
    found = dict[str, Skip]()
    for add in (node for node in model.graph.node if node.op_type == "Add"):
        makers = [model.producer(name) for name in add.input]
        products = [maker for maker in makers if maker is not None and maker.op_type in ("Gemm", "MatMul")]
        if len(products) != 2 or products[0].input[1] != products[1].input[1]:
            continue
        weight, all_three = model.producer(products[0].input[1]), (*products, add)
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        if reason := next((kept[node.name].reason for node in all_three if node.name in kept), ""):
            found |= {
                node.name: Skip(node=node.name, op_type=node.op_type, rule="two products", reason=reason)
                for node in all_three
                if node.name not in kept
            }
    return found
