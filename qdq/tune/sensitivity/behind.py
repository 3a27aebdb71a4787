"""What of a trial's model must run: the nodes behind its group, from tensors of the float model.

trial model + group + outputs -> `Behind`: tensors to feed, nodes up to the outputs, nodes up to the probes
A probe is a tensor behind the group that the next products read, or the end: what noise there is in them is in
proportion to that of the outputs while it is small. It must not run a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from engines.core.operators import COMPOUNDS, CONTRACTIONS
from qdq.assemble.held_out import in_its_types
from qdq.measure.inference.partitioned import excerpt
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.model.nodes import bodies, needed, reads

_PRODUCTS = CONTRACTIONS | COMPOUNDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """The part of a trial that differs from the float model.

    Attributes:
        model: of the trial.
        nodes: up to the outputs, in the order of the graph.
        outputs: those of the model that the group has a part in.
        near: up to the probes, in the order of the graph.
        probes: tensors that the float model has too.
        last: no product lies behind the probes, so that the outputs cost hardly more.
    """

    model: Model
    nodes: tuple[NodeProto, ...]
    outputs: tuple[str, ...]
    near: tuple[NodeProto, ...]
    probes: tuple[str, ...]
    last: bool

    @property
    def inputs(self) -> frozenset[str]:
        """Tensors of the float model that the nodes read."""
        return _inputs(self.model, self.nodes)

    def session(self, wanted: Sequence[str], fed: Mapping[str, np.ndarray], *, near: bool) -> tuple[Session, list[str]]:
        """A session of the nodes, or of those up to the probes, for some tensors, and what it is fed.

        `fed` are such tensors of one sample, whose types count.
        """
        nodes = self.near if near else self.nodes
        inputs = sorted(_inputs(self.model, nodes))
        types: dict[str, np.dtype[Any]] = {name: fed[name].dtype for name in inputs}
        part = excerpt(self.model, nodes, types)
        read = {name for node in nodes for name in reads(node)}
        part.graph.initializer.extend(t for name, t in self.model.initializers.items() if name in read)
        return in_its_types(self.model.replace(part), wanted, threads=1), inputs


def behind(trial: Model, plain: Model, changed: Collection[str], outputs: Sequence[str]) -> Behind:
    """What lies behind a group.

    Args:
        trial: the model with the group in a candidate; tensors of the float model keep their names.
        plain: the float model.
        changed: the group's nodes of the main graph.
        outputs: of the model, that count.
    """
    old, known = {node.name for node in plain.graph.node}, plain.names()
    moved, near_tensors = set[str](), set[str]()
    nodes, near = list[NodeProto](), list[NodeProto]()
    for node in trial.graph.node:
        starts = node.name in changed or node.name not in old
        from_moved = moved.intersection(reads(node))
        if not starts and not from_moved:
            continue
        nodes.append(node)
        moved.update(name for name in node.output if name)
        product = node.op_type in _PRODUCTS or any(True for _ in bodies(node))
        if (starts or not product) and from_moved <= near_tensors:
            near.append(node)
            near_tensors.update(name for name in node.output if name)
    ends = tuple(name for name in outputs if name in moved)
    whole = needed(nodes, ends)
    names = {node.name for node in near}
    beyond = [node for node in whole if node.name not in names]
    crossing = {name for node in beyond for name in reads(node)} | set(ends)
    probes = tuple(sorted(name for name in crossing & near_tensors if name in known and _real(plain, name)))
    last = not any(node.op_type in _PRODUCTS or any(True for _ in bodies(node)) for node in beyond)
    return Behind(
        model=trial,
        nodes=tuple(whole),
        outputs=ends,
        near=tuple(needed(near, probes)),
        probes=probes,
        last=last or not probes,
    )


def whole(trial: Model, outputs: Sequence[str]) -> Behind:
    """All of a trial, from the input."""
    nodes = tuple(needed(trial.graph.node, outputs))
    return Behind(model=trial, nodes=nodes, outputs=tuple(outputs), near=nodes, probes=(), last=True)


def _inputs(model: Model, nodes: Sequence[NodeProto]) -> frozenset[str]:
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in reads(node) if name}
    return frozenset(read - made - model.initializers.keys())


def _real(model: Model, name: str) -> bool:
    info = model.info(name)
    return info is not None and "float" in info.dtype
