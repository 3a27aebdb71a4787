"""A model that `repair` is changing: its copy, what the rules find in it, new names and tensors, the list of changes.

RepairDraft(model) -> refresh (view and flags) -> passes change `proto` and `log` -> sweep drops what nothing reads.
It must not decide what to repair, nor touch the user's proto.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from engines.backends.profile import Profile
from engines.core.documents import Part
from engines.core.nodes import label
from qdq.lint.lint import RULES
from qdq.lint.view import View
from qdq.model.model import Model
from qdq.model.nodes import Names, all_nodes


class Change(Part, frozen=True, kw_only=True):
    """One repair: the rules it answers, the node it was made at, and what was done."""

    rules: tuple[str, ...]
    node: str
    what: str


class RepairDraft:
    """The model in the making, its view, and the rules that find something at each node."""

    def __init__(self, model: Model, profile: Profile) -> None:
        """A copy of a model, to be repaired for the compiler of a profile."""
        self.source, self.profile = model, profile
        self.proto = ModelProto()
        self.proto.CopyFrom(model.proto)
        self.changes: list[Change] = []
        self._seen = -1  # number of changes that the view knows
        self._made: dict[tuple[object, ...], list[str]] = {}
        taken = {t.name for t in self.proto.graph.initializer} | {v.name for v in self.proto.graph.input}
        self.name = Names(taken | {o for n in self.proto.graph.node for o in n.output}).fresh  # of a new tensor or node

    def refresh(self, *, always: bool = False) -> None:
        """Read the model again if a pass has logged a change since the last time."""
        if self._seen == len(self.changes) and not always:
            return
        self._seen = len(self.changes)
        self.view = View(self.source.replace(self.proto), self.profile)
        self.flags: dict[int, set[str]] = {}
        for rule in RULES:
            for node, _ in rule.find(self.view):
                self.flags.setdefault(id(node), set()).add(rule.name)

    def flagged(self, *nodes: NodeProto | None) -> set[str]:
        """Names of the rules that find something at any of these nodes."""
        return set().union(*(self.flags.get(id(n), set()) for n in nodes if n is not None))

    def log(self, rules: Sequence[str], node: NodeProto, what: str) -> None:
        """Note a repair."""
        self.changes.append(Change(rules=tuple(sorted(rules)), node=label(node), what=what))

    def init(self, hint: str, array: np.ndarray) -> str:
        """One more initializer; returns its name."""
        name = self.name(hint)
        contiguous = np.ascontiguousarray(array).reshape(np.shape(array))
        self.proto.graph.initializer.append(numpy_helper.from_array(contiguous, name))
        return name

    def params(self, node: NodeProto, scale: np.ndarray) -> list[str]:
        """Initializers of an INT8 scale and zero point, shared by nodes that shared theirs."""
        key = (*node.input[1:], scale.tobytes(), scale.dtype.name)
        if key not in self._made:
            zero = np.zeros(scale.shape, np.int8)
            self._made[key] = [self.init(node.input[1] + "_int8", scale), self.init(node.input[1] + "_zero", zero)]
        return self._made[key]

    def rewire(self, old: str, new: str) -> None:
        """Let every reader of a tensor read another one."""
        for node in all_nodes(self.proto.graph):
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def sweep(self) -> None:
        """Drop nodes and initializers that nothing reads any more."""
        graph = self.proto.graph
        while True:
            read = {v.name for v in graph.output} | {i for n in all_nodes(graph) for i in n.input}
            read |= {v.name for n in graph.node for a in n.attribute for v in a.g.output}
            dead = [i for i, n in enumerate(graph.node) if not any(o in read for o in n.output)]
            for i in reversed(dead):
                del graph.node[i]
            if not dead:
                break
            self._seen = -1  # the view holds nodes that are gone
        unread = [i for i, t in enumerate(graph.initializer) if t.name not in read]
        gone = {graph.initializer[i].name for i in unread}
        for i in reversed(unread):
            del graph.initializer[i]
        for value in [v for v in graph.input if v.name in gone]:
            graph.input.remove(value)
