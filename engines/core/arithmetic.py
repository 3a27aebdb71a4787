"""What a model computes in FP16 or BF16, where the machine at hand computes in FP32.

model -> `stand_in`: every low float tensor is FP32 and holds a value of its low type -> `session` in ONNX Runtime.
ONNX Runtime on a CPU runs FP16 nodes in FP32 and drops the Casts between them, so that a model's own file would show
neither the roundings between its nodes nor an overflow. Here each operator computes in FP32 from rounded inputs, and a
Cast to the low type and one back round its result once; what is too large becomes infinite, as in hardware.

| operator | rounded |
|---|---|
| moves or picks values: Transpose, Concat, MaxPool, Relu, Clip, Where ... | not at all: each is a rounded input |
| Conv, MatMul, Gemm, sums and means | once, behind the sum, which is FP32 as tensor cores accumulate it |
| Softmax, LayerNormalization, LSTM, Attention and other composite operators | once, at each output; FP32 inside |
| QuantizeLinear | its code, of x / scale in FP32 |
| DequantizeLinear | (code - zero point) * scale, once |
| functions of the standard (Gelu, MeanVarianceNormalization) | once, as one operator |
| functions of the model | inlined: each operator inside rounds |
| If, Loop, Scan | their bodies, in the same way |
| operators of unknown domains, BitCast | not here: they get and give the low type itself |

Constants stay as they are stored, external ones too, behind a Cast that ONNX Runtime folds. `Written` replaces the
file's roundings by those of a compiled engine. Inputs and outputs keep their types. Must not change the model it gets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner as inliner
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from engines.core import fp4, onnx_runtime as ort
from engines.core.errors import EngineError
from engines.core.files import read_file
from engines.core.load import settle
from engines.core.nodes import all_graphs, all_nodes, all_tensors, attribute_value, label
from engines.core.operators import PICKERS, RAMPS, family
from engines.core.shapes import inferred

LOW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_LOW = frozenset(LOW.values())
_FLOATS = _LOW | {TensorProto.FLOAT}

# Each value they make is one that they read, a constant of the file, or a whole number that the low type holds.
EXACT = (
    PICKERS
    | RAMPS
    | family(
        "Ceil CenterCropPad Compress ConcatFromSequence Constant ConstantOfShape EyeLike Floor Hardmax Max MaxRoiPool "
        "MaxUnpool Min OneHot Optional OptionalGetElement ReduceMax ReduceMin ReverseSequence Round Scatter "
        "ScatterElements SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert Sign SplitToSequence "
        "TensorScatter ThresholdedRelu TopK Trilu Unique"
    )
)
_KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", fp4.DOMAIN)
_TYPE_ATTRIBUTES = family("dtype output_datatype output_dtype precision softmax_precision stash_type to")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Where a compiled engine rounds, in place of the file.

    Attributes:
        types: tensor that leaves its kernel -> the type in which that writes it; 'float32' or codes: not rounded.
        inside: tensor -> labels of the nodes that read it unrounded, in the kernel that makes it.
    """

    types: Mapping[str, str]
    inside: Mapping[str, Collection[str]]


def session(
    model: Path | str | ModelProto,
    *,
    directory: Path | str = "",
    where: str = "the Q/DQ model",
    written: Written | None = None,
    custom_ops: Sequence[Path | str] = (),
    threads: int = 0,
) -> Any:
    """An `onnxruntime.InferenceSession` of what stands for a model; see `engines.core.onnx_runtime.session`.

    Args:
        model: a path or a model.
        directory: of the external data of a model that is no path.
        where: what messages call such a model.
        written: where an engine rounds; None where the file does.

    Raises:
        EngineError: ONNX Runtime refuses the model or a library, or the model passes sequences of a low type.
    """
    if isinstance(model, ModelProto):
        proto = model
    else:
        try:
            proto = onnx.load_from_string(read_file(model))
        except (OSError, DecodeError) as error:
            raise EngineError(f"Cannot read {model}: {error}") from error
        directory, where = settle(proto, model), str(model)
    return ort.session(
        stand_in(proto, written=written), directory=directory, where=where, custom_ops=custom_ops, threads=threads
    )


