"""FP64 made FP32, for TensorRT computes nothing in FP64 and no quantizer reads it.

    double x -> [MatMul ...] -> double y    ->    double x -> Cast -> [float MatMul ...] -> Cast -> double y

Inputs and outputs keep their type, so that what a caller feeds and reads stays right. What overflows FP32 is refused by
name. Nodes that make FP64 of integers and integers of it again (sizes of a Resize) stay: FP32 would round them above
2^24, and the compiler's parser takes them. Operators of other domains, and BitCast, keep the types that they are of.
It must not change a model without FP64, or the size of a number by more than FP32 rounds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from engines.core.nodes import all_graphs, all_nodes, bodies
from qdq.core.errors import ModelError
from qdq.model.model import Model
from qdq.model.nodes import read_as, reads
from qdq.passes.draft import Draft, assign, unique

DOUBLE, FLOAT = TensorProto.DOUBLE, TensorProto.FLOAT
_TYPES = ("to", "dtype", "output_datatype")  # attributes that name a tensor type
_LIMITS, _WIDE = np.finfo(np.float32), np.finfo(np.float64)


def has_doubles(draft: Draft) -> bool:
    """Whether anything in a model is FP64; its types are inferred."""
    graph = draft.shown.graph
    values = (v.type.tensor_type.elem_type for g in all_graphs(graph) for v in (*g.input, *g.output, *g.value_info))
    held = (t.data_type for t in (*draft.tensors.values(), *_stored(graph)))
    named = (a.i for node in all_nodes(graph) for a in node.attribute if a.name in _TYPES)
    return DOUBLE in (*values, *held, *named)


def single_precision(model: Model) -> Model:
    """The model with FP32 in place of FP64, and a note that says so; the same one if it has no FP64.

    Args:
        model: its types inferred; its opset is that of prepared models.

    Raises:
        ModelError: a constant is too large for FP32.
    """
    changed = [node for node in model.graph.node if _holds(model, node)]
    left = _between_integers(model, changed)
    changed = [node for node in changed if node.name not in left]
    if all(map(_typed, changed)):
        return model
    draft = Draft(model)
    names = {node.name for node in changed}
    _Change(model, draft, names).make()
    done = draft.finish()
    note = (  # TensorRT-RTX 1.7.1 takes a double input or output for one of float
        f"{len(changed)} of {len(model.graph.node)} nodes compute in FP64, which TensorRT does not: they become FP32. "
        "Inputs and outputs of the files keep their types; an engine reads and gives FP32 there."
    )
    return done.replace(done.proto, notes=(note,))


def _typed(node: NodeProto) -> bool:
    """Whether a node is one of the types that it reads, and no other: of another domain, or of bits."""
    return bool(node.domain) or node.op_type == "BitCast"


def _holds(model: Model, node: NodeProto) -> bool:
    """Whether a node, or one in its bodies, computes with FP64 tensors of the main graph or of its own."""
    if any(_dtype(model, t) == "float64" for t in (*reads(node), *node.output)):
        return True
    return any(inner.data_type == DOUBLE for body in bodies(node) for inner in _stored(body)) or any(
        a.name in _TYPES and a.i == DOUBLE for body in bodies(node) for n in all_nodes(body) for a in n.attribute
    )


def _between_integers(model: Model, nodes: Iterable[NodeProto]) -> set[str]:
    """Names of the nodes in groups, connected by FP64 tensors, that read and make nothing else but integers."""
    groups: dict[str, str] = {}

    def root(name: str) -> str:
        while groups.setdefault(name, name) != name:
            name = groups[name]
        return name

    ends = {v.name for v in (*model.graph.input, *model.graph.output)}
    spoilt = []
    for node in nodes:
        tensors = [*reads(node), *node.output]
        for tensor in tensors:
            if _dtype(model, tensor) == "float64" and not model.is_constant(tensor):
                groups[root(tensor)] = root(f"node {node.name}")
        plain = all(_dtype(model, t) in ("float64", "bool") or "int" in _dtype(model, t) for t in tensors if t)
        if (
            not plain
            or _typed(node)
            or any(bodies(node))
            or ends.intersection(t for t in tensors if _dtype(model, t) == "float64")
        ):
            spoilt.append(f"node {node.name}")
    lost = {root(name) for name in spoilt}
    return {node.name for node in nodes if root(f"node {node.name}") not in lost}


class _Change:
    """A draft whose nodes of some names compute in FP32."""

    def __init__(self, model: Model, draft: Draft, names: set[str]) -> None:
        self._model, self._draft, self._names = model, draft, names
        self._taken = model.names()
        self._renamed: dict[str, str] = {}  # tensors whose FP32 form has another name
        self._casts: list[NodeProto] = []

    def make(self) -> None:
        """Change constants, nodes and what lies inside them; put a Cast at each border."""
        graph, nodes = self._draft.graph, []
        starts = [v.name for v in graph.input if _dtype(self._model, v.name) == "float64"]
        for name in starts:
            nodes.append(self._cast(name, self._other(name), FLOAT))
        others = [n for n in graph.node if n.name not in self._names or _typed(n)]
        kept = {t for node in others for t in reads(node)}
        for name, tensor in list(self._draft.tensors.items()):
            if tensor.data_type == DOUBLE:
                into = self._other(name) if name in kept or name in self._draft.output_names else name
                self._draft.put(into, narrowed(self._draft.array(name), name))
        ends = []
        for output in (v.name for v in graph.output if _dtype(self._model, v.name) == "float64"):
            if self._model.producer(output) is not None:
                ends.append(self._cast(self._other(output), output, DOUBLE))
        single = {o for node in graph.node if node.name in self._names for o in node.output}
        for node in graph.node:
            nodes += self._foreign(node) if _typed(node) else [self._single(node)]
        assign(graph.node, [*nodes, *ends])
        for value in graph.value_info:
            if value.type.tensor_type.elem_type == DOUBLE and value.name in single:
                value.type.tensor_type.elem_type = FLOAT

    def _single(self, node: NodeProto) -> NodeProto:
        if node.name not in self._names:
            return node
        read_as(node, self._renamed)
        node.output[:] = [self._renamed.get(name, name) for name in node.output]
        for each in (node, *(n for body in bodies(node) for n in all_nodes(body))):
            for held in each.attribute:
                if held.name in _TYPES and held.i == DOUBLE:
                    held.i = FLOAT
                if held.HasField("t") and held.t.data_type == DOUBLE:
                    held.t.CopyFrom(numpy_helper.from_array(narrowed(numpy_helper.to_array(held.t), each.name)))
        for body in (g for b in bodies(node) for g in all_graphs(b)):
            for tensor in body.initializer:
                if tensor.data_type == DOUBLE:
                    tensor.CopyFrom(
                        numpy_helper.from_array(narrowed(numpy_helper.to_array(tensor), tensor.name), tensor.name)
                    )
            for value in (*body.input, *body.output, *body.value_info):
                if value.type.tensor_type.elem_type == DOUBLE:
                    value.type.tensor_type.elem_type = FLOAT
        return node

    def _foreign(self, node: NodeProto) -> list[NodeProto]:
        """A node between Casts: what it reads and makes stays FP64."""
        before, after = [], []
        stated = {v.name: v for v in self._draft.graph.value_info}
        for index, name in enumerate(node.input):
            if _dtype(self._model, name) == "float64" and not self._model.is_constant(name):
                before.append(self._cast(self._renamed.get(name, name), self._name(f"{name}_double"), DOUBLE))
                node.input[index] = before[-1].output[0]
        for index, name in enumerate(node.output):
            if _dtype(self._model, name) == "float64":
                node.output[index] = self._name(f"{name}_double")
                after.append(self._cast(node.output[index], self._renamed.get(name, name), FLOAT))
                if name in stated:  # nobody else knows its shape
                    wide = self._draft.graph.value_info.add()
                    wide.CopyFrom(stated[name])
                    wide.name = node.output[index]
        return [*before, node, *after]

    def _other(self, name: str) -> str:
        """The name of the FP32 form of a tensor that keeps its own in FP64."""
        return self._renamed.setdefault(name, self._name(f"{name}_float"))

    def _cast(self, source: str, target: str, kind: int) -> NodeProto:
        return helper.make_node("Cast", [source], [target], name=self._name(f"{target}_Cast"), to=kind)

    def _name(self, wanted: str) -> str:
        name = unique(wanted, self._taken)
        self._taken.add(name)
        return name


def narrowed(values: np.ndarray, name: str) -> np.ndarray:
    """FP64 as FP32: the limits of the one become those of the other, and a scalar that is no zero stays none.

    Raises:
        ModelError: a finite value is beyond FP32.
    """
    finite = values[np.isfinite(values) & (np.abs(values) != _WIDE.max)]
    if finite.size and (most := np.abs(finite).max()) > _LIMITS.max:
        raise ModelError(
            f"Cannot make this FP64 model FP32: {name!r} holds {most:.4g}, and FP32 ends at {_LIMITS.max:.4g}. "
            "TensorRT has no FP64. Scale what the model computes, or leave that part out of it."
        )
    with np.errstate(over="ignore", under="ignore"):
        made = values.astype(np.float32)
        made[np.abs(values) == _WIDE.max] = _LIMITS.max
        if values.size == 1 and values.all() and not made.all():
            made[...] = _LIMITS.tiny
        signed: np.ndarray = np.copysign(made, values, dtype=np.float32)
    return signed


def _stored(graph: GraphProto) -> Iterator[TensorProto]:
    """The tensors of a graph and of the bodies in it."""
    for each in all_graphs(graph):
        yield from each.initializer
        yield from (a.t for node in each.node for a in node.attribute if a.HasField("t"))


def _dtype(model: Model, tensor: str) -> str:
    info = model.info(tensor)
    return info.dtype if info is not None else "undefined"
