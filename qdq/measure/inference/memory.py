"""How much memory a model's activations take, and how to measure many tensors within a budget.

Model + sample -> bytes of each tensor, of dynamic shapes as a run of the sample shows them -> peak of those alive at
once -> passes over the samples, samples at a time. What a session keeps beside them is in OVERHEAD and `held_bytes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper

from qdq.core.errors import InputError
from qdq.core.resources import cores, default_bytes, given_bytes, said_bytes
from qdq.measure.histogram import HISTOGRAM_BYTES
from qdq.measure.inference import partitioned
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.model import external
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, Names, needed, reads

# Beside the activations: buffers of kernels, and what an allocator cannot give back. Measured on a 3-D U-Net at 64^3:
# 89 MB of the process where the tensors alive at once take 67.
OVERHEAD = 4 / 3
# Of a node in the models that are there at a time, as protobuf and as what is known of it, and in a session with the
# reductions that measure its output: a language model of 383 nodes takes 15 MB beside weights, histograms and samples.
NODE_BYTES = 40_000
# What small blocks that were freed, and libraries that run for the first time, keep: 1 to 25 MB on six models.
PROCESS_BYTES = 28_000_000
HISTOGRAM_SETS = 4  # of all samples, and of the parts that choices are judged on
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How the samples are run: each group of tensors is one pass over them.

    Attributes:
        groups: tensor names; together all, each once.
        threads: samples at a time.
        bytes_each: estimated bytes of one sample's activations in the largest pass.
        room: bytes for the activations of all samples that run at a time.
    """

    groups: tuple[tuple[str, ...], ...]
    threads: int
    bytes_each: int
    room: int


