"""Types and shapes of the tensors of a model, inferred without its weights. Must not change the model it was given."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx.inliner
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    TensorShapeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)
from onnx.reference import ReferenceEvaluator

from engines.core import fp4
from engines.core.nodes import all_nodes, attribute, bodies, ints, label, reads
from engines.core.operators import ARITHMETIC, CURVES, LAST_AXIS_NORMS, RAMPS, RECURRENCES, SOFTMAXES, family

SMALL = 512  # elements; shape inference reads the values of constants up to here, of others type and shape only
VALUES = 64  # elements; no arithmetic of shapes holds more, and no other values are computed
CALLS = 10_000  # of a model's own functions that are followed; twenty that call each other twice would be a million
# What makes more values than it reads, and what makes other values each time.
GROWING = family("CenterCropPad ConstantOfShape Expand EyeLike OneHot Pad Range Resize Tile Upsample")
DRAWN = family("Bernoulli Dropout Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike")


def without_initializers(proto: ModelProto) -> ModelProto:
    """A copy of a model that leaves out the initializers of the main graph, which is nearly all of its bytes."""
    copy = ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _assign(copy, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name != "initializer":
            _assign(copy.graph, field.name, value)
    return copy


def light(proto: ModelProto) -> ModelProto:
    """A copy of a model for shape inference, where large and external constants are inputs of their type and shape."""
    copy = without_initializers(proto)
    listed = {v.name for v in copy.graph.input}
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    show_constants(copy.graph, {tensor.name: tensor for tensor in copy.graph.initializer})
    return copy


def show_constants(graph: GraphProto, stored: Mapping[str, TensorProto]) -> None:
    """Give the bodies in a graph copies of the constants that they read: inference sees no values around a body."""
    for body in (body for node in graph.node for body in bodies(node)):
        own = {v.name for v in (*body.input, *body.initializer)}
        read = {name for node in body.node for name in reads(node)} - own
        body.initializer.extend(stored[name] for name in sorted(read & stored.keys()))
        show_constants(body, stored)


def inferred(proto: ModelProto, *, stated: bool = True) -> GraphProto:
    """The main graph of a model with what inference adds to the types and shapes that it states.

    Where inference fails, what the model states is all. Not `stated`, what it says of its nodes' results is left out.
    """
    work = light(proto)
    if not stated:
        del work.graph.value_info[:], work.graph.output[:]
    return _inferred(work)


def inferred_at(proto: ModelProto, inputs: Mapping[str, Sequence[int]]) -> GraphProto:
    """The main graph of a model with all shapes inferred anew at given input shapes.

    The arithmetic between a Shape and what it sizes is computed where inference does not follow it (a Div, a Where).
    Of a tensor behind an operator that inference does not know, what the file states is believed. A size that depends
    on the values of an input, or on an input whose shape is open, stays open. What calls of the model's own functions
    stand for is in the graph, under the names that TensorRT's parser gives it: 'node | call (function)'. Its
    initializers are the values that were computed of shapes.
    """
    fixed = inlined(given := light(proto)) or given
    del fixed.functions[:]
    beliefs = _fix(fixed.graph, inputs)
    if fp4.holds_fp4(proto):
        fp4.with_function(fixed)
    work, values = ModelProto(), dict[str, np.ndarray]()
    work.CopyFrom(fixed)
    shown = _inferred(work)
    while lacking := _open(shown):
        if found := _computed(shown, fixed.opset_import):
            values |= found
            kept = [node for node in work.graph.node if found.keys().isdisjoint(node.output)]
            del work.graph.node[:]
            work.graph.node.extend(kept)
            work.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in found.items())
        elif believed := [beliefs.pop(name) for name in lacking if name in beliefs]:
            work.graph.value_info.extend(believed)
        else:
            break
        shown = _inferred(work)
    shown = _carried(work, shown)
    known = {tuple(node.output): node for node in shown.node}  # with what was inferred inside bodies
    nodes = [known.get(tuple(node.output), node) for node in fixed.graph.node]
    made = (helper.make_tensor_value_info(n, numpy_helper.from_array(v).data_type, v.shape) for n, v in values.items())
    result = GraphProto(input=shown.input, output=shown.output, node=nodes)
    result.value_info.extend((*shown.value_info, *made))
    result.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return result


def _carried(work: ModelProto, shown: GraphProto) -> GraphProto:
    """The graph with the shapes of what its Loops carry, where a turn that begins with them ends with them too.

    onnx leaves them open: a turn may change them. `work` is changed.
    """
    sized = {v.name: v.type.tensor_type.shape for v in (*shown.input, *shown.value_info) if _sized(v)}
    sized |= {t.name: helper.make_tensor_value_info("", 1, t.dims).type.tensor_type.shape for t in shown.initializer}
    kept: dict[tuple[str, ...], dict[int, TensorShapeProto]] = {}
    for node in (node for node in work.graph.node if node.op_type == "Loop"):
        states = {i: sized[name] for i, name in enumerate(node.input) if i > 1 and name in sized}
        if states:
            kept[tuple(node.output)] = states
            body = next(bodies(node))
            del body.value_info[:]
            for end in body.output:
                end.type.tensor_type.ClearField("shape")
    loops = {tuple(node.output): next(bodies(node)) for node in work.graph.node if tuple(node.output) in kept}
    stated = {key: [_copy(value) for value in body.input] for key, body in loops.items()}
    while kept:
        for key, body in loops.items():
            for index, state in enumerate(body.input):
                state.CopyFrom(stated[key][index])
                if index in kept[key]:
                    state.type.tensor_type.shape.CopyFrom(kept[key][index])
        shown = _inferred(work)
        ends = {tuple(n.output): next(bodies(n)).output for n in shown.node if tuple(n.output) in kept}
        changed = [
            (key, index)
            for key, states in kept.items()
            for index, shape in states.items()
            if _dims(ends[key][index - 1].type.tensor_type.shape) != _dims(shape)
        ]
        if not changed:
            break
        for key, index in changed:
            del kept[key][index]
    return shown


def _copy(value: ValueInfoProto) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    return copy


def _dims(shape: TensorShapeProto) -> list[int]:
    """The sizes of a shape, 0 for one that is open."""
    return [dim.dim_value for dim in shape.dim]


def _inferred(proto: ModelProto) -> GraphProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return proto.graph


def inlined(model: ModelProto) -> ModelProto | None:
    """A model with the nodes of its functions in place of their calls, which may be itself.

    None where calls are very many, go in a circle or do not fit their functions.

    TensorRT's parser gives the nodes the same names: 'node | call (function)'.
    """
    if not model.functions:
        return model
    functions = {(f.domain, f.name): f for f in model.functions}
    copies: list[FunctionProto] = []

    def call(node: NodeProto, inside: str) -> None:
        """Let a call, and those inside what it calls, each have a copy of its function, whose nodes say the way."""
        function = functions.get((node.domain, node.op_type))
        for inner in (inner for body in bodies(node) for inner in body.node):
            call(inner, inside)
        if function is None or len(copies) > CALLS:
            return
        way = f" | {label(node)} ({node.op_type}){inside}"
        copies.append(copy := FunctionProto())
        copy.CopyFrom(function)
        copy.name = node.op_type = f"{function.name}_{len(copies)}"
        for inner in copy.node:
            name = label(inner) + way
            call(inner, way)
            inner.name = name

    named = ModelProto()
    named.CopyFrom(model)
    try:
        for node in named.graph.node:
            call(node, "")
        if len(copies) > CALLS:
            return None
        del named.functions[:]
        named.functions.extend(copies)
        flat = onnx.inliner.inline_local_functions(named, convert_version=True)
    except RuntimeError:  # Python's of a circle, or onnx's of a call that does not fit its function
        return None
    for node in all_nodes(flat.graph):
        if " | " in node.name:
            node.name = re.sub(r"__\d+$", "", node.name)  # which the inliner adds
    return flat


def _fix(graph: GraphProto, inputs: Mapping[str, Sequence[int]]) -> dict[str, ValueInfoProto]:
    """Give the inputs their shapes and take away what is stated of all other tensors.

    Returns what was stated, where the named sizes of inputs decide all of it.
    """
    symbols: dict[str, int] = {}
    for info in graph.input:
        shape = info.type.tensor_type.shape
        if info.name in inputs:
            symbols |= {d.dim_param: n for d, n in zip(shape.dim, inputs[info.name], strict=False) if d.dim_param}
            del shape.dim[:]
            shape.dim.extend(TensorShapeProto.Dimension(dim_value=size) for size in inputs[info.name])
    stated = [*graph.value_info, *graph.output]
    open_inputs = [info for info in graph.input if info.name not in inputs]
    for dim in (d for info in (*open_inputs, *stated) for d in info.type.tensor_type.shape.dim):
        if dim.dim_param in symbols:
            dim.dim_value = symbols[dim.dim_param]
        elif dim.dim_value <= 0:
            dim.ClearField("value")
    beliefs = {info.name: ValueInfoProto() for info in stated if _sized(info)}
    for info in stated:
        if info.name in beliefs:
            beliefs[info.name].CopyFrom(info)
    del graph.value_info[:]
    for info in graph.output:
        info.type.tensor_type.ClearField("shape")
    return beliefs


def _sized(info: ValueInfoProto) -> bool:
    """Whether all sizes of a tensor are known."""
    tensor = info.type.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)


def _open(graph: GraphProto) -> list[str]:
    """What the nodes of a graph make of which not all sizes are known."""
    sized = {info.name for info in (*graph.value_info, *graph.output) if _sized(info)}
    return [name for node in graph.node for name in node.output if name and name not in sized]


def _computed(graph: GraphProto, opsets: Iterable[OperatorSetIdProto]) -> dict[str, np.ndarray]:
    """The small values that nodes hold, or compute from constants and from shapes alone."""
    infos = [info for info in (*graph.input, *graph.value_info, *graph.output) if _sized(info)]
    shapes = {info.name: tuple(d.dim_value for d in info.type.tensor_type.shape.dim) for info in infos}
    small = [t for t in graph.initializer if math.prod(t.dims) <= VALUES]
    known, found = {t.name: numpy_helper.to_array(t) for t in small}, dict[str, np.ndarray]()
    for node in graph.node:
        whole = all(math.prod(shapes.get(name, (VALUES + 1,))) <= VALUES for name in node.output if name)
        if node.domain not in ("", "ai.onnx") or node.op_type in DRAWN or (node.op_type in GROWING and not whole):
            continue
        if node.op_type in ("Shape", "Size") and node.input[0] in shapes:
            feeds = {node.input[0]: np.broadcast_to(np.int8(0), shapes[node.input[0]])}  # takes no memory
        elif all(name in known for name in node.input if name) and next(bodies(node), None) is None:
            feeds = {name: known[name] for name in node.input if name}
        else:
            continue
        try:
            made = _results(node, feeds, opsets)
        except Exception:  # the reference raises whatever its operators raise: the value stays unknown
            continue
        if all(isinstance(value, np.ndarray) and value.size <= VALUES for value in made.values()):
            known |= made
            found |= made
    return found


def _results(
    node: NodeProto, feeds: dict[str, np.ndarray], opsets: Iterable[OperatorSetIdProto]
) -> dict[str, np.ndarray]:
    """What a node computes."""
    names = [name for name in node.output if name]
    if node.op_type == "Constant" and node.attribute[0].name == "value":
        return {names[0]: numpy_helper.to_array(node.attribute[0].t)}
    evaluator = ReferenceEvaluator(helper.make_function("", "values", [*feeds], names, [node], [*opsets]))
    with np.errstate(all="ignore"):
        return dict(zip(names, list(evaluator.run(names, feeds, attributes={})), strict=True))


def _assign(message: ModelProto | GraphProto, name: str, value: object) -> None:
    target = getattr(message, name)
    if hasattr(target, "MergeFrom"):
        target.MergeFrom(value)
    else:
        setattr(message, name, value)


def leading_is_batch(graph: GraphProto) -> bool:
    """Whether what lies along the leading axis of the inputs are samples, as far as their symbols and operators tell.

    A symbol named for a time, a length or atoms says no, one named for a batch yes. Else an operator that mixes what
    lies along that axis, before any that moves it, says no: a recurrence, a sum, a Softmax along it.
    """
    stored = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in stored]
    symbols = [v.type.tensor_type.shape.dim[0].dim_param for v in inputs if v.type.tensor_type.shape.dim]
    if any(_BATCH.search(symbol) for symbol in symbols):
        return True
    if any(_LENGTH.search(symbol) for symbol in symbols):
        return False
    along = {v.name for v in inputs}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.value_info, *graph.output)}
    values = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT64}
    for node in graph.node:
        if node.input and node.input[0] in along:
            if _mixes_leading(node, ranks.get(node.input[0], 0), values):
                return False
            if node.op_type in _ROW_BY_ROW:
                along.update(node.output)
                ranks.setdefault(node.output[0], ranks.get(node.input[0], 0))
    return True


_BATCH = re.compile(r"batch|^(b|bs|n)$", re.IGNORECASE)
_LENGTH = re.compile(r"seq|time|len|frame|step|token|atom|^(t|l)$", re.IGNORECASE)
_ROW_BY_ROW = CURVES | RAMPS | ARITHMETIC | LAST_AXIS_NORMS | family("BatchNormalization Cast Conv Dropout Gemm MatMul")


def _mixes_leading(node: NodeProto, rank: int, values: Mapping[str, TensorProto]) -> bool:
    """Whether a node computes with several entries of the leading axis of what it reads first, of a known rank."""
    if node.op_type in RECURRENCES:
        return attribute(node, "layout", 0) == 0
    if node.op_type == "Scan":
        return not ints(node, "scan_input_axes", [])
    if node.op_type in SOFTMAXES:
        return bool(rank) and attribute(node, "axis", -1) in (0, -rank)
    if node.op_type == "CumSum" or node.op_type.startswith("Reduce"):
        stored = values.get(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        axes = ints(node, "axes", []) if stored is None else numpy_helper.to_array(stored).reshape(-1).tolist()
        return bool(rank) and (not axes or not {0, -rank}.isdisjoint(axes))
    return False
