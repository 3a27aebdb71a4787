"""What the low float types can hold, and where the ONNX standard takes them: operands of nodes, scales.

opsets of a model -> `Schema`: may this operand be FP16 or BF16? TensorRT's own operator has a schema here too.
It must not decide what becomes FP16 or BF16: `rules` does.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto
from onnx.defs import OpSchema

from qdq.model.model import Model
from qdq.model.nodes import FP4_QUANTIZE, TRT_DOMAIN, bodies

_LOW_TYPES = {"float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}
_FP4_SCHEMA = OpSchema(
    FP4_QUANTIZE,
    TRT_DOMAIN,
    1,
    inputs=[OpSchema.FormalParameter("data", "T"), OpSchema.FormalParameter("scale", "tensor(float)")],
    outputs=[
        OpSchema.FormalParameter("codes", "tensor(float4e2m1)"),
        OpSchema.FormalParameter("scales", "tensor(float8e4m3fn)"),
    ],
    type_constraints=[("T", ["tensor(float)", *_LOW_TYPES.values()], "")],
)


class Schema:
    """What the ONNX standard allows at the operands of a graph's nodes."""

    def __init__(self, model: Model, low: str) -> None:
        """Take the operator sets that the model imports; `low` is 'float16' or 'bfloat16'."""
        self._low = _LOW_TYPES[low]
        self._opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.proto.opset_import}
        self._known: dict[tuple[str, str], OpSchema | None] = {(FP4_QUANTIZE, TRT_DOMAIN): _FP4_SCHEMA}

    def of(self, node: NodeProto) -> OpSchema | None:
        """The node's schema; None for an operator that onnx does not know."""
        key = (node.op_type, node.domain)
        if key not in self._known:
            try:
                version = self._opsets.get(node.domain, 1)
                self._known[key] = onnx.defs.get_schema(node.op_type, version, node.domain)
            except onnx.defs.SchemaError:
                self._known[key] = None
        return self._known[key]

    def lowers(self, node: NodeProto, index: int, *, output: bool = False) -> bool:
        """Whether float32 at this operand may become the low type."""
        schema = self.of(node)
        if schema is None or has_body(node) or (node.op_type == "Resize" and not output and index > 0):
            return False
        formals = schema.outputs if output else schema.inputs
        formal = formals[min(index, len(formals) - 1)].type_str
        return any(c.type_param_str == formal and self._low in c.allowed_type_strs for c in schema.type_constraints)


def has_body(node: NodeProto) -> bool:
    """Whether a node is If, Loop or Scan."""
    return any(True for _ in bodies(node))


def finfo(low: str) -> Any:
    """Limits of 'float16' or 'bfloat16', with the fields of `numpy.finfo`."""
    return ml_dtypes.finfo(low)  # type: ignore[no-untyped-call]


def fits(scale: np.ndarray, low: str) -> bool:
    """Whether every scale keeps 8 bits in the low type: 2^-9 relative, half of an INT8 step at code 256."""
    wanted = np.asarray(scale, dtype=np.float64)
    stored = wanted.astype(np.dtype(low) if low == "float16" else ml_dtypes.bfloat16).astype(np.float64)
    return bool((np.isfinite(stored) & (np.abs(stored - wanted) <= wanted * 2.0**-8)).all())


def dequantizes_constant_scale(model: Model, node: NodeProto) -> bool:
    """Whether a node is a DequantizeLinear that can be made in another type by converting its scale."""
    return node.op_type == "DequantizeLinear" and not node.domain and model.is_constant(node.input[1])
