"""What every rewrite returns, and the replacement of one node by several that every rewrite is made of.

Model -> `Edit` collects which node becomes which -> Rewritten: the new Model and the names of the nodes fired on.
It must not know any rewrite.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from qdq.model.model import Model
from qdq.model.nodes import all_nodes
from qdq.passes.draft import Draft, assign, unique


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """An exact rewrite of `qdq.surgery`, by file name, and the nodes that it is applied to."""

    name: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """A model with the same outputs up to float rounding, and the names of the nodes that a rewrite fired on."""

    model: Model
    fired: tuple[str, ...]


class Edit:
    """Replaces nodes of a model; names of what is added are unique."""

    def __init__(self, model: Model, only: Collection[str] | None) -> None:
        """Start from a prepared or quantized model; `only` are the names of the nodes that may be changed."""
        self._model, self._only = model, only
        self._draft = Draft(model)
        self._by: dict[str, Sequence[NodeProto]] = {}
        self._fired: dict[str, None] = {}  # an ordered set
        self._taken = {name for n in all_nodes(model.graph) for name in (n.name, *n.input, *n.output)}
        self._taken |= {*model.initializers, *(v.name for v in (*model.graph.input, *model.graph.output))}

    def candidates(self, *op_types: str) -> Iterable[NodeProto]:
        """The nodes of these types that may be changed, in the order of the graph."""
        for node in self._model.graph.node:
            if node.op_type in op_types and not node.domain and (self._only is None or node.name in self._only):
                yield node

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

    def node(self, op_type: str, inputs: Sequence[str], wanted: str, output: str = "", **attributes: Any) -> NodeProto:
        """A new node, not yet in the graph; its output has its name unless `output` is given."""
        name = self.name(wanted)
        return helper.make_node(op_type, list(inputs), [output or name], name=name, **attributes)

    def replace(self, node: NodeProto, by: Sequence[NodeProto], fired: NodeProto | None = None) -> None:
        """Put these nodes in a node's place; the last makes its output. `fired` is the one to report, if another."""
        self._by[node.name] = by
        self._fired[(fired or node).name] = None

    def finish(self) -> Rewritten:
        """The result; what nothing reads any more is dropped, and the same model comes back if nothing fired."""
        if not self._fired:
            return Rewritten(model=self._model, fired=())
        nodes = list(self._draft.graph.node)
        assign(self._draft.graph.node, [new for old in nodes for new in self._by.get(old.name, [old])])
        return Rewritten(model=self._draft.finish(), fired=tuple(self._fired))
