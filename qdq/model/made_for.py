"""For which compiler's engine a Q/DQ model was made: an entry of the file's metadata, which goes where the file goes.

key of a compiler -> `mark` -> ONNX file -> `made_for` -> the key, "" of anyone else's model. Must not know a compiler.
"""

from __future__ import annotations

from onnx import ModelProto

KEY = "qdq.compiler"


def mark(proto: ModelProto, compiler: str) -> None:
    """Write the compiler into a model, in the place of another."""
    others = [entry for entry in proto.metadata_props if entry.key != KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(others)
    proto.metadata_props.add(key=KEY, value=compiler)


def made_for(proto: ModelProto) -> str:
    """The compiler that is written in a model; "" where none is."""
    return next((entry.value for entry in proto.metadata_props if entry.key == KEY), "")
