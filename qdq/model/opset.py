"""The version of the default operator set: which a model has, and the same model in another.

Where no operator of the model changed between the two versions, the label changes and nothing else; else onnx's
converter works, which gets no large weights. Must not know passes.
"""

from __future__ import annotations

import onnx
import onnx.shape_inference
import onnx.version_converter
from onnx import ModelProto

from engines.core.nodes import all_nodes
from qdq.core.errors import ModelError

FAILURES = (  # of onnx's converter
    onnx.shape_inference.InferenceError,
    onnx.version_converter.ConvertError,
    RuntimeError,
    ValueError,
    IndexError,
)


def opset_of(proto: ModelProto) -> int:
    """The version of the default operator set, 0 if it is not imported."""
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)


def with_opset(proto: ModelProto, target: int) -> ModelProto:
    """A light model, as of `engines.core.shapes.light`, in another version of the default operator set.

    Raises:
        ModelError: onnx cannot convert it; names the operator.
    """
    source = opset_of(proto)
    if is_same(proto, target):
        made = ModelProto()
        made.CopyFrom(proto)
        for entry in made.opset_import:
            entry.version = target if not entry.domain else entry.version
        return made
    if source < 9 <= target and any(node.op_type == "Scan" for node in all_nodes(proto.graph)):
        raise ModelError(
            f"Cannot convert this model from opset {source} to {target}: until opset 8 Scan ran over a batch, and the "
            "converter of onnx keeps it so. Export the model again with opset 17 to 21."
        )
    try:
        return onnx.version_converter.convert_version(proto, target)
    except FAILURES as error:
        raise ModelError(
            f"Cannot convert this model from opset {source} to {target}: the converter of onnx {onnx.__version__} "
            f"says: {' '.join(str(error).split())[:500]} Export the model again with opset 17 to {target}."
        ) from None


def is_same(proto: ModelProto, target: int) -> bool:
    """Whether every operator of a model is the same in another version of the default operator set."""
    source = opset_of(proto)
    return all(_unchanged(node.op_type, source, target) for node in all_nodes(proto.graph) if not node.domain)


def _unchanged(op_type: str, source: int, target: int) -> bool:
    """Whether an operator of the default domain is the same in two versions of the set."""
    try:
        return bool(
            onnx.defs.get_schema(op_type, source).since_version == onnx.defs.get_schema(op_type, target).since_version
        )
    except onnx.defs.SchemaError:
        return False
