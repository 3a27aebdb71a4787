"""A float model on its way to the prepared form: its nodes, tensors and inferred shapes while passes change them.

    Draft(model) -> passes of `prepare` and `fold` change nodes and tensors, `infer` after each round -> finish()
It must not change the user's proto or tensors, or decide which passes run. onnx-graphsurgeon does not stand in: its
`toposort` reorders sorted nodes, and its exporter drops metadata and doc strings of nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from engines.core.shapes import propagated, show_constants
from qdq.core.errors import ModelError
from qdq.model.external import is_external, is_large, tensor_array, tensor_bytes
from qdq.model.model import Model, TensorInfo
from qdq.model.nodes import (
    all_graphs,
    all_nodes,
    attribute,
    captured,
    constant_tensor,
    needed,
    reads,
    without_initializers,
)
from qdq.model.opset import with_opset
from qdq.model.storage import check
from qdq.model.weight_store import LEAST, WeightStore

TARGET_OPSET = 21  # the first with block_size and int4 in Q/DQ; newer is needed for float4 only
SMALL = 4096  # bytes; larger tensors are shown to onnx's converter and shape inference by type and shape only


class Draft:
    """The model in the making: nodes in `proto`, initializers in `tensors`, shapes in `shown` after `infer`.

    The user's tensors are shared, never changed: a new value is a new TensorProto.
    """

    def __init__(self, model: Model, taken: Collection[str] = ()) -> None:
        """Take a model apart; `taken` are names that nothing new may have."""
        self._source, self._taken = model, taken
        self.directory: Path = model.directory
        self.tensors: dict[str, TensorProto] = dict(model.initializers)
        self.proto = without_initializers(model.proto)
        self.shown = model
        self.store: WeightStore | None = None  # of new tensors of a large model
        self._large = is_large(self.tensors.values())
        self.inputs = [_opened(v) for v in model.graph.input if v.name not in self.tensors]
        self.outputs = list(map(_opened, model.graph.output))
        self._stated = {v.name: v for v in self.graph.value_info}
        assign(self.graph.input, self.inputs)
        assign(self.graph.output, self.outputs)
        self.proto.ir_version = max(self.proto.ir_version, 4)  # from 4 on an initializer need not be an input

    @property
    def graph(self) -> onnx.GraphProto:
        """The nodes, without initializers."""
        return self.proto.graph

    @property
    def output_names(self) -> frozenset[str]:
        """The model's outputs."""
        return frozenset(v.name for v in self.graph.output)

    def array(self, name: str) -> np.ndarray:
        """The values of an initializer."""
        return tensor_array(self.tensors[name], self.directory)

    def put(self, name: str, values: np.ndarray) -> None:
        """Make or replace an initializer."""
        if self._large and values.nbytes >= LEAST:
            self.store = self.store or WeightStore()
            self.tensors[name] = self.store.tensor(name, values)
        else:
            self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)

    def info(self, name: str) -> TensorInfo | None:
        """Type and shape as last inferred."""
        return self.shown.info(name)

    def unique(self, name: str) -> str:
        """A tensor name that nothing in the model has yet: `name`, or `name` with a number."""
        return unique(name, self.names())

    def names(self) -> set[str]:
        """The names of all tensors, in bodies too."""
        inner = [tensor for node in all_nodes(self.graph) for tensor in (*node.input, *node.output)]
        graphs = [v.name for graph in all_graphs(self.graph) for v in (*graph.input, *graph.output)]
        return {*self.tensors, *inner, *graphs, *self._taken}

    def captured_names(self) -> frozenset[str]:
        """Tensors that bodies read from the main graph."""
        return frozenset().union(*(captured(node) for node in self.graph.node))

    def light(self) -> ModelProto:
        """The model without the weights: small tensors are initializers, larger ones stand as inputs."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        # a shape written before somebody made an input dynamic would pass for static; inference finds all but these
        foreign = {name for node in self.graph.node if node.domain for name in node.output}
        assign(proto.graph.value_info, [v for v in self.graph.value_info if v.name in foreign])
        for name, tensor in self.tensors.items():
            if tensor_bytes(tensor) > SMALL:
                proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
            else:
                inside = numpy_helper.from_array(self.array(name), name) if is_external(tensor) else tensor
                proto.graph.initializer.append(inside)
        return proto

    def _shown(self) -> ModelProto:
        """The light model for shape inference."""
        proto = self.light()
        show_constants(proto.graph, {tensor.name: tensor for tensor in proto.graph.initializer})
        return proto

    def absorb(self, light: ModelProto) -> None:
        """Take back a light model that a tool of onnx has changed."""
        for tensor in light.graph.initializer:
            if tensor.name not in self.tensors:
                self.tensors[tensor.name] = tensor
        self.proto = without_initializers(light)
        assign(self.graph.input, self.inputs)
        assign(self.graph.output, self.outputs)

    def name_nodes(self) -> None:
        """Give every node without a name one of its own: <OpType>_<index>."""
        taken = {node.name for node in all_nodes(self.graph)}
        for index, node in enumerate(self.graph.node):
            if not node.name:
                node.name = unique(f"{node.op_type}_{index}", taken)
                taken.add(node.name)

    def raise_opset(self) -> None:
        """Convert to opset 21 where the model's is older; large weights are not given to onnx's converter."""
        opset = self.shown.opset
        if 0 < opset < TARGET_OPSET:
            try:
                raised = with_opset(self.light(), TARGET_OPSET)
                check(raised)
            except (ValueError, onnx.checker.ValidationError) as error:
                raise ModelError(
                    f"Cannot raise this model from opset {opset} to {TARGET_OPSET}: onnx {onnx.__version__} says: "
                    f"{' '.join(str(error).split())[:500]} Export the model again with opset 17 or newer."
                ) from None
            self.absorb(raised)
            if opset < 11:
                self.keep_old_resize()
        used = {node.domain for node in all_nodes(self.graph)}
        assign(self.proto.opset_import, [entry for entry in self.proto.opset_import if entry.domain in used])
        self.proto.ir_version = max(10, helper.find_min_ir_version_for(self.proto.opset_import, ignore_unknown=True))

    def keep_old_resize(self) -> None:
        """Write out how Upsample and Resize placed samples before opset 11; the converter leaves the newer defaults.

        The standard of opset 10 leaves it open; measured with ONNX Runtime 1.31: asymmetric, and nearest takes the
        floor to enlarge and the ceiling to shrink. Not measured: nearest that enlarges one axis and shrinks another.
        """
        for node in all_nodes(self.graph):
            if node.op_type == "Resize" and not node.domain:
                scales = self.array(node.input[2]) if node.input[2] in self.tensors else np.ones(1)
                nearest = "ceil" if (scales < 1).any() and (scales <= 1).all() else "floor"
                kept = [a for a in node.attribute if a.name == "mode"]
                values = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": nearest}
                assign(node.attribute, [*kept, *(helper.make_attribute(k, v) for k, v in values.items())])

    def lift_constants(self) -> None:
        """Turn Constant nodes into initializers; text, sparse values and outputs of the model stay nodes."""
        keep = []
        for node in self.graph.node:
            tensor = constant_tensor(node)
            if tensor is None or node.output[0] in self.output_names:
                keep.append(node)
            else:
                self.tensors[tensor.name] = tensor
        assign(self.graph.node, keep)

    def drop_unused(self) -> None:
        """Remove nodes and initializers that no output depends on."""
        nodes = needed(self.graph.node, self.output_names)
        read = self.output_names.union(*map(reads, nodes))
        assign(self.graph.node, nodes)
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in read}

    def infer(self) -> bool:
        """Infer types and shapes of all tensors; always True.

        Where inference stops, what the file says is believed, and then what the weights of convolutions say.
        """
        try:
            light = self._shown()
            proto = propagated(light)
            if believed := self._believed(proto.graph):
                light.graph.value_info.extend(believed)
                proto = propagated(light)
        except (RuntimeError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            raise ModelError(
                f"Cannot infer the shapes of this model: onnx {onnx.__version__} says: "
                f"{' '.join(str(error).split())[:500]} Export the model again."
            ) from None
        self.shown = Model(proto=proto, directory=self.directory, sha256="")
        return True

    def _believed(self, inferred: onnx.GraphProto) -> list[ValueInfoProto]:
        """What the file says of tensors that inference has no rank of; sizes only if it is right about the others."""
        found = {v.name: v for v in inferred.value_info if v.type.tensor_type.HasField("shape")}
        made = {name for node in self.graph.node for name in node.output} - found.keys() - self.output_names
        believed = [v for name, v in self._stated.items() if name in made and v.type.HasField("tensor_type")]
        if not all(_sizes(v) == _sizes(found[v.name]) for v in self._stated.values() if v.name in found):
            believed = [helper.make_tensor_value_info(v.name, v.type.tensor_type.elem_type, None) for v in believed]
        ranked = {v.name for v in believed if v.type.tensor_type.HasField("shape")}
        shown = {v.name: v for v in self._read_by_convolutions() if v.name in made - ranked}
        return [*(v for v in believed if v.name not in shown), *shown.values()]

    def _read_by_convolutions(self) -> Iterator[ValueInfoProto]:
        """The rank and the channels of what convolutions read, which their weights say."""
        for node in self.graph.node:
            weight = self.tensors.get(node.input[1]) if node.op_type in ("Conv", "ConvTranspose") else None
            groups = attribute(node, "group", 1)
            if weight is not None and not node.domain and len(weight.dims) > 2 and 0 < groups <= max(weight.dims):
                transposed = node.op_type == "ConvTranspose"
                channels = weight.dims[0] if transposed else weight.dims[1] * groups
                shape = [None, channels, *[None] * (len(weight.dims) - 2)]
                yield helper.make_tensor_value_info(node.input[0], weight.data_type, shape)

    def finish(self) -> Model:
        """The complete model without what no output depends on, with inferred types and shapes."""
        self.drop_unused()
        self.infer()
        found = {v.name: v for v in self.shown.graph.value_info}
        made = (name for node in self.graph.node for name in node.output if name not in self.output_names)
        assign(self.graph.value_info, [found[name] for name in made if name in found])
        inferred = {v.name: v for v in self.shown.graph.output}
        outputs = [v if v.type.tensor_type.HasField("shape") else inferred[v.name] for v in self.graph.output]
        assign(self.graph.output, outputs)
        self.graph.initializer.extend(self.tensors.values())
        return self._source.replace(self.proto, keeps=self.store)


def _opened(value: ValueInfoProto) -> ValueInfoProto:
    """A copy in which open sizes are so: some exporters write -1, or call each of them "?", as if they were equal."""
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    for dim in copy.type.tensor_type.shape.dim:
        if dim.dim_value < 0 or dim.dim_param == "?":
            dim.Clear()
    return copy


def _sizes(value: ValueInfoProto) -> list[int]:
    """The sizes of a tensor, 0 for one that is open."""
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def assign(field: Any, values: Iterable[Any]) -> None:
    """Replace the contents of a repeated protobuf field."""
    values = list(values)
    del field[:]
    field.extend(values)


def unique(name: str, taken: Collection[str]) -> str:
    """`name`, or the first of name_1, name_2, ... that is not taken."""
    candidates = (f"{name}_{i}" for i in itertools.count(1))
    return name if name not in taken else next(c for c in candidates if c not in taken)
