"""A model with quantizers of its own, as of quantization-aware training, as a float model and what they say.

Q/DQ model -> the same without Q and DQ, weights at the values of their codes -> `Trained` (`Model.trained`): the grid
of each quantized tensor and of each product's weight. Placement then wants what it wants of any float model, and takes
these grids where it has them. A quantizer that began at 0 may be all that is left of a Relu, so its limit stays. It
must not judge whether a compiler takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engines.core.nodes import attribute, constant_tensor
from engines.core.operators import MOVERS, POOLS, PRODUCTS, family
from engines.core.quantizers import Product, QuantizedGraph, Quantizer
from engines.core.shapes import inferred
from qdq.core.formats import FORMATS
from qdq.model.model import Grid, Model, Trained, WeightGrid
from qdq.model.nodes import Names, all_nodes
from qdq.passes.draft import assign

_FORMATS: dict[int, str] = {TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8"}
_WEIGHTS = {**_FORMATS, TensorProto.INT4: "int4"}  # which data never are
_MIDDLE = 128  # what UINT8 codes lie above INT8's
_POSITIVE = MOVERS | POOLS | family("Add Concat ReduceMax ReduceMean ReduceSum")  # where their inputs are
_NOT_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Sqrt", "Exp", "Softplus")


class _Graph(QuantizedGraph):
    """The main graph with the values of its constants."""

    multiplying = PRODUCTS

    def __init__(self, model: Model) -> None:
        self._model = model
        self._stored = {t.name: t for t in map(constant_tensor, model.graph.node) if t is not None}
        super().__init__(model.graph.node, inferred(model.proto), model.graph.initializer, opset=model.opset)

    def constant(self, name: str) -> np.ndarray | None:
        """The values of an initializer or Constant, behind Identity and Cast too."""
        if self._model.is_constant(name):
            return self._model.array(name)
        if name in self._stored:
            return numpy_helper.to_array(self._stored[name])
        maker = self.producer(name)
        if maker is None or maker.op_type not in ("Identity", "Cast"):
            return None
        values, kind = self.constant(maker.input[0]), attribute(maker, "to", 0)
        return values.astype(helper.tensor_dtype_to_np_dtype(kind)) if values is not None and kind else values

    def scale_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a scale; None where it is computed from an input."""
        scale = self.constant(name)
        return None if scale is None else scale.shape


def computes_codes(model: Model) -> bool:
    """Whether quantized constants are computed by nodes, which must be folded before `floated` can read them."""
    graph = _Graph(model)
    sources = ((q.source or q).node.input[0] for q in graph.by_output.values() if q.constant)
    return any(graph.constant(name) is None for name in sources)


