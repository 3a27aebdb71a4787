"""Make the float part of a graph FP16 or BF16, for the strongly typed world in which the file decides every type.

Model -> tensors typed -> `rules.decide`: nodes that stay FP32, each with its reason -> demands: the types in
which each tensor is read -> nodes and constants written once per demanded type, Casts only where the types meet.
It must not change codes, scales beyond rounding, node names, or the type of inputs and outputs unless asked.

| tensor | in two types |
|---|---|
| constant | stored once per type that is read |
| DequantizeLinear of a constant scale, Cast of a non-float32 tensor | the node is written once per type |
| any other | written in the type of its node; one Cast behind it serves all readers of the other type |

Q keeps the type of what it reads, so no Cast comes between a tensor and its quantizer, nor between DQ and its reader.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from engines.core.operators import MOVERS, RECURRENCES
from engines.core.shapes import light, propagated
from qdq.assemble.precision.cancelled import cancelled
from qdq.assemble.precision.rules import LIMIT, decide, masks, saturated
from qdq.assemble.precision.shift import compensate
from qdq.assemble.precision.types import ELEM, Lowered, Schema, dequantizes_constant_scale, finfo, fits, retyped
from qdq.core.choices import choose
from qdq.measure.table import CalibrationTable
from qdq.model.external import is_large, release
from qdq.model.model import Model
from qdq.model.nodes import Names, attribute, captured, reads, without_initializers
from qdq.model.weight_store import WeightStore
from qdq.passes.composites import written_out
from qdq.passes.draft import TARGET_OPSET
from qdq.passes.rewrites.edit import altered
from qdq.plan.plan import Skip

FLOAT_TYPES: Mapping[str, str] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
BFLOAT16_OPSET = 22  # the first in which Conv, pooling, InstanceNormalization and others take bfloat16 (onnx.defs)
FLOAT = "float32"
_ANY_TYPE = ("Shape", "Size", "Cast")  # read a float in either type, unless a rule keeps them


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A model in the new type, and the nodes that compute in FP32 with the rule and the reason of each."""

    model: Model
    kept: tuple[Skip, ...]


def convert(
    model: Model,
    *,
    unquantized_type: str = "fp16",
    keep_io: bool = True,
    split_biases: bool = True,
    table: CalibrationTable | None = None,
    fp32: Collection[str] = (),
    one_scale: Collection[str] = (),
) -> Converted:
    """Make every float32 tensor FP16 or BF16, except what must stay FP32.

    BF16 raises the opset to 22, in which Conv has it. Scales of weights that FP16 cannot hold become its smallest
    normal number, and the codes of that channel are rounded anew.

    Args:
        model: prepared; with or without Q/DQ from `insert`.
        unquantized_type: 'fp16', 'bf16' or 'fp32': nothing changes but `composites` that FP32 has no kernel for.
        keep_io: inputs and outputs stay float32; else they take the new type too.
        split_biases: write what a float product's bias loses by rounding as a Sub behind it, which the compiler fuses.
        table: calibrated ranges; a tensor beyond half of FP16's range stays FP32, one within is trusted to fit.
        fp32: nodes that are to stay FP32 whatever they hold.
        one_scale: nodes whose weights a rewrite will give one scale, so that the type does not round them.

    Raises:
        InputError: an unknown `unquantized_type`.
    """
    low = FLOAT_TYPES[choose(unquantized_type, tuple(FLOAT_TYPES), "type for what is not quantized")]
    if low == FLOAT:
        return Converted(model=written_out(model), kept=())
    proto = _typed(model, BFLOAT16_OPSET if low == "bfloat16" else 0)
    typed = model.replace(proto)
    kept = cancelled(typed, low, table, one_scale) | decide(typed, low, table, fp32)
    typed = compensate(typed, low, kept, split_biases=split_biases, one_scale=one_scale)
    writer = _Writer(typed, low, frozenset(kept), keep_io)
    order = (kept[node.name] for node in typed.graph.node if node.name in kept)
    return Converted(model=written_out(model.replace(writer.write(), keeps=writer.store)), kept=tuple(order))


