"""Empirical bias correction: shift each layer's output so that quantization does not move its mean.

float model + Q/DQ model + samples -> per weighted node the mean of its output per channel, float less quantized so far
-> added to the node's bias, layer by layer in topological order -> Q/DQ model. Both models are run once: the Q/DQ
model in stages, each from what the corrected stages before it have left.
In front of a Relu the mean behind it counts: that of the values it cuts off would move the others for nothing. Whether
it helps is for `held_out` to say. This module must not touch codes or scales.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, appendix
on empirical bias correction; layer by layer as in A White Paper on Neural Network Quantization, arXiv 2106.08295.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from engines.core.documents import replace
from qdq.assemble.held_out import HeldOutScore, Split, split
from qdq.core.arrays import Floats
from qdq.core.progress import Progress
from qdq.measure.inference.memory import at_once, groups_of, left_bytes, passes
from qdq.measure.inference.samples import Sample, overlapped
from qdq.measure.inference.session import Session
from qdq.measure.inference.staged import Stages, can_stage
from qdq.model.model import Model
from qdq.model.nodes import Names, factor, reads
from qdq.passes.draft import assign
from qdq.plan.weighted_node import WeightedNode

_Sums = dict[str, tuple[Floats, Floats, int]]  # node -> per channel the sum and how many are active; values in each
POSITIONS = 8192  # values per channel that make a mean, over all samples
MINIMUM_SAMPLES = 3  # whatever their size: means differ from sample to sample
MINIMUM_ACTIVE = 0.02  # share of a channel's values: of a channel that is nearly always cut off, the mean says little
# Held-out samples still come from the calibration set: with any gain there accepted, ani_C lost 0.9 dB and resnet20
# 0.2 dB on the evaluation samples of the zoo.
MINIMUM_GAIN_DB = 1.0


def corrected(
    model: Model,
    quantized: Model,
    nodes: Iterable[WeightedNode],
    samples: Iterable[Sample],
    *,
    always: bool = False,
    factors: Mapping[str, Floats] = MappingProxyType({}),
    on_progress: Progress | None = None,
) -> tuple[Model, str]:
    """The Q/DQ model with corrected biases, where that keeps its outputs closer on held-out calibration samples.

    Args:
        model: the prepared float model; `nodes` are its weighted nodes, `quantized` what `insert` made of it.
        samples: re-iterable calibration samples.
        always: take the correction unseen.
        factors: weighted node -> (channels,) what the Q/DQ model's output of it is multiplied by, if not by 1.

    Returns:
        The better model, and a note that says which it is and why.
    """
    held = split(samples)
    if not always and not held.held.isdisjoint(held.fit):
        return quantized, "bias correction not applied: one calibration sample cannot judge what is made from it"
    changed = correct(model, quantized, nodes, held, factors=factors, on_progress=on_progress)
    if changed is quantized:
        return quantized, "bias correction not applied: no quantized node has one that a correction could be added to"
    if always:
        return changed, "biases are corrected, as asked for"
    before, after = HeldOutScore(model, held).sqnrs_db([quantized, changed])
    better = after > before and after >= before + MINIMUM_GAIN_DB  # two infinities are no gain
    return changed if better else quantized, (
        f"{'biases are corrected' if better else 'bias correction not applied'}: output SQNR on {len(held.held)} "
        f"held-out calibration samples {before:.1f} dB without, {after:.1f} dB with"
    )


def correct(
    model: Model,
    quantized: Model,
    nodes: Iterable[WeightedNode],
    held: Split,
    *,
    factors: Mapping[str, Floats] = MappingProxyType({}),
    on_progress: Progress | None = None,
) -> Model:
    """The Q/DQ model with other biases, fitted on samples of `held`; the other arguments are those of `corrected`.

    A MatMul is corrected through the Add of a constant behind it; one without that is left as it is.
    """
    by_name = {node.name: node for node in nodes if _place(quantized, quantized.node(node.name)) is not None}
    levels = [[by_name[name] for name in level] for level in _levels(model, by_name.keys())]
    chosen = [node for level in levels for node in level]
    held = replace(held, fit=held.fit[: _enough(model, chosen)])
    wanted = _means(model, chosen, held)
    for name in wanted.keys() & factors.keys():
        wanted[name] = replace(wanted[name], value=wanted[name].value * factors[name])
    staged = can_stage(quantized)
    cuts = [[node.output for node in level] for level in levels] if staged else []
    threads = at_once(model, held.fitting(), copies=2)
    left = left_bytes(quantized, held.fitting())
    with Stages(quantized, cuts, held.fitting() if staged else (), memory=left, threads=threads) as run:
        for number, level in enumerate(levels):
            if on_progress is not None:
                on_progress(number, len(levels), "correcting biases")
            found = _mean(run.run(quantized, _look(quantized, level))) if staged else _means(quantized, level, held)
            before = quantized
            quantized = _shifted(quantized, {n.name: _shift(wanted[n.name], found[n.name]) for n in level})
            for node in level:
                _move(run, node, before, quantized)
    return quantized


def _move(run: Stages, node: WeightedNode, before: Model, after: Model) -> None:
    """Add to a node's output what its bias has gained, unless the bias is added behind that tensor."""
    place = _place(after, after.node(node.name))
    assert place is not None
    adds = after.node(place[0])
    if adds.output[0] == node.output:
        read = [name for name in before.node(place[0]).input[place[1] :][:1] if name]
        old = before.array(read[0]).astype(np.float64).reshape(-1) if read else 0
        gain = after.array(adds.input[place[1]]).astype(np.float64).reshape(-1) - old
        run.add(node.output, gain, axis=node.channel_axis)