def stand_in(model: ModelProto, *, written: Written | None = None) -> ModelProto:
    """A model whose FP32 tensors hold what the tensors of a model hold in their own types; itself where these are FP32.

    Args:
        model: any; external data is not read.
        written: where an engine rounds; None where the file does.

    Raises:
        EngineError: the model passes sequences of a low type in or out.
    """
    if not written and not holds_low(model):
        return model
    known = [(f.domain, f.name) for f in model.functions if f.domain != fp4.DOMAIN]
    flat = inliner.inline_selected_functions(model, known) if known else model
    result = ModelProto()
    result.CopyFrom(flat)
    names = {name for graph in all_graphs(result.graph) for name in _names(graph)}
    _Scope(result, inferred(flat), names=names, written=written).rewrite()
    return result


def float_types(model: ModelProto) -> dict[str, int]:
    """The element types of all float tensors of a model's main graph, by name."""
    scope = _Scope(model, inferred(model), names=set(), written=None)
    for node in model.graph.node:
        scope.learn(node)
    return {name: kind for name, kind in scope.types.items() if kind in _FLOATS}


def holds_low(model: ModelProto) -> bool:
    """Whether a model stores, takes, gives or makes anything in a low type."""
    ends = any(_elem(v.type) in _LOW for v in (*model.graph.input, *model.graph.output))
    nodes = [*all_nodes(model.graph), *(node for f in model.functions for node in f.node)]
    named = any(a.i in _LOW and a.name in _TYPE_ATTRIBUTES for node in nodes for a in node.attribute)
    return ends or named or any(t.data_type in _LOW for t in all_tensors(model))


def rounds(node: NodeProto) -> bool:
    """Whether an operator makes values that the type of its inputs may not hold."""
    if node.op_type in ("If", "Loop", "Scan", "SequenceMap"):
        return False
    if node.op_type in ("Resize", "Upsample"):
        return bool(attribute_value(node, "mode", b"nearest") != b"nearest")
    if node.op_type == "Dropout":
        return len(node.input) > 2
    if node.op_type in ("ScatterElements", "ScatterND"):
        return attribute_value(node, "reduction", b"none") in (b"add", b"mul")
    return node.op_type not in EXACT or node.domain not in ("", "ai.onnx")


def _names(graph: GraphProto) -> Iterator[str]:
    """The names of everything that a graph gives a name to."""
    for group in (graph.node, graph.initializer, graph.input, graph.output):
        yield from (each.name for each in group)
    for node in graph.node:
        yield from (*node.input, *node.output)


def _elem(kind: TypeProto) -> int:
    """The type of the elements of a tensor, or of the tensors in a sequence or optional value; 0 if unknown."""
    for held in ("sequence_type", "optional_type"):
        if kind.HasField(held):
            return _elem(getattr(kind, held).elem_type)
    return int(kind.sparse_tensor_type.elem_type or kind.tensor_type.elem_type)


def _widen(kind: TypeProto) -> None:
    """Make the elements of a type FP32 where they are low."""
    for held in ("sequence_type", "optional_type"):
        if kind.HasField(held):
            _widen(getattr(kind, held).elem_type)
    if kind.tensor_type.elem_type in _LOW:
        kind.tensor_type.elem_type = TensorProto.FLOAT