def passes(
    model: Model, names: Sequence[str], sample: Sample, *, memory: int | None = None, threads: int | None = None
) -> Passes:
    """Group tensors so that the activations of a pass fit the budget.

    Args:
        model: the prepared model.
        names: tensors to measure; outputs of the session, so that each lives until the run ends.
        sample: the shapes count; it is run where they do not decide the size of every tensor.
        memory: budget in bytes; None for `default_bytes`.
        threads: samples at a time at most; None for one per core. Fewer where the budget is small.

    Returns:
        One group where all fit; a tensor that exceeds the budget by itself gets a pass of its own.
    """
    room = _room(model, memory)
    sizes = tensor_bytes(model, sample)
    whole = peak(model, sizes, names, model.graph.node)
    most = threads or cores()
    if whole <= room or not names:
        at_a_time = max(1, min(most, room // max(whole, 1)))
        return Passes(groups=(tuple(names),), threads=at_a_time, bytes_each=whole, room=room)
    groups: list[list[str]] = []
    largest = 0
    for name in names:
        if groups and (found := peak(model, sizes, [*groups[-1], name], _run(model, groups, name))) <= room:
            groups[-1].append(name)
        else:
            groups.append([name])
            found = peak(model, sizes, [name], _run(model, groups, name))
        largest = max(largest, found)
    return Passes(groups=tuple(map(tuple, groups)), threads=1, bytes_each=largest, room=room)


def groups_of(
    model: Model, names: Iterable[str], samples: Iterable[Sample], *, memory: int | None = None
) -> tuple[tuple[str, ...], ...]:
    """The groups of `passes` by the shapes of the first sample; none where there is no name or no sample."""
    wanted = tuple(dict.fromkeys(names))
    first = next(iter(samples), None) if wanted else None
    return () if first is None else passes(model, wanted, first, memory=memory).groups


def at_once(model: Model, samples: Iterable[Sample], *, copies: int = 1) -> int:
    """How many samples can run at a time: one per core, fewer where the budget is small.

    `copies` of the model's activations live at a time for each. The first sample's shapes count.
    """
    first = next(iter(samples), None)
    if first is None:
        return 1
    each = peak(model, tensor_bytes(model, first), [o.name for o in model.outputs], model.graph.node)
    return max(1, min(cores(), _room(model) // max(copies * each, 1)))


def require_room(model: Model, sample: Sample) -> None:
    """Refuse a budget that was given and cannot be met.

    Raises:
        InputError: the model alone, without anything measured, needs more for the sample.
    """
    budget = given_bytes()
    if budget is None:
        return
    activations, needs = needed_bytes(model, sample)
    if needs > budget:
        raise InputError(
            f"--memory gives {said_bytes(budget)}, but one sample needs {said_bytes(needs)} to run through the model "
            f"at all: {said_bytes(activations)} for activations, {said_bytes(held_bytes(model))} for weights, nodes, "
            "histograms and what the process keeps, the rest for buffers of its operators. Give more, or smaller "
            "samples."
        )


def needed_bytes(model: Model, sample: Sample) -> tuple[int, int]:
    """Bytes of the activations alive at once where a sample runs through the model, and of all that this needs."""
    activations = peak(model, tensor_bytes(model, sample), [o.name for o in model.outputs], model.graph.node)
    return activations, int(OVERHEAD * activations) + held_bytes(model)


def left_bytes(model: Model, samples: Iterable[Sample]) -> int:
    """Bytes of the budget that the first sample leaves where it runs through the model."""
    first = next(iter(samples), None)
    return max(0, default_bytes() - (needed_bytes(model, first)[1] if first is not None else 0))


def held_bytes(model: Model) -> int:
    """What runs of a model hold beside its activations.

    Of its weights a session's own copy, and one in the form that the kernels read; its nodes; the histograms of the
    tensors that weighted nodes read; and what a process keeps.
    """
    nodes = model.graph.node
    weighted = sum(node.op_type in WEIGHTED for node in nodes)
    others = NODE_BYTES * len(nodes) + HISTOGRAM_SETS * HISTOGRAM_BYTES * weighted + PROCESS_BYTES
    sizes = [2 * external.tensor_bytes(tensor) for tensor in model.graph.initializer]
    if external.is_large(model.graph.initializer):
        return max(min(partitioned.open_bytes(), sum(sizes)), *sizes) + others
    return sum(sizes) + others


def _room(model: Model, memory: int | None = None) -> int:
    """Bytes for activations of a budget, which is that for all."""
    budget = default_bytes() if memory is None else memory
    return max(1, int((budget - held_bytes(model)) / OVERHEAD))


def tensor_bytes(model: Model, sample: Sample) -> Mapping[str, int]:
    """Bytes of every computed tensor for one sample's shapes, or for larger ones that were looked at before.

    A sample is run once to see shapes that the model leaves open, unless one as large in every dimension was. Where it
    cannot be run, for which the work itself will give the reason, a size left open counts as the largest of an input.
    """
    shapes: Shapes = tuple(np.shape(sample[i.name]) for i in model.inputs)
    known: dict[Shapes, Mapping[str, int]] = model.measured
    fitting = [seen for seen in known if _covers(seen, shapes)]
    if fitting:
        return known[min(fitting, key=lambda seen: sum(map(math.prod, seen)))]
    infos = {name: model.info(name) for node in model.graph.node for name in node.output if name}
    dims = {name: list(info.shape or ()) if info else [] for name, info in infos.items()}
    tensors = [name for name, info in infos.items() if info is None or not info.dtype.endswith("_type")]
    ranked = {name for name, info in infos.items() if info is not None and info.shape is not None}
    static = {name for name in ranked if all(isinstance(d, int) for d in dims[name])}
    found = _seen(model, [name for name in tensors if name not in static], sample)
    most = max((size for shape in shapes for size in shape), default=1)
    sizes = {}
    for name, info in infos.items():
        guessed = [d if isinstance(d, int) else most for d in dims[name]]
        shape = found.get(name, guessed) if found else guessed
        sizes[name] = math.ceil(math.prod(shape) * _item_bytes(info.dtype if info else "float32"))
    if found is not None:
        known[shapes] = sizes
    return sizes


def _covers(seen: Shapes, shapes: Shapes) -> bool:
    """Whether inputs of some shapes are as large as others in every dimension."""
    pairs = zip(seen, shapes, strict=True)
    return all(len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True)) for a, b in pairs)


def _item_bytes(dtype: str) -> float:
    """Bytes of one element; those of FP16 and BF16 on a CPU, which computes them in FP32."""
    bits = re.search(r"\d+", dtype)
    return 4 if dtype in ("float16", "bfloat16") else int(bits.group()) / 8 if bits else 1


def _seen(model: Model, tensors: Sequence[str], sample: Sample) -> Mapping[str, tuple[int, ...]] | None:
    """The shapes of some tensors in a run of a sample, None where that fails."""
    if not tensors:
        return {}
    proto, names = ModelProto(), Names(model.names())
    proto.CopyFrom(model.proto)
    del proto.graph.node[:]
    ends, wanted = dict[str, str](), set(tensors)
    for node in model.graph.node:
        proto.graph.node.append(node)
        for name in wanted.intersection(node.output):
            ends[name] = names.fresh(f"{name}_shape")
            proto.graph.node.append(helper.make_node("Shape", [name], [ends[name]], name=ends[name]))
    try:
        found = Session(model.replace(proto), ends.values(), threads=1, in_order=True)(sample)
    except InputError:
        return None
    return {name: tuple(int(d) for d in found[end]) for name, end in ends.items()}


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
    forever = set(kept)
    for name, index in last.items():
        if name in sizes and name not in forever:
            ending.setdefault(index, []).append(name)
    live = most = 0
    for index, node in enumerate(nodes):
        live += sum(sizes[o] for o in node.output if o)
        most = max(most, live)
        live -= sum(sizes[name] for name in ending.get(index, ()))
        live -= sum(sizes[o] for o in node.output if o and o not in last and o not in forever)
    return most
