"""Models and files: load, check, save whole or not at all, external data beside them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto

from engines.core.files import new_files, regular
from engines.core.load import settle
from engines.core.nodes import all_graphs, bodies
from qdq.core.errors import InputError, ModelError
from qdq.core.files import how_to_export
from qdq.model.accept import accept
from qdq.model.external import (
    IN_FILE_LIMIT,
    KNOWN,
    External,
    is_external,
    move,
    stream,
    tensor_bytes,
    values_stored,
    without_store_key,
)
from qdq.model.graphsurgeon import ModelSource, called, content
from qdq.model.model import Model
from qdq.model.nodes import all_nodes, all_tensors, without_initializers

ARRAY_AXES = 64  # that NumPy can have
MOST_NESTED = 25  # bodies; protobuf reads 100 messages inside each other, and a body's nodes are three more
MOST_AXES = 1000  # of a tensor; a runtime may take a larger number for another, in 32 bits
PROTOBUF_LIMIT = 2**31 - 1  # bytes
_QUANTIZED_OP = re.compile(r"[Qq]uantize|^QLinear|^Q(Attention|Gemm|Ordered)|(Conv|MatMul)Integer|NBits")


def load(source: ModelSource) -> Model:
    """Read an ONNX model and check it; external tensor data is checked and hashed but not kept.

    Args:
        source: the path of an .onnx file; or an onnx.ModelProto or an onnx_graphsurgeon.Graph, which is not changed.

    Returns:
        The Model, repaired by `accept`. Its sha256 is over the bytes of the file, or those that a model in memory is
        written as, then of each external tensor in the order of the file.

    Raises:
        ModelError: the file is missing, a folder, empty, truncated, not ONNX, has no nodes or breaks the standard, or
            external data is missing, too short or outside the model's folders (`engines.core.load.data_file`).
        InputError: `source` is something else, or a model in memory without the values of a tensor.
    """
    if isinstance(source, str | os.PathLike):
        read, file = _read(Path(source)), Path(source)
    else:
        read, file = content(source), None
    name = called(source)
    proto = ModelProto()
    try:
        proto.ParseFromString(read)
    except DecodeError:
        raise ModelError(
            f"Cannot read {name}: its {len(read)} bytes are not a complete ONNX model (protobuf cannot parse them). "
            "The file is truncated or of another format; copy or export it again."
        ) from None
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelError(
            f"Cannot use {name}: it holds no nodes, so it is not an ONNX model or an empty one. "
            "Give the .onnx file of a network."
        )
    if not proto.graph.output:
        raise ModelError(f"Cannot use {name}: it has no outputs, so it computes nothing. Export the model again.")
    if why := next(filter(None, map(_unreadable, all_tensors(proto))), ""):
        raise ModelError(f"Cannot use {name}: {why}")
    if broken := next((text for text in _texts(proto) if isinstance(text, bytes)), None):  # so protobuf gives no text
        raise ModelError(f"Cannot use {name}: the name {broken!r} in it is not UTF-8. Copy or export the model again.")
    digest = hashlib.sha256(read)
    del read
    directory = settle(proto, file) if file else Path()
    for tensor in filter(is_external, all_tensors(proto)):
        without_store_key(tensor)
        for chunk in stream(tensor, directory):
            digest.update(chunk)
    try:
        repaired = accept(proto, directory)
        if _depth(proto.graph) > MOST_NESTED:
            raise ValueError(f"bodies of If, Loop and Scan nest deeper than {MOST_NESTED}.")
        check(proto)
    except (onnx.checker.ValidationError, DecodeError, ValueError) as error:
        raise ModelError(
            f"Cannot use {name}: it is not a valid ONNX model, or only a part of one. The checker of onnx "
            f"{onnx.__version__} says: {' '.join(str(error).split())[:600]} Export the model again."
        ) from None
    unchanged = None if repaired else file
    return Model(proto=proto, directory=directory, sha256=digest.hexdigest(), file=unchanged)


def _texts(proto: ModelProto) -> Iterator[str | bytes]:
    """The names of all nodes and tensors, those of bodies among them, and of the files that tensors lie in."""
    for node in all_nodes(proto.graph):
        yield from (node.name, *node.input, *node.output)
    for graph in all_graphs(proto.graph):
        for each in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            yield each.name
    for tensor in all_tensors(proto):
        yield from (entry.value for entry in tensor.external_data)


def check(proto: ModelProto) -> None:
    """Check a model against the standard, tensor by tensor, so that the weights are never copied at once.

    An output without a shape passes, as in ONNX Runtime. External data is not looked at.

    Raises:
        onnx.checker.ValidationError: the model breaks the standard.
    """
    skeleton = without_initializers(proto)
    listed = {v.name for v in proto.graph.input}
    for tensor in proto.graph.initializer:
        if not is_external(tensor):
            onnx.checker.check_tensor(tensor)
        if tensor.name not in listed:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            skeleton.graph.input.append(info)
    for value in skeleton.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    for tensor in filter(is_external, all_tensors(skeleton)):  # of bodies and attributes
        tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    onnx.checker.check_model(skeleton)
    for node in all_nodes(proto.graph):
        for held in node.attribute:
            if held.name in ("axis", "axes", "perm") and any(abs(a) > MOST_AXES for a in (held.i, *held.ints)):
                raise onnx.checker.ValidationError(
                    f"Node {node.name!r} ({node.op_type}) has {held.name} {held.i or list(held.ints)}: no tensor has "
                    "so many axes."
                )


def save(
    model: Model | ModelProto, path: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None
) -> None:
    """Write a model; the same model always gives the same bytes.

    Tensors go to `<name>.data` beside the file, one at a time, if the source had external data or if all of them
    exceed 1.9 GB. Both files appear by a rename when they are complete.

    Args:
        model: what to write; it is not changed.
        path: the .onnx file to write; an existing one is replaced.
        directory: where the external data of a bare ModelProto lies.

    Raises:
        InputError: the place cannot be written, or the side file would replace the source's own.
        ModelError: external data of the source can no longer be read.
    """
    path = Path(path)
    if isinstance(model, Model):
        proto, source = model.proto, Path(directory or model.directory)
    else:
        proto, source = model, Path(directory or path.absolute().parent)
    tensors = list(all_tensors(proto))
    external = [t for t in tensors if is_external(t)]
    side = path.with_name(path.name + ".data")
    for tensor in external:
        if side.exists() and side.samefile(External.of(tensor, source).path):
            raise InputError(
                f"Cannot write {path}: its side file {side.name} would replace the data that tensor {tensor.name!r} of "
                "the source model is read from. Choose another file name or folder."
            )
    apart = external or sum(map(tensor_bytes, tensors)) > IN_FILE_LIMIT
    try:
        with new_files(*([side] if apart else []), path) as files:
            if apart:
                proto = _with_side_file(proto, source, side.name, files[0])
            files[-1].write(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise InputError(
            f"Cannot write {path}: {error.strerror or error}. Choose a folder that exists, is writable and has room."
        ) from None


def _depth(graph: GraphProto) -> int:
    """How deep the bodies in a graph nest; 0 where there are none."""
    return max((1 + _depth(body) for node in graph.node for body in bodies(node)), default=0)


def _unreadable(tensor: TensorProto) -> str:
    """Why a tensor cannot be an array; "" if it can."""
    if tensor.data_type not in KNOWN:
        return (
            f"tensor {tensor.name!r} is of type {tensor.data_type}, which onnx {onnx.__version__} does not know. "
            "Export the model again, or install a newer onnx."
        )
    if len(tensor.dims) > ARRAY_AXES:
        return (
            f"tensor {tensor.name!r} has {len(tensor.dims)} axes; an array has at most {ARRAY_AXES}. Export it again."
        )
    if tensor.HasField("segment"):
        return f"tensor {tensor.name!r} is stored in segments, which no runtime reads. Export the model again."
    needed, held = values_stored(tensor)
    if needed != held:
        return (
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} needs {needed} stored bytes or values and has "
            f"{held}. The file is damaged; copy or export it again."
        )
    return ""


def is_quantized(model: Model) -> bool:
    """Whether a loaded model already holds quantized operators, in any graph of it."""
    return any(_QUANTIZED_OP.search(n.op_type) for n in all_nodes(model.graph))


def _read(path: Path) -> bytes:
    fix = how_to_export(str(path)) or "Give the path of an .onnx file."
    if how_to_export(str(path)):
        raise ModelError(f"Cannot read {path}: it is no ONNX file. {fix}")
    if path.is_dir():
        raise ModelError(f"Cannot read {path}: it is a folder, not a model. {fix}")
    try:
        size = regular(path).stat().st_size
        if size > PROTOBUF_LIMIT:
            raise ModelError(
                f"Cannot read {path}: {size} bytes, but an ONNX file ends at 2 GiB. "
                "Export the model with its weights as external data."
            )
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}. {fix}") from None
    if not content:
        raise ModelError(f"Cannot read {path}: it is empty (0 bytes). Copy or export the model again.")
    return content


def _with_side_file(proto: ModelProto, directory: Path, location: str, file: BinaryIO) -> ModelProto:
    """A copy of a model whose larger tensors lie in `file`, streamed one at a time."""
    copy = without_initializers(proto)
    for tensor in all_tensors(copy):
        move(tensor, tensor, directory, location, file)
    for tensor in proto.graph.initializer:
        move(tensor, copy.graph.initializer.add(), directory, location, file)
    return copy
