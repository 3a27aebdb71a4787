"""Nodes that ONNX defines in a low float type, and that a compiler or runtime refuses in it. Must not know models.

Measured over onnx's own node tests and 50 forms of recurrent nodes (`tools/low_types.py --compile`) with TensorRT-RTX
1.7.1 for SM89 and ONNX Runtime 1.31; each of these compiles and runs in FP32.
"""

from __future__ import annotations

from onnx import NodeProto

from engines.core.operators import family
from qdq.model.nodes import attribute_value

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
