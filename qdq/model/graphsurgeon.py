"""What a caller may give as a model, and how it is read.

    path, ModelProto, onnx_graphsurgeon.Graph  ->  `content`: the bytes of an ONNX file, which `storage.load` reads

onnx-graphsurgeon is imported where a graph of it is given or wanted. It must not write a model that qdq has made: the
exporter drops metadata, attributes of rare types and unread initializers.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TypeAlias, Union

from onnx import ModelProto

from qdq.core.errors import InputError, ModelError
from qdq.model.external import IN_FILE_LIMIT, is_external, tensor_bytes
from qdq.model.nodes import all_tensors

if TYPE_CHECKING:
    from onnx_graphsurgeon import Graph

ModelSource: TypeAlias = Union[str, os.PathLike[str], ModelProto, "Graph"]


def called(source: ModelSource) -> str:
    """What an error message calls a model: the path, or "this ModelProto", "this onnx_graphsurgeon.Graph"."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "this ModelProto" if isinstance(source, ModelProto) else "this onnx_graphsurgeon.Graph"


def content(source: ModelProto | Graph) -> bytes:
    """The bytes of the file that a model in memory would be; the same model always gives the same.

    Raises:
        InputError: it is neither a ModelProto nor a graph of onnx-graphsurgeon, has values in a side file, or is too
            large for a message of protobuf.
        ModelError: onnx-graphsurgeon cannot export the graph.
    """
    proto = source if isinstance(source, ModelProto) else _exported(source)
    tensors = list(all_tensors(proto))
    if outside := next(filter(is_external, tensors), None):
        raise InputError(
            f"Cannot use {called(source)}: the values of tensor {outside.name!r} lie in a side file, and a model in "
            "memory has no folder. Give the path of the model, or load it with its external data."
        )
    if (size := sum(map(tensor_bytes, tensors))) > IN_FILE_LIMIT:
        raise InputError(
            f"Cannot use {called(source)}: its tensors hold {size} bytes, and {IN_FILE_LIMIT} go into one message. "
            "Save it with external data and give the path."
        )
    return bytes(proto.SerializeToString(deterministic=True))


def _exported(source: object) -> ModelProto:
    """The ModelProto of a graph; whoever has one has imported onnx-graphsurgeon."""
    gs = sys.modules.get("onnx_graphsurgeon")
    if gs is None or not isinstance(source, gs.Graph):
        raise InputError(
            f"Cannot use a {type(source).__name__} as a model: give the path of an .onnx file, an onnx.ModelProto or "
            "an onnx_graphsurgeon.Graph."
        )
    try:
        proto: ModelProto = gs.export_onnx(source)
    except (gs.util.exception.OnnxGraphSurgeonException, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"Cannot use this onnx_graphsurgeon.Graph: its export says: {' '.join(str(error).split())[:500]}"
        ) from None
    return proto
