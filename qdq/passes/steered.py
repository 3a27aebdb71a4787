"""Inputs that steer: they choose the branch of an If, as the sampling rate of a voice detector does, or say how often a
Loop turns; and a model with their values in it.

Model -> `steering`: the inputs -> `held`: the model in which they are constants, so that one branch of each If and the
turns of each Loop are left. A model that was quantized on samples of one value tells it (`noted`, `value_noted`).
It must not take inputs from a model's list: what is fed stays the same, and is no longer read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.model.model import Held, Model
from qdq.model.nodes import Names, all_graphs, all_nodes, reads
from qdq.model.storage import is_quantized
from qdq.passes.draft import Draft
from qdq.passes.prepare import prepare, simplify

_STEERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_NOTED = "qdq.steered"  # key of a model's metadata: what the inputs that steer were in all calibration samples


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


def advice(model: Model, sizing: str = "") -> str:
    """What to do where a compiler does not take a model as it is, in a sentence; "" where no input steers it.

    `sizing` is an input whose values decide sizes, as the compiler says.
    """
    if any(i.name == sizing for i in model.inputs):
        read = next((n for n in all_nodes(model.graph) if sizing in n.input), None)
        node = f", the first in {read.op_type} {read.name!r}" if read is not None else ""
        return (
            f"The values of input {sizing!r} decide sizes{node}, and an engine has the sizes of its inputs alone: "
            f"choose a value, by --hold {sizing}=VALUE of build, audit, tune, deploy or compare if it is one integer, "
            "or make it a constant and export the model again."
        )
    steered = steering(model)
    if not steered:
        return ""
    names, node = ", ".join(map(repr, steered)), next(iter(steered.values()))
    what = "branches" if node.startswith("If") else "numbers of turns"
    held = " ".join(f"--hold {name}=VALUE" for name in steered)
    return (
        f"{node} is steered by input {names}: if the compiler does not take all its {what} at one set of sizes, choose "
        f"the value that the engine is for, by {held} of build, audit, tune, deploy or compare."
    )


def held(model: Model, values: Mapping[str, Held]) -> Model:
    """A model in which inputs are constants, a float one prepared again; they stay inputs, which nothing reads.

    Raises:
        InputError: the model has no such input of one bool or integer, or it cannot have the value; or it is held at
            another one.
    """
    if all(name in model.held_inputs and model.held_inputs[name] == value for name, value in values.items()):
        return model
    if other := next((n for n, value in values.items() if model.held_inputs.get(n, value) != value), None):
        raise InputError(
            f"Input {other!r} is to be held at {values[other]} and at {model.held_inputs[other]}. Choose one."
        )
    values = {name: value for name, value in values.items() if name not in model.held_inputs}
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
    proto.graph.initializer.extend(
        numpy_helper.from_array(_array(model, name, value), names[name]) for name, value in values.items()
    )
    alone = replace(model.replace(proto), held_inputs={**model.held_inputs, **values})
    if not is_quantized(model):
        return prepare(alone)
    draft = Draft(alone)
    simplify(draft)
    return draft.finish()


def values_of(samples: Iterable[Mapping[str, np.ndarray]], names: Iterable[str]) -> dict[str, Held] | None:
    """The values that inputs of one element have in all samples; None where they differ, or there is no sample."""
    found: dict[str, Held] = {}
    for sample in samples:
        seen = {name: np.asarray(sample[name]).item() for name in names}
        if found and seen != found:
            return None
        found = seen
    return found or None


def noted(model: Model, values: Mapping[str, Held] | None) -> Model:
    """The model with a note of the values that inputs had in all samples that it was made from."""
    if not values:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    others = {entry.key: entry.value for entry in proto.metadata_props}
    helper.set_model_props(proto, {**others, _NOTED: json.dumps(dict(values), sort_keys=True)})
    return model.replace(proto)


def value_noted(model: Model) -> dict[str, Held]:
    """What `noted` wrote of the inputs that still steer a model; empty where there is nothing, or no such thing."""
    texts = [entry.value for entry in model.proto.metadata_props if entry.key == _NOTED]
    try:
        read: Any = json.loads(texts[0]) if texts else {}
    except (ValueError, RecursionError):
        return {}
    steered = steering(model)
    if not isinstance(read, dict) or read.keys() != steered.keys():
        return {}
    return read if all(isinstance(value, int) for value in read.values()) else {}


def said(values: Mapping[str, Held]) -> str:
    """Values in words.

    >>> said({"rate": 16, "on": True})
    "'rate' is 16, 'on' is True"
    """
    return ", ".join(f"{name!r} is {value}" for name, value in values.items())


def _array(model: Model, name: str, value: Held) -> np.ndarray:
    """The value of an input, in its type and shape."""
    info = {i.name: i for i in model.inputs}[choose(name, [i.name for i in model.inputs], "input")]
    if info.dtype not in _STEERS or info.shape not in ((), (1,)):
        raise InputError(
            f"Input {name!r} cannot be held at {value}: it is {info.dtype} of shape {list(info.shape or ())}, and only "
            "an input of one bool or integer can be held. Leave it out."
        )
    limits = (0, 1) if info.dtype == "bool" else (np.iinfo(info.dtype).min, np.iinfo(info.dtype).max)
    if not limits[0] <= value <= limits[1]:
        raise InputError(f"Input {name!r} cannot be held at {value}: it is {info.dtype}. Choose a value of that type.")
    return np.full(info.shape, value, info.dtype)


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
