"""What every rewrite returns, and the replacement of one node by several that every rewrite is made of.

Model -> `Edit` collects which node becomes which -> Rewritten: the new Model, the nodes fired on, why not others.
A rewrite raises `Unfit` with the reason at the first condition that a node does not meet. It must not know any rewrite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from engines.core.documents import Part
from qdq.model.model import Model
from qdq.model.nodes import all_graphs, all_nodes, controlled_nodes, needed
from qdq.passes.bodies import show_bodies
from qdq.passes.draft import Draft, assign, unique


class Rewrite(Part, frozen=True, kw_only=True):
    """An exact rewrite of `qdq.passes.rewrites`, by file name, and the nodes that it is applied to."""

    name: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """A model with the same outputs up to float rounding; the old one if nothing fired."""

    model: Model
    fired: tuple[str, ...]  # names of the nodes that the rewrite fired on
    unfit: Mapping[str, str] = field(default_factory=dict)  # reasons, of the others whose operator it starts from


class Unfit(Exception):
    """Why a rewrite does not fit a node."""


class Edit:
    """Replaces nodes of a model; names of what is added are unique."""

    def __init__(self, model: Model, only: Collection[str] | None) -> None:
        """Start from a prepared or quantized model; `only` are the names of the nodes that may be changed."""
        self._model, self._only = model, only
        self._draft = Draft(model)
        self._by: dict[str, Sequence[NodeProto]] = {}
        self._fired: dict[str, None] = {}  # an ordered set
        self._unfit: dict[str, str] = {}
        self._taken = {name for n in all_nodes(model.graph) for name in (n.name, *n.input, *n.output)}
        self._taken |= {*model.initializers, *(v.name for v in (*model.graph.input, *model.graph.output))}

    def each(self, op_types: Collection[str], change: Callable[[NodeProto], object], *, inside: bool = False) -> None:
        """Call `change` for the nodes of these types that may be changed, in the order of the graph.

        With `inside`, also for those in bodies of If, Loop and Scan; it must put nothing elsewhere then. What it raises
        as `Unfit` becomes the reason of that node; it must raise before it replaces one.
        """
        within = controlled_nodes(self._model.graph) if inside else ()
        for node in (*self._model.graph.node, *within):
            if node.op_type in op_types and not node.domain and (self._only is None or node.name in self._only):
                try:
                    change(node)
                except Unfit as reason:
                    self._unfit[node.name] = str(reason)

    def name(self, wanted: str) -> str:
        """A name that no node or tensor of the model has."""
        name = unique(wanted, self._taken)
        self._taken.add(name)
        return name

    def array(self, name: str) -> np.ndarray:
        """The values of an initializer, of the model or new."""
        return self._draft.array(name)

    def constant(self, wanted: str, values: np.ndarray) -> str:
        """A new initializer; returns its name."""
        name = self.name(wanted)
        self._draft.put(name, values)
        return name

    def small(self, wanted: str, values: np.ndarray, near: NodeProto) -> tuple[str, list[NodeProto]]:
        """A new constant that shapes depend on, and the nodes that make it where `near` is.

        In a body that is a Constant: onnx's shape inference does not see what values a body captures.
        """
        if near.name not in self._model.inner_nodes:
            return self.constant(wanted, values), []
        node = self.node("Constant", [], wanted, value=numpy_helper.from_array(values))
        return node.output[0], [node]

    def node(self, op_type: str, inputs: Sequence[str], wanted: str, output: str = "", **attributes: Any) -> NodeProto:
        """A new node, not yet in the graph; its output has its name unless `output` is given."""
        name = self.name(wanted)
        return helper.make_node(op_type, list(inputs), [output or name], name=name, **attributes)

    def first(self, source: str, count: int, axis: int, node: NodeProto) -> NodeProto:
        """A Slice that makes the output of a node of the first elements of a tensor along an axis."""
        bounds = {"start": 0, "end": count, "axis": axis}
        cut = [self.constant(f"{node.name}_{key}", np.array([value], np.int64)) for key, value in bounds.items()]
        return self.node("Slice", [source, *cut], f"{node.name}_Slice", node.output[0])

    def replace(self, node: NodeProto, by: Sequence[NodeProto], fired: NodeProto | None = None) -> None:
        """Put these nodes in a node's place; the last makes its output. `fired` is the one to report, if another."""
        self._by[node.name] = by
        self._fired[(fired or node).name] = None

    def finish(self) -> Rewritten:
        """The result; what nothing reads any more is dropped, and the same model comes back if nothing fired."""
        if not self._fired:
            return Rewritten(model=self._model, fired=(), unfit=self._unfit)
        for graph in reversed(list(all_graphs(self._draft.graph))):  # a body before what it is in, which is copied
            if any(old.name in self._by for old in graph.node):
                assign(graph.node, [altered(new) for old in graph.node for new in self._by.get(old.name, [old])])
                if graph is not self._draft.graph:
                    assign(graph.node, needed(graph.node, {value.name for value in graph.output}))
        if not self._fired.keys().isdisjoint(self._model.inner_nodes):
            self._draft.infer()
            show_bodies(self._draft)
        return Rewritten(model=self._draft.finish(), fired=tuple(self._fired), unfit=self._unfit)


_Change = Callable[[Model, Edit, NodeProto], None]


def each_node(
    model: Model, only: Collection[str] | None, op_types: Collection[str], change: _Change, *, inside: bool = False
) -> Rewritten:
    """What a rewrite makes that changes one node after the other: see `Edit.each`."""
    edit = Edit(model, only)
    edit.each(op_types, lambda node: change(model, edit, node), inside=inside)
    return edit.finish()


def altered(node: NodeProto, inputs: Mapping[int, str] | None = None, output: str = "") -> NodeProto:
    """A copy of a node that reads other tensors at some inputs, or makes another output."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for index, name in (inputs or {}).items():
        copy.input[index] = name
    if output:
        copy.output[0] = output
    return copy


def require_constants(model: Model, node: NodeProto, start: int = 1) -> None:
    """Raise `Unfit` if a node computes with anything but constants from an input on."""
    for name in filter(None, node.input[start:]):
        if not model.is_constant(name):
            raise Unfit(f"{name!r}, which {node.op_type} {node.name!r} reads, is computed")


def only_reader(model: Model, tensor: str) -> NodeProto:
    """The one node that reads a tensor; raises `Unfit` where there are others or none, or it is an output."""
    use = model.only_use(tensor)
    if use is None:
        count = len(model.consumers(tensor))
        what = "is an output of the model" if model.is_output(tensor) else f"has {count} readers, not one"
        raise Unfit(f"{tensor!r} {what}")
    return use.node