@dataclass(slots=True)
class _Scope:
    """One graph in the making. Names are those of the file; a low tensor of that name is FP32 unless `low` has it."""

    owner: ModelProto
    shown: GraphProto  # the same graph with inferred types
    names: set[str]  # all that are taken
    written: Written | None
    body: GraphProto | None = None
    parent: _Scope | None = None
    types: dict[str, int] = field(default_factory=dict)
    low: set[str] = field(default_factory=set)  # inputs, constants and outputs of the graph that keep their low type
    wide: dict[str, str] = field(default_factory=dict)  # of those: what holds the same values in FP32
    unrounded: dict[str, str] = field(default_factory=dict)  # tensor -> what holds it before it is rounded
    nodes: list[NodeProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        for value in (*self.shown.input, *self.shown.output, *self.shown.value_info):
            self.types[value.name] = _elem(value.type)
        self.types |= {t.name: t.data_type for t in self.graph.initializer}
        self.types |= {s.values.name: s.values.data_type for s in self.graph.sparse_initializer}

    @property
    def graph(self) -> GraphProto:
        """The graph that is changed."""
        return self.owner.graph if self.body is None else self.body

    def rewrite(self) -> None:
        """Change the graph."""
        graph, inside = self.graph, self.body is not None
        given = [t.name for t in graph.initializer] + ([] if inside else [v.name for v in graph.input])
        given += [] if inside else [v.name for v in graph.output]
        self.low = {name for name in given if self.types.get(name) in _LOW}
        for value in () if inside else (*graph.input, *graph.output):
            if _elem(value.type) in _LOW and not value.type.HasField("tensor_type"):
                raise EngineError(
                    f"{value.name!r} is a sequence or optional value of FP16 or BF16 tensors, which cannot be computed "
                    "here as hardware does. Give a model whose inputs and outputs are tensors."
                )
        for sparse in graph.sparse_initializer:
            _wide_tensor(sparse.values)
        for node, shown in zip(graph.node, self.shown.node, strict=True):
            self._node(node, shown)
        if inside:
            self._ends()
        keep = [v for v in graph.value_info if _elem(v.type) not in _LOW]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.value_info.extend(keep)

    def _ends(self) -> None:
        """Inputs and outputs of a body are FP32; an output that is no node's here is handed on."""
        made = {name for node in self.nodes for name in node.output}
        for value in (*self.graph.input, *self.graph.output):
            _widen(value.type)
        for value in self.graph.output:
            if value.name not in made and (source := self._read(value.name)) != value.name:
                value.name = self._name(value.name)
                self.nodes.append(helper.make_node("Identity", [source], [value.name]))

    def learn(self, node: NodeProto) -> None:
        """Note the types of a node's outputs where inference did not: by its schema, or that of its first float."""
        missing = [i for i, name in enumerate(node.output) if name and not self.types.get(name)]
        if not missing:
            return
        kinds = [self._type(name) if name else 0 for name in node.input]
        first = next((k for k in kinds if k in _FLOATS), 0)
        version = {o.domain: o.version for o in self.owner.opset_import}.get(node.domain, 1)
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            self.types |= {node.output[i]: first for i in missing}
            return
        by_name = {
            schema.inputs[min(i, len(schema.inputs) - 1)].type_str: k
            for i, k in enumerate(kinds)
            if k and schema.inputs
        }
        named = next((a.i for a in node.attribute if a.name in ("to", "dtype", "output_dtype")), 0)
        fixed = {f"tensor({name.lower()})": code for name, code in TensorProto.DataType.items()}
        for index in missing:
            formal = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
            self.types[node.output[index]] = by_name.get(formal) or fixed.get(formal) or named or first

    def _type(self, name: str) -> int:
        return self.types.get(name) or (self.parent._type(name) if self.parent else 0)

    def _name(self, like: str) -> str:
        """A new name."""
        name = next(n for i in range(len(self.names) + 1) if (n := f"{like}/{i}") not in self.names)
        self.names.add(name)
        return name

    def _cast(self, source: str, to: int, output: str = "") -> NodeProto:
        output = output or self._name(source)
        return helper.make_node("Cast", [source], [output], name=self._name(output), to=to)

    def _read(self, name: str) -> str:
        """What holds the values of a tensor in FP32, or in its own type if that is no low one."""
        if name in self.wide:
            return self.wide[name]
        if name in self.low:
            self.nodes.append(self._cast(name, TensorProto.FLOAT))  # at its first use: a large model runs in parts
            self.wide[name] = self.nodes[-1].output[0]
            return self.wide[name]
        return name if name in self.types or self.parent is None else self.parent._read(name)

    def _node(self, node: NodeProto, shown: NodeProto) -> None:
        self.learn(node)
        if node.domain not in _KNOWN_DOMAINS or node.op_type == "BitCast":
            self._foreign(node)
            return
        own = {a.name: a for a in shown.attribute}
        copy = NodeProto()
        copy.CopyFrom(node)
        inside = self.written.inside if self.written and self.body is None else {}
        copy.input[:] = [
            self.unrounded[name] if label(node) in inside.get(name, ()) and name in self.unrounded else self._read(name)
            for name in node.input
        ]
        if node.op_type == "CastLike":
            copy.op_type = "Cast"
            del copy.input[1:], copy.attribute[:]
            copy.attribute.append(helper.make_attribute("to", self._type(node.input[1])))
        for held in copy.attribute:
            if held.name in _TYPE_ATTRIBUTES and held.i in _LOW:
                held.i = TensorProto.FLOAT
            for tensor in (*([held.t] if held.HasField("t") else ()), *held.tensors):
                _wide_tensor(tensor)
            _wide_tensor(held.sparse_tensor.values)
            for body, seen in zip(_held(held), _held(own[held.name]) if held.name in own else (), strict=True):
                _Scope(self.owner, seen, self.names, self.written, body, self).rewrite()
        same = node.op_type == "Cast" and self._type(node.input[0]) == self._type(node.output[0])
        self._give(copy, rounded=rounds(node) and not same)

    def _give(self, node: NodeProto, *, rounded: bool) -> None:
        """Write a node with FP32 outputs, and behind it the roundings of these."""
        tail: list[NodeProto] = []
        for index, name in enumerate(node.output):
            kind = self._type(name) if name else 0
            to = self._rounded_to(name, kind, rounded)
            if not to and name not in self.low:
                continue
            exact = node.output[index] = self._name(name)
            self.unrounded[name] = exact
            if name not in self.low:
                tail.append(self._cast(exact, to))
                tail.append(self._cast(tail[-1].output[0], TensorProto.FLOAT, name))
            elif to in (0, kind):
                tail.append(self._cast(exact, kind, name))
                tail += [] if not to else [self._cast(name, TensorProto.FLOAT)]
                self.wide[name] = tail[-1].output[0] if to else exact
            else:
                tail += [self._cast(exact, to)]
                tail += [self._cast(tail[-1].output[0], TensorProto.FLOAT)]
                self.wide[name] = tail[-1].output[0]
                tail += [self._cast(self.wide[name], kind, name)]
        self.nodes += [node, *tail]

    def _rounded_to(self, name: str, kind: int, rounded: bool) -> int:
        """The low type that a tensor is rounded to, 0 for none."""
        if self.written and self.body is None and name in self.written.types:
            return LOW.get(self.written.types[name], 0)
        return kind if rounded and kind in _LOW else 0

    def _foreign(self, node: NodeProto) -> None:
        """Write a node that takes and gives low types themselves."""
        copy = NodeProto()
        copy.CopyFrom(node)
        for index, name in enumerate(node.input):
            if (kind := self._type(name)) in _LOW and not self._keeps(name):
                self.nodes.append(self._cast(name, kind))
                copy.input[index] = self.nodes[-1].output[0]
        at = len(self.nodes)
        for index, name in enumerate(node.output):
            if self._type(name) not in _LOW:
                continue
            if name in self.low:
                self.nodes.append(self._cast(name, TensorProto.FLOAT))
                self.wide[name] = self.nodes[-1].output[0]
            else:
                copy.output[index] = self._name(name)
                self.nodes.append(self._cast(copy.output[index], TensorProto.FLOAT, name))
        self.nodes.insert(at, copy)

    def _keeps(self, name: str) -> bool:
        """Whether a tensor of this name is there in its low type."""
        return name in self.low or (name not in self.types and self.parent is not None and self.parent._keeps(name))


def _held(held: onnx.AttributeProto) -> Iterable[GraphProto]:
    """The bodies of one attribute."""
    return (*([held.g] if held.HasField("g") else ()), *held.graphs)


def _wide_tensor(tensor: TensorProto) -> None:
    """Make a stored tensor FP32 where it is low."""
    if tensor.data_type in _LOW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
