"""One ONNX model as a value: load and check it, ask questions about it, save it.

    load(path) -> Model        checked; tensor data in side files stays there and is read one tensor at a time
    Model -> pass -> Model     a pass copies the proto, changes the copy and ends with model.replace(copy)
    save(model, path)          to a temporary name that is then renamed; side file where the source had one

It must not change a graph, modify a user's file, or hold all external weights in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from qdq.model.external import embedded, tensor_array
from qdq.model.nodes import (
    all_graphs,
    all_nodes,
    all_tensors,
    bodies,
    captured,
    controlled_nodes,
    controls,
    made,
)
from qdq.model.opset import opset_of

if TYPE_CHECKING:
    from onnx_graphsurgeon import Graph

Held = bool | int  # the value of an input of one element


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Name, type and shape of a tensor.

    `dtype` is numpy's name ("float32", "bfloat16", "int4"), "string", or the ONNX kind of a value that is no tensor
    ("sequence_type"). `shape` is None when the rank is unknown; a dimension is a size, a symbol's name, or None.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What a model's own quantizer makes of a tensor: codes round(x / scale) + zero_point, of INT8 from -128 to 127."""

    scale: float
    zero_point: int
    format: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightGrid:
    """What it makes of the weight of a product.

    Attributes:
        scale: (output channels,), or one; with blocks (output channels, blocks).
        largest: (output channels,) largest magnitudes of what its codes stand for.
        format: of the codes.
        block: inputs that share a scale; None for all of them.
    """

    scale: np.ndarray
    largest: np.ndarray
    format: str
    block: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """The quantizers that a model came with, before they were taken out.

    Attributes:
        tensors: tensor -> its grid.
        operands: operand of a product, "node:index" -> the grid of what it reads.
        weights: product -> the grid of its constant factor.
    """

    tensors: Mapping[str, Grid]
    operands: Mapping[str, Grid]
    weights: Mapping[str, WeightGrid]

    def of(self, tensor: str, consumers: Iterable[str]) -> Grid | None:
        """The grid of a tensor: that of the first product that reads it, else of the tensor."""
        return next((self.operands[c] for c in consumers if c in self.operands), self.tensors.get(tensor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One place that reads a tensor: `node.input[index]`.

    Index -1 means inside a body of the node that the tensor comes into from around it.
    """

    node: NodeProto
    index: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """An ONNX model that is never changed in place: the indexes below are built once from `proto`.

    `proto` holds no external tensor data; `directory` is the folder that such data lies in, unless it is in a store.
    `sha256` is of the file and the external data as the user gave them, and stays the same through all passes.
    `keeps` are what must live as long as the model: the stores of its tensors.
    `file` holds exactly this model; None where `proto` was repaired or changed, or never was in a file.
    `notes` are what a user must know of how it was prepared, one sentence each.
    `trained` is what quantizers say that the user's model came with; they are no nodes of it any more.
    `held_inputs` are those that it no longer reads, and the values that it computes with in their place.
    """

    proto: ModelProto
    directory: Path
    sha256: str
    keeps: tuple[object, ...] = ()
    file: Path | None = None
    notes: tuple[str, ...] = ()
    held_inputs: Mapping[str, Held] = field(default_factory=dict)
    trained: Trained | None = None

    def with_trained(self, trained: Trained) -> Model:
        """The same with what quantizers that were taken out say."""
        return replace(self, trained=trained)

    def replace(self, proto: ModelProto, *, keeps: object = None, notes: tuple[str, ...] = ()) -> Model:
        """The same user's model with another graph: a changed copy, the store of tensors that are new in it, new notes.

        External tensors still lie in `directory`, or in a store.
        """
        kept = self.keeps if keeps in (None, *self.keeps) else (*self.keeps, keeps)
        return replace(self, proto=proto, file=None, keeps=kept, notes=(*self.notes, *notes))

    def to_graphsurgeon(self) -> Graph:
        """A copy for onnx-graphsurgeon, its values in memory; 4-bit codes are exported again if nobody reads them.

        Raises:
            ModelError: external data can no longer be read.
        """
        from onnx_graphsurgeon import import_onnx

        proto = ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in all_tensors(proto):
            tensor.CopyFrom(embedded(tensor, self.directory))
        return import_onnx(proto)

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.proto.graph

    @cached_property
    def opset(self) -> int:
        """The version of the default operator set, 0 if it is not imported."""
        return opset_of(self.proto)

    @cached_property
    def initializers(self) -> Mapping[str, TensorProto]:
        """The initializers of the main graph by name; `array` gives their values."""
        return {t.name: t for t in self.graph.initializer}

    @cached_property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """What the caller must feed: graph inputs that are not initializers."""
        return tuple(_info(v) for v in self.graph.input if v.name not in self.initializers)

    @cached_property
    def measured(self) -> dict[tuple[tuple[int, ...], ...], Mapping[str, int]]:
        """What was measured of this very model: shapes of the inputs -> tensor -> bytes; empty at first."""
        return {}

    @cached_property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """The graph's outputs."""
        return tuple(_info(v) for v in self.graph.output)

    @cached_property
    def _infos(self) -> Mapping[str, TensorInfo]:
        found = {
            t.name: TensorInfo(name=t.name, dtype=dtype_name(t.data_type), shape=tuple(t.dims))
            for t in self.graph.initializer
        }
        for graph in all_graphs(self.graph):
            for value in (*graph.value_info, *graph.output, *graph.input):
                found.setdefault(value.name, _info(value))
        return found

    @cached_property
    def _producers(self) -> Mapping[str, NodeProto]:
        nodes = (*controlled_nodes(self.graph), *self.graph.node)
        return {name: node for node in nodes for name in node.output if name}

    @cached_property
    def _consumers(self) -> Mapping[str, tuple[Use, ...]]:
        found: dict[str, list[Use]] = {}
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                if name:
                    found.setdefault(name, []).append(Use(node=node, index=index))
            for name in sorted(captured(node)):
                found.setdefault(name, []).append(Use(node=node, index=-1))
        for node in controlled_nodes(self.graph):
            for index, name in enumerate(node.input):
                if name in self.inner_tensors:
                    found.setdefault(name, []).append(Use(node=node, index=index))
            for name in sorted(captured(node) & self.inner_tensors):
                found.setdefault(name, []).append(Use(node=node, index=-1))
        return {name: tuple(uses) for name, uses in found.items()}

    @cached_property
    def _given(self) -> frozenset[str]:
        held = (body for node in self.graph.node if controls(node) for body in bodies(node))
        inner = (value.name for body in held for graph in all_graphs(body) for value in graph.output)
        return frozenset((*(value.name for value in self.graph.output), *inner))

    @cached_property
    def _nodes(self) -> Mapping[str, NodeProto]:
        return {node.name: node for node in (*controlled_nodes(self.graph), *self.graph.node)}

    @cached_property
    def inner_nodes(self) -> frozenset[str]:
        """Names of the nodes in the bodies of If, Loop and Scan; the tensors that they make have no producer here."""
        return frozenset(node.name for node in controlled_nodes(self.graph))

    @cached_property
    def inner_tensors(self) -> frozenset[str]:
        """Names of the tensors that exist in the bodies of If, Loop and Scan only."""
        held = (body for node in self.graph.node for body in bodies(node))
        inner = (g for body in held for g in all_graphs(body))
        return frozenset(name for g in inner for name in (*(v.name for v in g.input), *made(g.node)) if name)

    def held(self, name: str) -> np.ndarray | None:
        """The values of a constant of the graph or of the body of an If, Loop or Scan; None where it is computed."""
        tensor = self.initializers.get(name, self._inner_initializers.get(name))
        return None if tensor is None else tensor_array(tensor, self.directory)

    @cached_property
    def _inner_initializers(self) -> Mapping[str, TensorProto]:
        inner = (body for node in self.graph.node if controls(node) for body in bodies(node))
        return {t.name: t for body in inner for graph in all_graphs(body) for t in graph.initializer}

    def node(self, name: str) -> NodeProto:
        """The node of that name, in bodies too; names are unique once the model is prepared.

        Raises:
            KeyError: there is none.
        """
        return self._nodes[name]

    def producer(self, tensor: str) -> NodeProto | None:
        """The node that computes a tensor; None for inputs and initializers."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> tuple[Use, ...]:
        """Every place that reads a tensor, in the order of the nodes; a graph output is no consumer."""
        return self._consumers.get(tensor, ())

    def only_use(self, tensor: str) -> Use | None:
        """The one place that reads a tensor; None if there are others or none, or it is an output of the graph."""
        uses = self.consumers(tensor)
        return uses[0] if len(uses) == 1 and not self.is_output(tensor) else None

    def is_output(self, tensor: str) -> bool:
        """Whether the tensor is an output of the graph, or of the body that it is in."""
        return tensor in self._given

    def is_constant(self, name: str) -> bool:
        """Whether the tensor is an initializer."""
        return name in self.initializers

    def info(self, tensor: str) -> TensorInfo | None:
        """Type and shape of a tensor, as far as the file or shape inference knows them."""
        return self._infos.get(tensor)

    def dtype(self, tensor: str) -> str:
        """The type of a tensor as NumPy and ml_dtypes name it; "float32" where it is not known."""
        info = self.info(tensor)
        return "float32" if info is None else info.dtype

    def rank(self, tensor: str) -> int | None:
        """How many axes a tensor has; None where that is not known."""
        info = self.info(tensor)
        return None if info is None or info.shape is None else len(info.shape)

    def sizes(self, tensor: str, start: int = 0) -> tuple[int, ...] | None:
        """The sizes of a tensor from an axis on; None where one of them is dynamic, or the rank is not known."""
        info = self.info(tensor)
        if info is None or info.shape is None:
            return None
        static = tuple(size for size in info.shape[start:] if isinstance(size, int))
        return static if len(static) == len(info.shape[start:]) else None

    def names(self) -> set[str]:
        """What no new node or tensor can be called."""
        used = (name for node in all_nodes(self.graph) for name in (node.name, *node.input, *node.output))
        ends = (v.name for graph in all_graphs(self.graph) for v in graph.input)
        return {*self.initializers, *ends, *used} - {""}

    def array(self, name: str) -> np.ndarray:
        """The values of an initializer, read from its side file if it has one, in its own type; perhaps read-only.

        Raises:
            ModelError: the side file is gone, too short or outside the folder.
        """
        return tensor_array(self.initializers[name], self.directory)


@cache
def dtype_name(data_type: int) -> str:
    """Numpy's name of an ONNX tensor type; "string" for text, "undefined" for none, "type 999" for one that is not."""
    if data_type not in TensorProto.DataType.values():
        return f"type {data_type}"
    if data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return str(TensorProto.DataType.Name(data_type)).lower()
    return str(onnx.helper.tensor_dtype_to_np_dtype(data_type).name)


def _info(value: ValueInfoProto) -> TensorInfo:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return TensorInfo(name=value.name, dtype=str(kind or "undefined"), shape=None)
    tensor = value.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        sized = ((d, d.HasField("dim_value") and d.dim_value >= 0) for d in tensor.shape.dim)  # some write -1 for open
        shape = tuple(d.dim_value if known else d.dim_param or None for d, known in sized)
    return TensorInfo(name=value.name, dtype=dtype_name(tensor.elem_type), shape=shape)