def _typed(model: Model, opset: int) -> ModelProto:
    """A copy with the type of every tensor inferred, and at least the given opset (only types were added to 22)."""
    shown = light(model.proto)
    if not model.opset:  # of other domains alone; Cast is of the default one
        shown.opset_import.append(helper.make_opsetid("", TARGET_OPSET))
    for entry in shown.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, opset)
    inferred = propagated(shown)
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.value_info[:], proto.opset_import[:]
    proto.graph.value_info.extend(inferred.graph.value_info)
    proto.opset_import.extend(shown.opset_import)
    return proto


class _Writer:
    """Writes the new graph in two walks: who reads which tensor in which type, then the nodes."""

    def __init__(self, model: Model, low: str, kept: frozenset[str], keep_io: bool) -> None:
        self._model, self._low, self._kept, self._keep_io = model, low, kept, keep_io
        self._schema = Schema(model, low)
        self.store = WeightStore() if is_large(model.graph.initializer) else None
        self._elem = ELEM[low]
        self._alias = self._find_aliases()
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._types: dict[str, int] = {}  # of tensors whose type changed or that are new
        self._shapes: dict[str, str] = {}  # new tensor -> the tensor whose shape it has
        self._name = Names(model.names()).fresh
        self._outputs = {o.name for o in model.outputs}
        self._demands: dict[str, set[str]] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._raised: dict[tuple[str, str], tuple[str, str]] = {}

    def write(self) -> ModelProto:
        """The new graph; its large new tensors lie in `store`."""
        self._collect()
        for info in self._model.inputs:
            if self._is_float(info.name):  # one that only FP32 nodes read may hold more than the low type can
                wide = self._demands.get(info.name, set()) == {FLOAT}
                self._provide(info.name, FLOAT if self._keep_io or wide else self._low, info.name)
        for node in self._model.graph.node:
            self._node(node)
        self._part_recurrences()
        self._part_norms()
        return self._finish()

    def _is_float(self, tensor: str) -> bool:
        info = self._model.info(tensor)
        return bool(tensor) and info is not None and info.dtype == FLOAT

    def _find_aliases(self) -> dict[str, str]:
        """Tensors of the low type that a Cast of the model makes from float32: they are the float32 one from now on."""
        fixed = {o.name for o in self._model.outputs}.union(*map(captured, self._model.graph.node))
        casts = [n for n in self._model.graph.node if n.op_type == "Cast" and n.output[0] not in fixed]
        low = [n for n in casts if (info := self._model.info(n.output[0])) is not None and info.dtype == self._low]
        return {node.output[0]: node.input[0] for node in low if self._is_float(node.input[0])}

    def _wanted(self, node: NodeProto, index: int) -> str:
        """The type in which a node reads its float operand."""
        return self._low if index in self._lowered(node).inputs else FLOAT

    def _made(self, node: NodeProto, index: int) -> str:
        """The type in which a node makes its float output."""
        return self._low if index in self._lowered(node).outputs else FLOAT

    def _lowered(self, node: NodeProto) -> Lowered:
        """The operands of a node that take the low type."""
        return (None if node.name in self._kept else self._schema.lowered(node)) or Lowered()

    def _collect(self) -> None:
        def demand(tensor: str, dtype: str) -> None:
            self._demands.setdefault(tensor, set()).add(dtype)

        for node in self._model.graph.node:
            for index, tensor in enumerate(node.input):
                if tensor in self._alias:
                    demand(self._alias[tensor], self._low)
                elif self._is_float(tensor) and not self._any_type(node) and not (self._free(node) and index == 1):
                    demand(tensor, self._wanted(node, index))
            for tensor in filter(self._is_float, captured(node)):
                demand(tensor, FLOAT)
        for tensor in filter(self._is_float, self._outputs):
            demand(tensor, FLOAT if self._keep_io or self._model.is_constant(tensor) else self._low)
        for node in filter(self._free, self._model.graph.node):
            if self._model.consumers(node.output[0]) and node.output[0] not in self._demands:
                demand(node.output[0], FLOAT)  # for readers to which the type is all the same
        for node in self._model.graph.node:
            if dequantizes_constant_scale(self._model, node) and self._is_float(node.output[0]):
                for dtype in self._demands.get(node.output[0], set()):
                    demand(node.input[1], dtype)

    def _free(self, node: NodeProto) -> bool:
        """Whether a node can be written once per demanded type: DQ with a constant scale, Cast from another type."""
        if node.op_type == "Cast":
            return self._is_float(node.output[0]) and not self._is_float(node.input[0])
        return dequantizes_constant_scale(self._model, node) and self._is_float(node.output[0])

    def _any_type(self, node: NodeProto) -> bool:
        """Whether a node may read a float in either type."""
        return node.op_type in _ANY_TYPE and node.name not in self._kept

    def _read(self, tensor: str, dtype: str) -> str:
        """The name of a float tensor in a type; constants are stored when first read."""
        if (tensor, dtype) in self._names:
            return self._names[tensor, dtype]
        name = tensor if dtype == FLOAT or FLOAT not in self._demands[tensor] else self._name(f"{tensor}_{dtype}")
        self._names[tensor, dtype] = name
        if dtype == FLOAT:
            self._constants[name] = self._model.initializers[tensor]
            return name
        values = self._model.array(tensor)
        if (limit := saturated(self._model, tensor, dtype)) is not None:
            values = np.where(np.isinf(values), values, np.clip(values, -limit, limit))
        self._constants[name] = self._tensor(name, values)
        release(values)
        return name

    def _tensor(self, name: str, values: np.ndarray) -> TensorProto:
        dtype = helper.tensor_dtype_to_np_dtype(self._elem)
        with np.errstate(over="ignore"):  # beyond the range only where no node computes with it
            typed = np.asarray(values).astype(dtype)
        return numpy_helper.from_array(typed, name) if self.store is None else self.store.tensor(name, typed)

    def _provide(self, tensor: str, dtype: str, name: str) -> None:
        """Note that `name` holds a float tensor in a type, and cast it for readers of the other type."""
        self._names[tensor, dtype] = name
        self._note(name, dtype, tensor)
        for other in sorted(self._demands.get(tensor, set()) - {dtype}):
            fixed = tensor in self._outputs and name != tensor
            cast = tensor if fixed or (other == FLOAT and name != tensor) else self._name(f"{tensor}_Cast")
            self._names[tensor, other] = cast
            self._note(cast, other, tensor)
            label = cast if cast != tensor else self._name(f"{tensor}_Cast")
            self._nodes.append(helper.make_node("Cast", [name], [cast], name=label, to=self._code(other)))

    def _note(self, name: str, dtype: str, like: str) -> None:
        self._types[name] = self._code(dtype)
        self._shapes[name] = like

    def _code(self, dtype: str) -> int:
        return TensorProto.FLOAT if dtype == FLOAT else self._elem

    def _node(self, node: NodeProto) -> None:
        """Write one node: once, once per demanded type, or not at all where it became a Cast to the same type."""
        if node.output[0] in self._alias:
            return
        if not any(self._is_float(t) or t in self._alias for t in (*node.input, *node.output)):
            self._nodes.append(node)
        elif self._free(node):
            for dtype in sorted(self._demands.get(node.output[0], set()), reverse=True):  # float32 before float16
                self._free_node(node, dtype)
        else:
            self._plain_node(node)

    def _free_node(self, node: NodeProto, dtype: str) -> None:
        tensor = node.output[0]
        info = self._model.info(node.input[0])
        if node.op_type == "Cast" and info is not None and info.dtype == dtype and tensor not in self._outputs:
            source = node.input[0]
            self._names[tensor, dtype] = self._read(self._alias[source], dtype) if source in self._alias else source
            return
        copy = altered(node)
        if node.input[0] in self._alias:
            copy.input[0] = self._read(self._alias[node.input[0]], self._low)
        alone = len(self._demands[tensor]) == 1
        main = alone or dtype == (FLOAT if self._keep_io or tensor not in self._outputs else self._low)
        copy.output[0] = tensor if main else self._name(f"{tensor}_{dtype}")
        copy.name = node.name if main else self._name(f"{node.name}_{dtype}")
        if node.op_type == "Cast" or any(a.name == "output_dtype" for a in node.attribute):
            copy = retyped(copy, self._code(dtype))
        if node.op_type == "DequantizeLinear":
            self._scale(copy, dtype)
        self._nodes.append(copy)
        self._names[tensor, dtype] = copy.output[0]
        self._note(copy.output[0], dtype, tensor)

    def _scale(self, node: NodeProto, dtype: str) -> None:
        """Give a DequantizeLinear its scale in a type, and weight codes that fit a raised scale."""
        codes, scale = node.input[0], node.input[1]
        if dtype != FLOAT and self._model.is_constant(codes) and not fits(self._model.array(scale), self._low):
            node.input[0], node.input[1] = self._rescaled(node)
        else:
            node.input[1] = self._read(scale, dtype)

    def _rescaled(self, node: NodeProto) -> tuple[str, str]:
        """Codes and scale of a weight some of whose scales vanish: these become the smallest normal number."""
        key = (node.input[0], node.input[1])
        if key in self._raised:
            return self._raised[key]
        scale, codes = self._model.array(node.input[1]).astype(np.float64), self._model.array(node.input[0])
        lost = ~np.array([fits(np.asarray(s), self._low) for s in scale.ravel()]).reshape(scale.shape)
        raised = np.where(lost, np.maximum(scale, float(finfo(self._low).smallest_normal)), scale)
        ratio = scale / raised
        axis = attribute(node, "axis", 1) % max(codes.ndim, 1)
        if scale.ndim == 1:
            ratio = ratio.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])
        elif scale.ndim == codes.ndim > 0:  # blocks
            ratio = np.repeat(ratio, codes.shape[axis] // scale.shape[axis], axis=axis)
        names = self._name(f"{node.input[0]}_{self._low}"), self._name(f"{node.input[1]}_{self._low}")
        scaled = codes.astype(np.float64) * ratio
        kind = TensorProto.DataType.Name(self._model.initializers[node.input[0]].data_type)
        rounded = (np.rint(scaled) if kind.startswith(("INT", "UINT")) else scaled).astype(codes.dtype)
        self._constants[names[0]] = numpy_helper.from_array(rounded, names[0])
        self._constants[names[1]] = self._tensor(names[1], raised)
        self._raised[key] = names
        return names

    def _plain_node(self, node: NodeProto) -> None:
        copy = altered(node)
        for index, tensor in enumerate(node.input):
            if tensor in self._alias:
                copy.input[index] = self._read(self._alias[tensor], self._low)
            elif self._is_float(tensor):
                dtype = self._wanted(node, index)
                if self._any_type(node):
                    dtype = next((d for d in (FLOAT, self._low) if (tensor, d) in self._names), FLOAT)
                copy.input[index] = self._read(tensor, dtype)
        made = [(i, t) for i, t in enumerate(node.output) if self._is_float(t)]
        if any(self._made(node, i) == self._low for i, _ in made):
            limit = LIMIT if masks(self._model, node) else None
            copy = retyped(copy, self._elem, limit=limit)
        self._nodes.append(copy)
        for index, tensor in made:
            dtype = self._made(node, index)
            reserved = tensor in self._outputs and dtype != (FLOAT if self._keep_io else self._low)
            captured_float = FLOAT in self._demands.get(tensor, set()) and dtype == self._low
            if reserved or (captured_float and any(use.index < 0 for use in self._model.consumers(tensor))):
                copy.output[index] = self._name(f"{tensor}_{dtype}")
            self._provide(tensor, dtype, copy.output[index])

    def _part_recurrences(self) -> None:
        """Add zero to the data of each recurrent node that a Cast makes FP32 for it, if nothing computes in between.

        TensorRT-RTX 1.7.1 fails on LSTM, GRU and RNN behind such a Cast ("Mismatched number of elements in reshape"),
        and compiles them behind any arithmetic.
        """
        makers = {name: node for node in self._nodes for name in node.output}
        for node in [node for node in self._nodes if node.op_type in RECURRENCES]:
            maker = makers.get(node.input[0])
            while maker is not None and maker.op_type in MOVERS:
                maker = makers.get(maker.input[0])
            if maker is None or maker.op_type != "Cast" or attribute(maker, "to", 0) != TensorProto.FLOAT:
                continue
            data, zero = node.input[0], self._name(f"{node.input[0]}_zero")
            node.input[0] = self._name(f"{data}_apart")
            self._constants[zero] = numpy_helper.from_array(np.zeros((), np.float32), zero)
            add = helper.make_node("Add", [data, zero], [node.input[0]], name=node.input[0])
            self._nodes.insert(next(i for i, n in enumerate(self._nodes) if n is node), add)
            self._note(node.input[0], FLOAT, data)

    def _part_norms(self) -> None:
        """Give the gain of each written-out LayerNormalization that a Cast makes FP32 one axis more than is normalized.

        ONNX Runtime makes LayerNormalization of it, leaves out the Cast, and refuses the two types of what it made
        ("bound to different types", 1.32.0); it does not where the gain has another rank than there are axes.
        """
        makers = {name: node for node in self._nodes for name in node.output}
        for node in [node for node in self._nodes if node.op_type == "Mul"]:
            for index, name in enumerate(node.input):
                gain, rank = self._constants.get(name), self._model.rank(node.output[0])
                if gain is None or rank is None or not 0 < len(gain.dims) < rank or not _normalized(node, makers):
                    continue
                values = self._model.array(name)[np.newaxis]
                node.input[index] = self._name(f"{name}_rank_{values.ndim}")
                self._constants[node.input[index]] = numpy_helper.from_array(values, node.input[index])

    def _finish(self) -> ModelProto:
        proto = without_initializers(self._model.proto)
        graph = proto.graph
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        read = {name for n in self._nodes for name in reads(n)} | self._outputs
        floats = {name for name in self._model.initializers if self._is_float(name)}
        for name in floats & read - set(self._constants):  # captured, or read by a node that allows float32 only
            self._constants[name] = self._model.initializers[name]
        graph.initializer.extend(t for t in self._model.graph.initializer if t.name in read - floats)
        graph.initializer.extend(self._constants[name] for name in sorted(self._constants) if name in read)
        for value in (*graph.input, *graph.output):
            self._change(value)
        ends = {v.name for v in (*graph.input, *graph.output)}
        old = {v.name: v for v in (*self._model.graph.value_info, *self._model.graph.output, *self._model.graph.input)}
        for name in dict.fromkeys(t for n in self._nodes for t in n.output if t and t not in ends):
            source = old.get(self._shapes.get(name, name))
            if source is not None:
                graph.value_info.append(source)
                graph.value_info[-1].name = name
                self._change(graph.value_info[-1])
        return proto

    def _change(self, value: ValueInfoProto) -> None:
        if value.name in self._types:
            value.type.tensor_type.elem_type = self._types[value.name]


def _normalized(node: NodeProto, makers: Mapping[str, NodeProto]) -> bool:
    """Whether a Mul reads (x - mean) / deviation of an x that a Cast makes FP32."""
    for quotient in (makers.get(name) for name in node.input):
        if quotient is None or quotient.op_type != "Div":
            continue
        centred, deviation = (makers.get(name) for name in quotient.input)
        source = makers.get(centred.input[0]) if centred is not None and centred.op_type == "Sub" else None
        if source is not None and source.op_type == "Cast" and attribute(source, "to", 0) == TensorProto.FLOAT:
            return deviation is not None and deviation.op_type == "Sqrt"
    return False