def floated(model: Model) -> Model:
    """The float model of a Q/DQ model, with `trained`; quantizers that cannot be read stay in it.

    Those are such with a scale computed as the model runs, codes that are inputs or outputs, and quantizers in bodies.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    fresh = Names({n for n in model.names()} | {n.name for n in all_nodes(proto.graph)}).fresh
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or fresh(f"{node.op_type}_{index}")
    _clip_values(_Graph(model.replace(proto)), proto, fresh)
    named = model.replace(proto)
    graph = _Graph(named)
    tensors, operands, weights = dict[str, Grid](), dict[str, Grid](), dict[str, WeightGrid]()
    renamed, new, clipped = dict[str, str](), list[TensorProto](), dict[int, NodeProto]()
    kept = {id(q.node) for q in graph.by_output.values() if not _readable(named, graph, q)}
    for q in graph.by_output.values():
        if id(q.node) in kept or (q.source is not None and id(q.source.node) in kept):
            kept.add(id(q.node))
            continue
        if q.constant and not q.is_q:
            values = _values(graph, q)
            new.append(numpy_helper.from_array(values, q.node.output[0]))
        elif not (q.is_q and q.stored):
            source = q.node.input[0]
            if q.is_q and (grid := _grid(q)) is not None:
                if _starts_at_zero(q) and not _not_negative(graph, source):
                    source = fresh(f"{source}_Relu")
                    clipped[id(q.node)] = helper.make_node("Relu", [q.node.input[0]], [source], name=source)
                tensors.setdefault(source, grid)
            renamed[q.node.output[0]] = source
    for product in graph.products:
        _read_product(graph, product, operands, weights)
    nodes = list(_without(graph, proto, kept, renamed, clipped))
    assign(proto.graph.node, nodes)
    proto.graph.initializer.extend(new)
    made = {t.name for t in new}
    assign(proto.graph.value_info, [v for v in proto.graph.value_info if v.name not in made | renamed.keys()])
    trained = Trained(tensors=tensors, operands=operands, weights=weights)
    return named.replace(proto).with_trained(trained)


def _clip_values(graph: _Graph, proto: ModelProto, fresh: Callable[[str], str]) -> None:
    """Take out Clips of codes, which PyTorch writes for fewer than 256 of them.

    Of a weight the clipped codes are stored; data are clipped in front of their Q instead. Where only the lowest code
    of INT8 is left out, nothing clips data: its value is a step away.
    """
    nodes: list[NodeProto] = []
    taken: dict[str, str] = {}
    for node in proto.graph.node:
        q = graph.by_output.get(node.input[0]) if node.op_type == "Clip" else None
        given = {i: graph.constant(name) for i, name in enumerate(node.input) if i and name}
        if q is None or not q.is_q or q.scale is None or any(bound is None for bound in given.values()):
            nodes.append(node)
            continue
        codes = np.iinfo(helper.tensor_dtype_to_np_dtype(q.dtype))
        ends = {1: codes.min, 2: codes.max} | {i: int(b.reshape(-1)[0]) for i, b in given.items() if b is not None}
        low, high = ends[1], ends[2]
        if q.stored:
            stored = graph.constant(q.node.input[0])
            assert stored is not None
            scale, zero = (_spread(v, q.axis, stored.shape) for v in (q.scale, _zeros(q)))
            kept = np.clip(np.rint(stored.astype(np.float32) / scale.astype(np.float32)) + zero, low, high)
            proto.graph.initializer.append(numpy_helper.from_array(kept.astype(codes.dtype), node.output[0]))
            continue
        taken[node.output[0]] = node.input[0]
        if q.count == 1 and not (low <= codes.min + 1 and high == codes.max):
            out = fresh(f"{q.node.input[0]}_Clip")
            limits = [fresh(f"{out}_{end}") for end in ("low", "high")]
            for name, bound in zip(limits, (low, high), strict=True):
                value = (bound - _zeros(q).reshape(-1)[0]) * q.scale.astype(np.float64).reshape(-1)[0]
                proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value, q.scale.dtype), name))
            place = next(i for i, made in enumerate(nodes) if list(made.output) == list(q.node.output))
            nodes.insert(place, helper.make_node("Clip", [q.node.input[0], *limits], [out], name=out))
            nodes[place + 1].input[0] = out
    copies = []
    for node in nodes:
        node.input[:] = [taken.get(name, name) for name in node.input]
        copies.append(NodeProto())
        copies[-1].CopyFrom(node)
    assign(proto.graph.node, copies)


def _readable(model: Model, graph: _Graph, q: Quantizer) -> bool:
    """Whether a quantizer can be taken out: its parameters are constants, and its codes are no one else's affair."""
    if q.scale is None or q.computed_zero or not np.all(np.isfinite(q.scale.astype(np.float64))):
        return False
    if q.is_q:
        return not model.is_output(q.node.output[0])
    if q.constant:
        return graph.constant((q.source or q).node.input[0]) is not None
    return graph.producer(q.node.input[0]) is not None


def _values(graph: _Graph, q: Quantizer) -> np.ndarray:
    """What a constant DQ stands for, in the type that it gives: codes as stored, or as its Q makes them."""
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(graph.output_type(q) or TensorProto.FLOAT))
    stored = graph.constant((q.source or q).node.input[0])
    assert stored is not None and q.scale is not None
    scale, zero = (_spread(v, q.axis, stored.shape) for v in (q.scale, _zeros(q)))
    if q.source is None:
        return np.asarray(((stored.astype(np.float64) - zero) * scale).astype(kind))
    limits = helper.tensor_dtype_to_np_dtype(q.dtype)
    codes = stored.astype(np.float32) / scale.astype(np.float32)
    if "FLOAT" not in TensorProto.DataType.Name(q.dtype):
        info: Any = ml_dtypes.iinfo(limits)  # type: ignore[no-untyped-call]
        codes = np.clip(np.rint(codes) + zero, info.min, info.max) - zero
    else:
        most = float(ml_dtypes.finfo(limits).max)  # type: ignore[no-untyped-call]
        codes = np.clip(codes, -most, most).astype(limits)
    return np.asarray((codes.astype(np.float64) * scale).astype(kind))


def _zeros(q: Quantizer) -> np.ndarray:
    return np.zeros(()) if q.zero is None else q.zero.astype(np.float64)


