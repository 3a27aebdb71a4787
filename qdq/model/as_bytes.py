"""A model as bytes for the cache of earlier work, and back.

Must not keep a model whose weights lie in a store of this process, nor data that lie beside a file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from onnx import ModelProto

from qdq.core.disk.cache import hashed
from qdq.model.model import Model


def identity(model: Model) -> tuple[str, str]:
    """Hashes of the user's file with the data beside it, and of the graph with the weights in it: a key of a cache."""
    return (
        model.sha256,
        hashed(model, lambda: hashlib.sha256(model.proto.SerializeToString(deterministic=True)).hexdigest()),
    )


def packed(model: Model) -> dict[str, bytes] | None:
    """The graph, and what is said of it; None where that is not all of the model."""
    if model.keeps:
        return None
    facts = {"notes": model.notes, "held_inputs": dict(model.held_inputs)}
    return {"proto": model.proto.SerializeToString(deterministic=True), "facts": json.dumps(facts).encode()}


def unpacked(parts: dict[str, bytes], source: Model) -> Model:
    """The model that `packed` took, made of a user's model as it was loaded, or of another form of it."""
    proto, facts = ModelProto(), json.loads(parts["facts"])
    proto.ParseFromString(parts["proto"])
    return replace(source, proto=proto, file=None, notes=tuple(facts["notes"]), held_inputs=facts["held_inputs"])
