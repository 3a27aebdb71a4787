"""An ONNX graph from a file, without its external data."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import onnx

from engines.core.errors import BuildError
from engines.core.files import read_file

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