def _spread(values: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """Scales or zero points in a shape that broadcasts with the tensor."""
    wide = values.astype(np.float64)
    if wide.size == 1:
        return wide.reshape(())
    if wide.ndim == 1:
        return wide.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    for i, size in enumerate(shape):
        wide = np.repeat(wide, -(-size // wide.shape[i]), axis=i)[(slice(None),) * i + (slice(size),)]
    return wide


def _grid(q: Quantizer) -> Grid | None:
    """The one scale and zero point of a tensor; of a scale for each channel those that cover all of them.

    None where the format is none that data have.
    """
    fmt = _FORMATS.get(q.dtype)
    if fmt is None or q.scale is None or q.blocked:
        return None
    shift = _MIDDLE if q.dtype == TensorProto.UINT8 else 0
    scale, zero = q.scale.astype(np.float64).ravel(), np.atleast_1d(_zeros(q)).ravel() - shift
    if not np.all(scale > 0):
        return None
    if scale.size == 1:
        return Grid(scale=float(scale[0]), zero_point=int(zero[0]), format=fmt)
    limits = FORMATS[fmt]
    widest = np.maximum((limits.high - zero) * scale / limits.high, (zero - limits.low) * scale / -limits.low)
    return Grid(scale=float(widest.max()), zero_point=0, format=fmt)


def _read_product(graph: _Graph, product: Product, operands: dict[str, Grid], weights: dict[str, WeightGrid]) -> None:
    """The grids of one product's operands."""
    for index, operand in enumerate(product.operands):
        q = operand.dq
        if q is None or q.scale is None:
            continue
        if not q.constant:
            if (grid := _grid(q)) is not None:
                operands[f"{product.node.name}:{index}"] = grid
            continue
        fmt, shift = _WEIGHTS.get(q.dtype), _MIDDLE if q.dtype == TensorProto.UINT8 else 0
        stored, axis = graph.constant((q.source or q).node.input[0]), operand.output_axis
        if fmt is None or stored is None or axis is None or axis >= stored.ndim:
            continue
        block = attribute(q.node, "block_size", 0) if q.blocked and stored.ndim == 2 and q.axis == 1 - axis else 0
        along = q.count == 1 or block or (q.vector and q.axis == axis)
        if along and not np.any(_zeros(q) - shift) and np.all(q.scale > 0):
            others = tuple(i for i in range(stored.ndim) if i != axis)
            largest = np.abs(_values(graph, q).astype(np.float64)).max(axis=others)
            scale = np.asarray(q.scale, np.float32)
            scale = np.moveaxis(scale, axis, 0) if block else scale.reshape(-1)
            weights[product.node.name] = WeightGrid(scale=scale, largest=largest, format=fmt, block=block or None)


def _starts_at_zero(q: Quantizer) -> bool:
    """Whether the smallest code stands for 0: what is negative becomes 0."""
    if q.dtype not in (TensorProto.INT8, TensorProto.UINT8):
        return False
    return bool(np.all(_zeros(q) == np.iinfo(helper.tensor_dtype_to_np_dtype(q.dtype)).min))


def _not_negative(graph: _Graph, tensor: str) -> bool:
    """Whether a tensor is known to hold no negative value."""
    q = graph.by_output.get(tensor)
    if q is not None:
        return _not_negative(graph, q.node.input[0])
    node = graph.producer(tensor)
    if node is None:
        return False
    if node.op_type in _NOT_NEGATIVE:
        return True
    if node.op_type == "Clip" and len(node.input) > 1 and node.input[1]:
        least = graph.constant(node.input[1])
        return least is not None and bool(np.all(least >= 0))
    passed_on = node.input if node.op_type in ("Concat", "Add") else node.input[:1]
    return node.op_type in _POSITIVE and all(_not_negative(graph, name) for name in passed_on)


def _without(
    graph: _Graph, proto: ModelProto, kept: set[int], renamed: dict[str, str], clipped: dict[int, NodeProto]
) -> Iterator[NodeProto]:
    """Copies of the nodes that stay, reading what stood in front of the quantizers."""
    outputs = {value.name for value in proto.graph.output}

    def before(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    gone = {id(q.node): q for q in graph.by_output.values() if id(q.node) not in kept}
    for node in graph.nodes:
        if (limit := clipped.get(id(node))) is not None:
            limit.input[0] = before(limit.input[0])
            yield limit
        if id(node) in gone:
            if node.output[0] in outputs and node.output[0] in renamed:
                yield helper.make_node("Identity", [before(node.output[0])], [node.output[0]], name=node.name)
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [before(name) for name in node.input]
        for attributes in copy.attribute:
            for inner in (attributes.g, *attributes.graphs):
                for deep in all_nodes(inner):
                    deep.input[:] = [before(name) for name in deep.input]
        yield copy
