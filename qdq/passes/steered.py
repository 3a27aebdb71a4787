"""Inputs that steer: they choose the branch of an If, as the sampling rate of a voice detector does, or say how often a
Loop turns; and a model with their values in it.

Model -> `steering`: the inputs -> `held`: the model in which they are constants, so that one branch of each If and the
turns of each Loop are left.
It must not take inputs from a model's list: what is fed stays the same, and is no longer read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, numpy_helper

from qdq.model.model import Model
from qdq.model.nodes import Names, all_graphs, all_nodes, reads
from qdq.passes.prepare import prepare

_STEERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def steering(model: Model) -> dict[str, str]:
    """Inputs of one bool or integer -> the If or Loop of the main graph that they steer, and nothing else does.

    What is computed of sizes counts as known: a compiler fixes these.
    """
    single = {i.name for i in model.inputs if i.dtype in _STEERS and i.shape in ((), (1,))}
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in ("If", "Loop") and not node.domain and node.input[0]:
            sources = _sources(model, node.input[0])
            if sources <= single:
                found |= {name: f"{node.op_type} {node.name!r}" for name in sorted(sources)}
    return found


def held(model: Model, values: Mapping[str, np.ndarray]) -> Model:
    """A prepared model in which inputs are constants, prepared again; they stay inputs, which nothing reads."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    fresh = Names(model.names()).fresh
    names = {name: fresh(f"{name}_held") for name in values}
    for node in all_nodes(proto.graph):
        node.input[:] = [names.get(name, name) for name in node.input]
    for graph in all_graphs(proto.graph):
        if graph is not proto.graph:
            for value in graph.output:  # a branch may give what it is told
                value.name = names.get(value.name, value.name)
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(values[name]), names[name]) for name in values)
    return prepare(model.replace(proto))


def _sources(model: Model, tensor: str) -> set[str]:
    """The inputs that the values of a tensor are computed of."""
    inputs, found, front = {i.name for i in model.inputs}, set[str](), [tensor]
    seen: set[str] = set()
    while front:
        name = front.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in inputs:
            found.add(name)
        elif (node := model.producer(name)) is not None and node.op_type not in ("Shape", "Size"):
            front += reads(node)
    return found
