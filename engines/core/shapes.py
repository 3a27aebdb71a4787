"""Types and shapes of the tensors of a model, inferred without its weights. Must not change the model it was given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import (
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
from engines.core.load import inlined
from engines.core.nodes import all_nodes, bodies, reads
from engines.core.operators import family

SMALL = 512  # elements; shape inference reads the values of constants up to here, of others type and shape only
LONG = 16_384  # elements; onnx's arithmetic of shapes takes some 200 bytes of memory for each, and reads any vector
VALUES = 64  # elements; no arithmetic of shapes holds more, and no other values are computed
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
        return propagated(proto).graph
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return proto.graph


def propagated(model: ModelProto) -> ModelProto:
    """A copy of a model with the types and shapes that onnx infers, following the arithmetic of shapes.

    Any vector that an Add, Cast, Concat, Gather or Slice reads is such arithmetic to onnx. Long ones it sees as inputs
    whose size has a name; inside bodies and functions they stop the arithmetic of the whole model.

    Raises:
        onnx.shape_inference.InferenceError, RuntimeError, ValueError: what onnx says of a model that it cannot infer.
    """
    plain = onnx.shape_inference.infer_shapes(model)
    inner = [body for node in all_nodes(plain.graph) for body in bodies(node)]
    if model.functions and (flat := inlined(model)):
        inner.append(onnx.shape_inference.infer_shapes(flat).graph)
    if any(size for graph in inner for size in _vectors(graph).values()):
        return plain
    if not (sizes := _vectors(plain.graph)):
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    hidden = ModelProto()
    hidden.CopyFrom(model)
    _hide(hidden.graph, plain.graph, sizes)
    shown = onnx.shape_inference.infer_shapes(hidden, data_prop=True)
    _show(shown.graph, model.graph, sizes)
    return shown


def _vectors(graph: GraphProto) -> dict[str, int]:
    """Name -> size of the vectors that are long; 0 for what is no integer and whose size hangs on a computed value."""
    types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    sizes = {name: t.shape.dim[0].dim_value for name, t in types.items() if len(t.shape.dim) == 1}
    sizes |= {t.name: t.dims[0] for t in graph.initializer if len(t.dims) == 1}
    found = {name: size for name, size in sizes.items() if size > LONG}
    for node in (node for node in graph.node if node.op_type in _SIZED and node.output[0] in types):
        kind = types[node.output[0]]
        open_ = not kind.HasField("shape") or (len(kind.shape.dim) == 1 and not kind.shape.dim[0].dim_value)
        one = node.op_type == "Range" or sizes.get(node.input[-1]) == 1  # length of what it is to be, not that itself
        if open_ and one and kind.elem_type not in _INTEGERS:
            found[node.output[0]] = 0
    return found


_SIZED = family("ConstantOfShape Range Reshape Tile")
_INTEGERS = (TensorProto.UNDEFINED, TensorProto.INT32, TensorProto.INT64)
_HIDDEN = "hidden: "


def _hide(graph: GraphProto, plain: GraphProto, sizes: Mapping[str, int]) -> None:
    """Make vectors inputs whose size has a name. What makes them makes something else; their Shape is told.

    Shapes that are known without arithmetic, those of `plain`, are stated: sizes that are names would hide some.
    """
    known = (*plain.input, *plain.value_info, *plain.output)
    types = {v.name: v.type.tensor_type.elem_type for v in known}
    stated = {v.name for v in graph.value_info}
    graph.value_info.extend(v for v in plain.value_info if _sized(v) and v.name not in stated)
    for value, same in zip(graph.output, plain.output, strict=True):
        if _sized(same):
            value.CopyFrom(same)
    types |= {t.name: t.data_type for t in graph.initializer if t.name in sizes}
    told = []
    for node in graph.node:
        if node.op_type == "Shape" and sizes.get(node.input[0]) and not node.attribute:
            told.append(numpy_helper.from_array(np.array([sizes[node.input[0]]]), node.output[0]))
            node.output[0] = _HIDDEN + node.output[0]
        else:
            node.output[:] = [_HIDDEN + name if name in sizes else name for name in node.output]
    for field in (graph.input, graph.initializer, graph.value_info):
        kept = [value for value in field if value.name not in sizes]
        del field[:]
        field.extend(kept)
    graph.initializer.extend(told)
    inputs = [
        helper.make_tensor_value_info(name, types[name], [_HIDDEN + (str(size) if size else name)])
        for name, size in sizes.items()
    ]
    graph.input.extend(inputs)
    for value in (v for v in graph.output if v.name in sizes):
        value.type.tensor_type.ClearField("shape")


def _show(graph: GraphProto, given: GraphProto, sizes: Mapping[str, int]) -> None:
    """Undo `_hide` in what onnx made of it, where sizes have their values."""
    found = {f"{_HIDDEN}{size}": size for size in sizes.values()}
    made = {v.name: v.type.tensor_type.shape.dim for v in graph.value_info if v.name.startswith(_HIDDEN)}
    found |= {name: dims[0].dim_value for name, dims in made.items() if len(dims) == 1}
    ends = {v.name for v in (*given.input, *given.output, *given.initializer)}
    shown = [v for v in graph.value_info if not v.name.startswith(_HIDDEN)]
    vectors = [v for v in graph.input if v.name in sizes]
    stated = {v.name for v in shown}
    shown += [v for v in vectors if v.name not in ends | stated]
    infos = [_copy(v) for v in shown]
    for value in graph.output:
        if value.name in sizes:
            value.CopyFrom(next(v for v in vectors if v.name == value.name))
    for field, values in (
        (graph.input, given.input),
        (graph.initializer, given.initializer),
        (graph.value_info, infos),
    ):
        del field[:]
        field.extend(values)
    for node in graph.node:
        node.output[:] = [name.removeprefix(_HIDDEN) for name in node.output]
    inner = [body for node in all_nodes(graph) for body in bodies(node)]
    values = (v for g in (graph, *inner) for v in (*g.input, *g.value_info, *g.output))
    for dim in (dim for value in values for dim in value.type.tensor_type.shape.dim):
        if dim.dim_param.startswith(_HIDDEN):
            size = found.get(dim.dim_param, 0)
            dim.ClearField("value")
            if size:
                dim.dim_value = size


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
