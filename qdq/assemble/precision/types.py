"""What the low float types can hold, and where the ONNX standard takes them: operands of nodes, scales.

opsets of a model -> `Schema`: which operands of a node are FP16 or BF16 when it computes in that? Asked of onnx's own
inference, node by node. TensorRT's own operator has a schema here too.
It must not decide what becomes FP16 or BF16: `rules` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.shape_inference
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.defs import OpSchema

from qdq.model.model import Model
from qdq.model.nodes import FP4_QUANTIZE, TRT_DOMAIN, attribute_value, bodies
from qdq.passes.rewrites.edit import altered

ELEM = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """The indices of a node's float32 operands that take the low type."""

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


class Schema:
    """What the ONNX standard allows at the operands of a graph's nodes."""

    def __init__(self, model: Model, low: str) -> None:
        """Take the operator sets that the model imports; `low` is 'float16' or 'bfloat16'."""
        self._model, self._low, self._elem = model, _LOW_TYPES[low], ELEM[low]
        self._imports = list(model.proto.opset_import)
        self._lowered: dict[str, Lowered | None] = {}
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

    def lowered(self, node: NodeProto) -> Lowered | None:
        """Which float32 operands of a node change their type when it computes in the low one.

        None where ONNX has no such node: an operand would have a type that another, an attribute or the operator's own
        body does not allow.
        """
        if node.name not in self._lowered:
            self._lowered[node.name] = self._lower(node)
        return self._lowered[node.name]

    def _lower(self, node: NodeProto) -> Lowered | None:
        schema = self.of(node)
        if schema is None or has_body(node):
            return Lowered()
        floats = [i for i, name in enumerate(node.input) if self._is_float(name)]
        inputs = {i for i in floats if self._allows(schema.inputs, schema, i)}
        inputs -= {i for i in inputs if node.op_type == "Resize" and i > 0}
        made = [i for i, name in enumerate(node.output) if self._is_float(name)]
        if node.domain == TRT_DOMAIN:  # onnx cannot infer TensorRT's own operator
            return Lowered(inputs=frozenset(inputs), outputs=frozenset(i for i in made if i in inputs))
        try:
            types = self._infer(retyped(node, self._elem), {i: self._elem for i in inputs})
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
            if self._infers(node):
                return None
            types = {node.output[i]: self._elem for i in made if self._allows(schema.outputs, schema, i)}
        return Lowered(
            inputs=frozenset(inputs), outputs=frozenset(i for i in made if types.get(node.output[i]) == self._elem)
        )

    def _infers(self, node: NodeProto) -> bool:
        """Whether onnx's inference over the node alone works as it is, in float32."""
        try:
            self._infer(node, {})
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
            return False
        return True

    def _infer(self, node: NodeProto, changed: dict[int, int]) -> dict[str, int]:
        """Output -> element type, by inference over the node alone with its operands in their types."""
        found, named = [], dict[str, int]()
        for index, name in enumerate(node.input):
            if name and name not in named:
                named[name] = changed.get(index, self._elem_of(name))
                found.append(helper.make_tensor_value_info(name, named[name], None))
        ends = [ValueInfoProto(name=name) for name in node.output if name]
        proto = helper.make_model(helper.make_graph([node], "node", found, ends), opset_imports=self._imports)
        graph = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
        return {o.name: o.type.tensor_type.elem_type for o in graph.output}

    def _allows(self, formals: Sequence[OpSchema.FormalParameter], schema: OpSchema, index: int) -> bool:
        formal = formals[min(index, len(formals) - 1)].type_str
        return any(c.type_param_str == formal and self._low in c.allowed_type_strs for c in schema.type_constraints)

    def _is_float(self, name: str) -> bool:
        return bool(name) and self._elem_of(name) == TensorProto.FLOAT

    def _elem_of(self, name: str) -> int:
        info = self._model.info(name)
        if info is None or info.dtype in ("undefined", "string") or info.dtype.endswith("_type"):
            return TensorProto.STRING if info is not None and info.dtype == "string" else TensorProto.UNDEFINED
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(info.dtype)))


def retyped(node: NodeProto, elem: int, *, limit: float | None = None) -> NodeProto:
    """A copy of a node that makes another type: where Cast, DequantizeLinear or ConstantOfShape name float32.

    What else names the type of its output (windows, random numbers) keeps it: ONNX Runtime has few of them in FP16.
    `limit` is the magnitude at which the value of a ConstantOfShape is cut.
    """
    copy = altered(node)
    for entry in copy.attribute:
        if entry.name in ("to", "output_dtype") and entry.i == TensorProto.FLOAT:
            entry.i = elem
    if node.op_type == "ConstantOfShape" and (value := filling(node)) is not None:
        cut = value if limit is None else np.clip(value, -limit, limit)
        kept = [entry for entry in copy.attribute if entry.name != "value"]
        del copy.attribute[:]
        with np.errstate(over="ignore"):
            typed = cut.astype(helper.tensor_dtype_to_np_dtype(elem))
        copy.attribute.extend([*kept, helper.make_attribute("value", numpy_helper.from_array(typed))])
    return copy


def filling(node: NodeProto) -> np.ndarray | None:
    """The float32 value of a ConstantOfShape, which is 0 where it is left out; None for another type."""
    value = attribute_value(node, "value", None)
    if value is None:
        return np.zeros(1, np.float32)
    return numpy_helper.to_array(value) if value.data_type == TensorProto.FLOAT else None


def has_body(node: NodeProto) -> bool:
    """Whether a node is If, Loop or Scan."""
    return any(True for _ in bodies(node))


def finfo(low: str) -> Any:
    """Limits of 'float16' or 'bfloat16', with the fields of `numpy.finfo`."""
    return ml_dtypes.finfo(low)  # type: ignore[no-untyped-call]


def fits(scale: np.ndarray, low: str) -> bool:
    """Whether every scale keeps 8 bits in the low type: 2^-9 relative, half of an INT8 step at code 256."""
    wanted = np.asarray(scale, dtype=np.float64)
    with np.errstate(over="ignore"):  # to infinity, which does not fit
        stored = wanted.astype(np.dtype(low) if low == "float16" else ml_dtypes.bfloat16).astype(np.float64)
    return bool((np.isfinite(stored) & (np.abs(stored - wanted) <= wanted * 2.0**-8)).all())


def largest_code(model: Model, tensor: str) -> float:
    """The largest magnitude that codes can have, less their zero point: 128 of INT8, 448 of FP8, 6 of FP4.

    Stored codes of more than 8 bits, biases, are looked at: hardly any reaches what its type holds.
    """
    kind = np.dtype(model.dtype(tensor))
    if kind.itemsize > 1 and model.is_constant(tensor):
        return float(np.abs(model.array(tensor).astype(np.float64)).max(initial=0))
    limits: Any = finfo(kind.name) if "float" in kind.name else ml_dtypes.iinfo(kind)  # type: ignore[no-untyped-call]
    return max(float(limits.max), -float(limits.min))


def dequantizes_constant_scale(model: Model, node: NodeProto) -> bool:
    """Whether a node is a DequantizeLinear that can be made in another type by converting its scale."""
    return node.op_type == "DequantizeLinear" and not node.domain and model.is_constant(node.input[1])
