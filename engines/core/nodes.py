"""Questions about ONNX nodes: their attributes, what they hold inside, the axes of their weights and batches.

Must not know files or passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engines.core.operators import (
    ARITHMETIC,
    CURVES,
    LAST_AXIS_NORMS,
    RAMPS,
    RECURRENCES,
    SIZED_BY_VALUES,
    SOFTMAXES,
    family,
)

_SCATTERS = family("Scatter ScatterElements ScatterND TensorScatter")


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def ints(node: NodeProto, name: str, default: list[int]) -> list[int]:
    """An attribute of integers."""
    return next((list(a.ints) for a in node.attribute if a.name == name), default)


def factor(node: NodeProto, name: str) -> float:
    """alpha or beta of a Gemm; 1 where it is absent, and for any other operator."""
    return next((a.f for a in node.attribute if a.name == name and node.op_type == "Gemm"), 1.0)


def attribute_value(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute of any kind, or what the standard says where it is absent."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """A copy of the value of a Constant node, named as its output; None for text, sparse values and other nodes."""
    held, tensor = next(iter(node.attribute), None), TensorProto()
    if node.op_type != "Constant" or node.domain or held is None:
        return None
    dtype = {"value_int": np.int64, "value_float": np.float32}.get(held.name.removesuffix("s"))
    if held.name == "value":
        tensor.CopyFrom(held.t)
    elif dtype is not None:
        tensor = numpy_helper.from_array(np.array(helper.get_attribute_value(held), dtype))
    else:
        return None
    tensor.name = node.output[0]
    return tensor


def label(node: NodeProto) -> str:
    """What people and kernels call a node: its name, or what TensorRT's parser calls one without a name."""
    return str(node.name or f"node_of_{node.output[0]}")


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among a node's attributes (of If, Loop, Scan)."""
    for held in node.attribute:
        if held.HasField("g"):
            yield held.g
        yield from held.graphs


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all bodies in it."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from all_graphs(body)


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node of a graph and of the bodies inside it."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from all_nodes(body)


def sized_by_values(graph: GraphProto) -> frozenset[str]:
    """Tensors of a graph whose size depends on values: what such an operator gives, and what is computed from that.

    What is scattered into a tensor leaves it its size.
    """
    found: set[str] = set()
    for node in graph.node:
        read = node.input[:1] if node.op_type in _SCATTERS else reads(node)
        inside = (inner.op_type in SIZED_BY_VALUES for body in bodies(node) for inner in all_nodes(body))
        if node.op_type in SIZED_BY_VALUES or not found.isdisjoint(read) or any(inside):
            found.update(filter(None, node.output))
    return frozenset(found)


def captured(node: NodeProto) -> frozenset[str]:
    """Names that the bodies of a node read from the graphs around it."""
    found: set[str] = set()
    for body in bodies(node):
        own = {v.name for v in body.input} | {t.name for t in body.initializer}
        read = {v.name for v in body.output}
        for inner in body.node:
            read |= set(inner.input) | captured(inner)
            own |= set(inner.output)
        found |= read - own
    return frozenset(found - {""})


def reads(node: NodeProto) -> list[str]:
    """Names of the tensors that a node and its bodies read."""
    return [*filter(None, node.input), *sorted(captured(node))]


def all_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a model stores: initializers and attributes, bodies and functions included."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)


def external_files(proto: ModelProto) -> set[str]:
    """Locations of a model's external data, as the file says them: relative to its folder."""
    external = (t for t in all_tensors(proto) if t.data_location == TensorProto.EXTERNAL)
    return {entry.value for t in external for entry in t.external_data if entry.key == "location"}


def input_axis(node: NodeProto, rank: int) -> int:
    """The axis of a weight that runs over input channels.

    Conv 1; ConvTranspose 0; Gemm 0 or 1 by transB; MatMul the last but one.
    """
    if node.op_type == "ConvTranspose":
        return 0
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 1
    return rank - 2


def weight_axis(node: NodeProto, rank: int, index: int = 1) -> int:
    """The axis of a product's operand that runs over output channels, which no sum runs over.

    Conv 0; ConvTranspose 1; Gemm 0 or 1 by transB (of operand 0 by transA); MatMul and Einsum the last (of operand 0
    the last but one). `rank` is the operand's; `index` is 1 where it is on the right, as weights are, 0 on the left.
    """
    if node.op_type in ("Conv", "ConvTranspose"):
        return int(node.op_type == "ConvTranspose")
    if node.op_type == "Gemm":
        turned = bool(attribute(node, "transB" if index else "transA", 0))
        return int(turned != bool(index))
    return rank - 2 + index


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for held in node.attribute:
        if held.HasField("t"):
            yield held.t
        yield from held.tensors
    for body in bodies(node):
        yield from _graph_tensors(body)


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