def _enough(model: Model, nodes: Sequence[WeightedNode]) -> int:
    """How many samples give every output POSITIONS values per channel; no limit where shapes are dynamic."""
    fewest = POSITIONS
    for node in nodes:
        info = model.info(node.output)
        shape = list(info.shape) if info is not None and info.shape is not None else []
        if shape:
            shape.pop(node.channel_axis)
        fewest = min(fewest, math.prod(d for d in shape if isinstance(d, int)))
    return max(MINIMUM_SAMPLES, -(-POSITIONS // max(fewest, 1)))


def _levels(model: Model, names: Collection[str]) -> list[list[str]]:
    """The nodes in groups: each depends on nodes of groups before its own only."""
    depth: dict[str, int] = {}  # tensor -> how many of the nodes lie on the way to it, at most
    levels: dict[int, list[str]] = {}
    for node in model.graph.node:
        below = max((depth.get(name, 0) for name in node.input), default=0)
        if node.name in names:
            levels.setdefault(below, []).append(node.name)
            below += 1
        depth.update(dict.fromkeys(node.output, below))
    return [levels[k] for k in sorted(levels)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mean:
    """Per channel of one node, over the samples to fit and all other axes."""

    value: Floats  # (channels,) mean of the output, of its positive part where only Relu reads it
    active: Floats  # (channels,) share of the output that moves with the bias: 1, or that above zero before a Relu


def _means(model: Model, nodes: Sequence[WeightedNode], held: Split) -> dict[str, _Mean]:
    """The means of nodes' outputs in passes over the whole model, one if the memory allows."""
    found: dict[str, _Mean] = {}
    for group in groups_of(model, (node.output for node in nodes), held.fitting()):
        run = _run(model, [node for node in nodes if node.output in group])
        threads = passes(model, group, next(held.fitting())).threads
        found |= _mean(overlapped(run, held.fitting(), threads))
    return found


def _run(model: Model, nodes: Sequence[WeightedNode]) -> Callable[[Sample], _Sums]:
    """A function from a sample to what `_mean` sums up of some nodes' outputs."""
    session = Session(model, [node.output for node in nodes], threads=1, in_order=True)
    look = _look(model, nodes)
    return lambda sample: look(session(sample))


def _look(model: Model, nodes: Sequence[WeightedNode]) -> Callable[[Mapping[str, npt.NDArray[Any]]], _Sums]:
    """A function from the nodes' outputs for one sample to what `_mean` sums up."""
    readers = {node.name: {use.node.op_type for use in model.consumers(node.output)} for node in nodes}
    rectified = {n.name for n in nodes if readers[n.name] == {"Relu"} and not model.is_output(n.output)}

    def look(values: Mapping[str, npt.NDArray[Any]]) -> _Sums:
        found = {}
        for node in nodes:
            rows = np.moveaxis(values[node.output], node.channel_axis, 0)
            rows = rows.reshape(rows.shape[0], -1)
            active = np.full(rows.shape[0], float(rows.shape[1]))
            if node.name in rectified:
                active = np.count_nonzero(rows > 0, axis=1).astype(np.float64)
                rows = np.maximum(rows, 0)
            found[node.name] = (rows.sum(axis=1, dtype=np.float64), active, rows.shape[1])
        return found

    return look


def _mean(samples: Iterable[_Sums]) -> dict[str, _Mean]:
    sums: _Sums = {}
    for found in samples:
        for name, (total, active, count) in found.items():
            old = sums.get(name, (np.zeros_like(total), np.zeros_like(active), 0))
            sums[name] = (old[0] + total, old[1] + active, old[2] + count)
    return {name: _Mean(value=t / count, active=a / count) for name, (t, a, count) in sums.items()}


def _shift(wanted: _Mean, found: _Mean) -> Floats:
    """What to add to the bias: the error of the mean over the share that moves with it.

    0 where a mean is not finite.
    """
    missing = np.where(np.isfinite(wanted.value) & np.isfinite(found.value), wanted.value - found.value, 0.0)
    return np.asarray(missing / np.maximum(found.active, MINIMUM_ACTIVE))


def _place(model: Model, node: NodeProto) -> tuple[str, int] | None:
    """The operand, as (node, input index), that a constant can be added to; it may be one that is not there yet."""
    if node.op_type == "MatMul":
        use = model.only_use(node.output[0])
        if use is None or use.node.op_type != "Add":
            return None
        name = use.node.input[1 - use.index]
        flat = model.is_constant(name) and all(d == 1 for d in model.initializers[name].dims[:-1])
        return (use.node.name, 1 - use.index) if flat else None
    if factor(node, "beta") != 1.0:
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    return (node.name, 2) if not bias or (model.is_constant(bias) and model.array(bias).ndim == 1) else None


def _shifted(model: Model, shifts: Mapping[str, Floats]) -> Model:
    """The model with other biases: node -> (channels,) to add. One value for all channels becomes one for each."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    nodes = {node.name: node for node in proto.graph.node}
    names = Names([*model.initializers, *(name for node in nodes.values() for name in (*node.input, *node.output))])
    for name, shift in shifts.items():
        place = _place(model, model.node(name))
        assert place is not None
        node, index = nodes[place[0]], place[1]
        node.input.extend([""] * (index + 1 - len(node.input)))
        old = model.array(node.input[index]) if node.input[index] else None
        dtype = old.dtype if old is not None else np.dtype(model.dtype(model.node(name).output[0]))
        values = shift
        if old is not None:  # its leading axes count: they may give the result more of them than the product has
            values = (old.astype(np.float64).reshape(-1) + shift).reshape(*(1,) * (old.ndim - 1), -1)
        node.input[index] = names.fresh(f"{name}_corrected_bias")
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), node.input[index]))
    read = {name for node in proto.graph.node for name in reads(node)}
    read.update(output.name for output in proto.graph.output)
    assign(proto.graph.initializer, [tensor for tensor in proto.graph.initializer if tensor.name in read])
    return model.replace(proto)
