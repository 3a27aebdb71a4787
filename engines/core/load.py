"""An ONNX graph from a file, without its external data; and where these lie; and with its functions inlined.

file -> `load_graph` -> graph; file and location -> `data_file` -> the file of data, links followed.
Must not read external data, or name a file that ONNX Runtime would not follow.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path, PurePath

import onnx
import onnx.inliner
from onnx import FunctionProto, ModelProto, NodeProto

from engines.core.errors import BuildError
from engines.core.files import read_file
from engines.core.nodes import all_nodes, all_tensors, bodies, external_files, label

CALLS = 10_000  # of a model's own functions that are followed; twenty that call each other twice would be a million
_DecodeError: type[Exception] = import_module("google.protobuf.message").DecodeError  # has no type stubs


def load_graph(model: Path | str | onnx.ModelProto) -> onnx.ModelProto:
    """The model without its external data: enough for names, types and shapes.

    Raises:
        BuildError: the file is missing or is not ONNX.
    """
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        loaded = onnx.load_from_string(read_file(model))
    except (OSError, ValueError) as error:
        raise BuildError(f"Cannot read {model}: {error}.") from error
    except _DecodeError as error:
        raise BuildError(f"{model} is not an ONNX file: {error}.") from error
    if not loaded.graph.node:
        raise BuildError(f"{model} is not an ONNX file, or its graph is empty.")
    return loaded


def data_file(model: Path | str, location: str) -> Path | None:
    """Where external data of a model file really lie; None where ONNX Runtime follows the location no further.

    A location starts from the folder that the file is named in. What it leads to, all links followed, must lie in that
    folder or in the one that the model file itself lies in: Hugging Face's cache has links to both files in a folder,
    and the files in another. The file need not exist.

    Source: found by trying layouts with ONNX Runtime 1.32.0 ("External data path escapes model directory").
    """
    if not location or "\0" in location or PurePath(location).is_absolute():
        return None
    named = Path(model).absolute()
    place = Path(os.path.realpath(named.parent / location))
    inside = (os.path.realpath(named.parent), Path(os.path.realpath(named)).parent)
    return place if any(place.is_relative_to(folder) for folder in inside) else None


def settle(proto: onnx.ModelProto, model: Path | str) -> Path:
    """The folder to find a model's external data in, once it is in memory; `proto` then says where in that.

    It is the folder that the file is named in, and `proto` stays as it is, unless links lead out of there to files that
    `data_file` allows: a model in memory has no file of its own whose folder would allow them.
    """
    named = Path(model).absolute().parent
    places = {location: data_file(model, location) for location in external_files(proto)}
    found = [place for place in places.values() if place and place.is_file()]
    if len(found) < len(places) or all(place.is_relative_to(os.path.realpath(named)) for place in found):
        return named
    folder = os.path.commonpath([place.parent for place in found])
    for tensor in all_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location" and (place := places.get(entry.value)):
                entry.value = os.path.relpath(place, folder)
    return Path(folder)


def inlined(model: ModelProto) -> ModelProto | None:
    """A model with the nodes of its functions in place of their calls, which may be itself.

    None where calls are very many, go in a circle or do not fit their functions.

    TensorRT's parser gives the nodes the same names: 'node | call (function)'.
    """
    if not model.functions:
        return model
    functions = {(f.domain, f.name): f for f in model.functions}
    copies: list[FunctionProto] = []

    def call(node: NodeProto, inside: str) -> None:
        """Let a call, and those inside what it calls, each have a copy of its function, whose nodes say the way."""
        function = functions.get((node.domain, node.op_type))
        for inner in (inner for body in bodies(node) for inner in body.node):
            call(inner, inside)
        if function is None or len(copies) > CALLS:
            return
        way = f" | {label(node)} ({node.op_type}){inside}"
        copies.append(copy := FunctionProto())
        copy.CopyFrom(function)
        copy.name = node.op_type = f"{function.name}_{len(copies)}"
        for inner in copy.node:
            name = label(inner) + way
            call(inner, way)
            inner.name = name

    named = ModelProto()
    named.CopyFrom(model)
    try:
        for node in named.graph.node:
            call(node, "")
        if len(copies) > CALLS:
            return None
        del named.functions[:]
        named.functions.extend(copies)
        flat = onnx.inliner.inline_local_functions(named, convert_version=True)
    except RuntimeError:  # Python's of a circle, or onnx's of a call that does not fit its function
        return None
    for node in all_nodes(flat.graph):
        if " | " in node.name:
            node.name = re.sub(r"__\d+$", "", node.name)  # which the inliner adds
    return flat
