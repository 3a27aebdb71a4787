"""Run a model whose weights are not to be in memory at once: a part of its nodes after the other.

Model + wanted tensors -> parts, each with about PART_BYTES of weights -> for each sample and part a session whose
weights are mapped from their files, closed before the next one opens -> the wanted tensors.
A part's weights count while it runs, as mapped pages; its outputs that later parts read are kept until then. Opening a
session costs a millisecond, for no weight is copied. This module must not decide which models are run so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper

from qdq.core.resources import MemoryBudget, default_bytes
from qdq.model.external import MAPPED, External, embedded, is_external, is_packed, refer, tensor_array, tensor_bytes
from qdq.model.model import Model
from qdq.model.nodes import needed, reads, without_initializers
from qdq.passes.draft import Draft

PART_BYTES = 1 << 28  # of weights in one part, as floats; a node with more is a part by itself
OPEN_BYTES = 640 << 20  # of weights in the parts that run at a time on several threads, or half of the budget


def open_bytes() -> int:
    """OPEN_BYTES, or half of the budget where that is less; a part that needs more runs alone."""
    return min(OPEN_BYTES, default_bytes() // 2)


Array = npt.NDArray[Any]
Open = Callable[[bytes, Mapping[str, Array], Path], tuple[Any, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPart:
    """Some nodes, in the order of the graph.

    Attributes:
        proto: serialized; large weights are in it by type and shape only.
        weights: name -> tensor, of those.
        inputs: tensors that are fed: of the sample, or of parts before.
        outputs: tensors that later parts read, or that are wanted.
        last: inputs and outputs that nothing reads after this part.
    """

    proto: bytes
    weights: Mapping[str, TensorProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...]


class PartitionedSession:
    """As far as a `Session` goes an `onnxruntime.InferenceSession`; may be run from several threads at once."""

    def __init__(self, model: Model, wanted: Sequence[str], start: Open) -> None:
        """Cut the model up; no session is open yet.

        Args:
            model: its large weights are external.
            wanted: computed tensors.
            start: makes a session from a serialized model, the values of its external tensors, and the folder in
                which the model says that they are; returns it with what must live as long as it.
        """
        self._directory: Path = model.directory
        self._keeps = model.keeps
        self._start = start
        self._parts = _cut(model, wanted)
        self._folder = _any_file(model).parent
        self._room = MemoryBudget(open_bytes())
        fed = {i.name for i in model.inputs}
        self.inputs = tuple(dict.fromkeys(name for part in self._parts for name in part.inputs if name in fed))

    def run(self, wanted: Sequence[str], sample: Mapping[str, Array]) -> list[Array]:
        """The wanted tensors, some of those given at the start, of one sample: input name -> array."""
        values: dict[str, Array] = {name: sample[name] for name in self.inputs}
        for part in self._parts:
            with self._room.taken(sum(map(_working_bytes, part.weights.values()))):
                arrays = {name: tensor_array(tensor, self._directory) for name, tensor in part.weights.items()}
                session, held = self._start(part.proto, arrays, self._folder)
                found = session.run(list(part.outputs), {name: values[name] for name in part.inputs})
                del session, held, arrays
            values.update(zip(part.outputs, found, strict=True))
            for name in part.last:
                values.pop(name, None)
        return [values[name] for name in wanted]


def _cut(model: Model, wanted: Sequence[str]) -> tuple[ModelPart, ...]:
    groups: list[list[NodeProto]] = []
    room, held = 0, set[str]()
    for node in needed(model.graph.node, wanted):
        new = {name for name in reads(node) if name in model.initializers} - held
        size = sum(map(_working_bytes, map(model.initializers.__getitem__, new)))
        if not groups or size > max(room, 0):
            groups.append([])
            room, held = PART_BYTES, set()
        groups[-1].append(node)
        held |= new
        room -= size
    last: dict[str, int] = {}
    for index, group in enumerate(groups):
        last.update((name, index) for node in group for name in reads(node))
    last.update((name, len(groups)) for name in wanted)
    draft = Draft(model)
    draft.infer()
    return tuple(_part(model, draft.shown, group, index, last) for index, group in enumerate(groups))


def _working_bytes(tensor: TensorProto) -> int:
    """Memory of an external weight while it is used: codes are dequantized to float32 beside."""
    if not is_external(tensor):
        return 0
    floats = tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    return tensor_bytes(tensor) + (0 if floats else 4 * math.prod(tensor.dims))


def _part(model: Model, shown: Model, nodes: Sequence[NodeProto], index: int, last: Mapping[str, int]) -> ModelPart:
    read = dict.fromkeys(name for node in nodes for name in reads(node))
    made = [name for node in nodes for name in node.output if name]
    inputs = tuple(name for name in read if name not in model.initializers and name not in set(made))
    outputs = tuple(name for name in made if last.get(name, -1) > index)
    infos = {name: shown.info(name) for name in inputs}
    proto = excerpt(model, nodes, {n: np.dtype(i.dtype if i is not None else np.float32) for n, i in infos.items()})
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    weights = _give(proto, model, read)
    ended = tuple(name for name in (*inputs, *outputs) if last.get(name, -1) <= index)
    return ModelPart(proto=proto.SerializeToString(), weights=weights, inputs=inputs, outputs=outputs, last=ended)


def excerpt(model: Model, nodes: Sequence[NodeProto], inputs: Mapping[str, np.dtype[Any]]) -> ModelProto:
    """Some nodes of a model by themselves, without initializers and outputs; inputs have these types and any shape."""
    proto = without_initializers(model.proto)
    graph = proto.graph
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    for name, dtype in inputs.items():
        graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), None))
    return proto


def _any_file(model: Model) -> Path:
    """Some file of external data; the sessions' folder of external data is its own."""
    return next(External.of(t, model.directory).path for t in model.graph.initializer if is_external(t))


def _give(proto: ModelProto, model: Model, read: Mapping[str, None]) -> dict[str, TensorProto]:
    """Add the initializers that are read; returns those whose values are given to the session apart."""
    weights = {}
    file = _any_file(model)  # ONNX Runtime demands that it is there, and does not read it
    for name in read:
        tensor = model.initializers.get(name)
        if tensor is None:
            continue
        if is_external(tensor) and tensor_bytes(tensor) >= MAPPED and not is_packed(tensor):
            weights[name] = tensor
            shown = proto.graph.initializer.add()
            shown.CopyFrom(tensor)
            del shown.external_data[:]
            refer(shown, location=file.name, offset=0, length=tensor_bytes(tensor))
        else:
            proto.graph.initializer.append(embedded(tensor, model.directory))
    return weights
