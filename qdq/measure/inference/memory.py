"""How much memory a model's activations take, and how to measure many tensors within a budget.

Model + sample -> bytes of each tensor -> peak of those alive at once -> passes over the samples, threads per pass.
Sizes are estimates from shapes: dynamic dimensions that no input names count as the largest one that does. This module
must not run anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from qdq.core.resources import cores, default_bytes
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.model.nodes import needed, reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How the samples are run: each group of tensors is one pass over them.

    Attributes:
        groups: tensor names; together all, each once.
        threads: samples at a time.
        bytes_each: estimated bytes of one sample's activations in the largest pass.
    """

    groups: tuple[tuple[str, ...], ...]
    threads: int
    bytes_each: int


def passes(
    model: Model, names: Sequence[str], sample: Sample, *, memory: int | None = None, threads: int | None = None
) -> Passes:
    """Group tensors so that the activations of a pass fit the budget.

    Args:
        model: the prepared model.
        names: tensors to measure; outputs of the session, so that each lives until the run ends.
        sample: the shapes count.
        memory: budget in bytes; None for `default_bytes`.
        threads: samples at a time at most; None for one per core. Fewer where the budget is small.

    Returns:
        One group where all fit; a tensor that exceeds the budget by itself gets a pass of its own.
    """
    budget = default_bytes() if memory is None else memory
    sizes = tensor_bytes(model, sample)
    whole = peak(model, sizes, names, model.graph.node)
    most = threads or cores()
    if whole <= budget:
        return Passes(groups=(tuple(names),), threads=max(1, min(most, budget // max(whole, 1))), bytes_each=whole)
    groups: list[list[str]] = []
    largest = 0
    for name in names:
        if groups and (found := peak(model, sizes, [*groups[-1], name], _run(model, groups, name))) <= budget:
            groups[-1].append(name)
        else:
            groups.append([name])
            found = peak(model, sizes, [name], _run(model, groups, name))
        largest = max(largest, found)
    return Passes(groups=tuple(map(tuple, groups)), threads=1, bytes_each=largest)


def tensor_bytes(model: Model, sample: Sample) -> dict[str, int]:
    """Bytes of every computed tensor for one sample's shapes."""
    sized = (zip(i.shape or (), np.shape(sample[i.name]), strict=False) for i in model.inputs)
    bound = {dim: size for dims in sized for dim, size in dims if isinstance(dim, str)}
    unknown = max((size for fed in model.inputs for size in np.shape(sample[fed.name])), default=1)
    sizes = {}
    for name in (output for node in model.graph.node for output in node.output if output):
        info = model.info(name)
        if info is None or info.shape is None:  # the rank is not even known: as large as the largest input
            sizes[name] = max((np.asarray(sample[i.name]).nbytes for i in model.inputs), default=1)
            continue
        dims = [d if isinstance(d, int) else bound.get(d or "", unknown) for d in info.shape]
        sizes[name] = math.prod(dims) * (8 if info.dtype in ("float64", "int64", "uint64") else 4)
    return sizes


def _run(model: Model, groups: Sequence[Sequence[str]], name: str) -> Sequence[NodeProto]:
    """The nodes that the last of some passes runs with one more tensor: the first runs all, to see every magnitude."""
    return model.graph.node if len(groups) == 1 else needed(model.graph.node, [*groups[-1], name])


def peak(model: Model, sizes: Mapping[str, int], kept: Sequence[str], nodes: Sequence[NodeProto]) -> int:
    """Bytes of the activations alive at once, at most: each from its node to its last reader, `kept` ones to the end.

    `nodes` are those that are run.
    """
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        last.update(dict.fromkeys(reads(node), index))
    ending: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in sizes and name not in kept:
            ending.setdefault(index, []).append(name)
    live = most = 0
    for index, node in enumerate(nodes):
        live += sum(sizes[o] for o in node.output if o)
        most = max(most, live)
        live -= sum(sizes[name] for name in ending.get(index, ()))
    return most
