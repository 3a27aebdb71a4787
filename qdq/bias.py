"""Empirical bias correction: shift each layer's output so that quantization does not move its mean.

float model + Q/DQ model + samples -> per weighted node the mean of its output per channel, float less quantized so far
-> added to the node's bias, layer by layer in topological order -> Q/DQ model.
Whether it helps is for `judge` to say: where an output's mean varies from sample to sample it can do harm. This module
must not touch codes or scales.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, appendix
on empirical bias correction; layer by layer as in A White Paper on Neural Network Quantization, arXiv 2106.08295.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdq.calibrate import Progress
from qdq.footprint import cores
from qdq.graph import Model, captured
from qdq.judge import Split
from qdq.plan import Plan
from qdq.tap import Sample, Tap, overlapped

Means = dict[str, npt.NDArray[np.float64]]


def correct(model: Model, quantized: Model, plan: Plan, split: Split, *, on_progress: Progress | None = None) -> Model:
    """Correct the biases of a Q/DQ model.

    Args:
        model: the prepared float model.
        quantized: what `insert` made of it; node and tensor names are those of `model`.
        plan: names the weighted nodes.
        split: the samples to fit on.
        on_progress: called with (levels done, levels, text).

    Returns:
        The Q/DQ model with other biases. A MatMul is corrected through the Add of a constant behind it; one without
        that is left as it is.
    """
    levels = _levels(model, [n for n in plan.quantized_nodes if _place(quantized, quantized.node(n)) is not None])
    outputs = {name: model.node(name).output[0] for level in levels for name in level}
    wanted = _means(model, outputs, split)
    for number, level in enumerate(levels):
        if on_progress is not None:
            on_progress(number, len(levels), "correcting biases")
        found = _means(quantized, {name: outputs[name] for name in level}, split)
        quantized = _shifted(quantized, {name: wanted[name] - found[name] for name in level})
    return quantized


def _levels(model: Model, names: list[str]) -> list[list[str]]:
    """The nodes in groups: each depends on nodes of groups before its own only."""
    depth: dict[str, int] = {}  # tensor -> how many of the nodes lie on the way to it, at most
    levels: dict[int, list[str]] = {}
    chosen = set(names)
    for node in model.graph.node:
        below = max((depth.get(name, 0) for name in node.input), default=0)
        if node.name in chosen:
            levels.setdefault(below, []).append(node.name)
            below += 1
        depth.update(dict.fromkeys(node.output, below))
    return [levels[k] for k in sorted(levels)]


def _means(model: Model, outputs: Mapping[str, str], split: Split) -> Means:
    """Node -> (channels,) mean of its output over the samples to fit and all axes but the channels'."""
    tap = Tap(model, outputs.values(), threads=1)
    axis = {name: 1 if model.node(name).op_type == "Conv" else -1 for name in outputs}

    def look(sample: Sample) -> dict[str, tuple[npt.NDArray[np.float64], int]]:
        values = tap(sample)
        found = {}
        for name, tensor in outputs.items():
            rows = np.moveaxis(values[tensor], axis[name], 0)
            rows = rows.reshape(rows.shape[0], -1)
            found[name] = (rows.sum(axis=1, dtype=np.float64), rows.shape[1])
        return found

    sums: Means = {}
    counts = dict.fromkeys(outputs, 0)
    for found in overlapped(look, split.fitting(), cores()):
        for name, (total, count) in found.items():
            sums[name] = sums[name] + total if name in sums else total
            counts[name] += count
    return {name: total / counts[name] for name, total in sums.items()}


def _place(model: Model, node: NodeProto) -> tuple[str, int] | None:
    """The operand, as (node, input index), that a constant can be added to; it may be one that is not there yet."""
    if node.op_type == "MatMul":
        uses = model.consumers(node.output[0])
        if len(uses) != 1 or uses[0].node.op_type != "Add" or model.is_output(node.output[0]):
            return None
        name = uses[0].node.input[1 - uses[0].index]
        flat = model.is_constant(name) and model.array(name).size == model.array(name).shape[-1:][0]
        return (uses[0].node.name, 1 - uses[0].index) if flat else None
    if next((a.f for a in node.attribute if a.name == "beta"), 1.0) != 1.0:
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    return (node.name, 2) if not bias or (model.is_constant(bias) and model.array(bias).ndim == 1) else None


def _shifted(model: Model, shifts: Means) -> Model:
    """The model with other biases: node -> (channels,) to add."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    nodes = {node.name: node for node in proto.graph.node}
    taken = set(model.initializers)
    for name, shift in shifts.items():
        place = _place(model, model.node(name))
        assert place is not None
        node, index = nodes[place[0]], place[1]
        while len(node.input) <= index:
            node.input.append("")
        old = model.array(node.input[index]) if node.input[index] else None
        dtype = old.dtype if old is not None else _dtype(model, model.node(name).output[0])
        values = shift if old is None else old.astype(np.float64).reshape(-1) + shift
        node.input[index] = _free(f"{name}_corrected_bias", taken)
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), node.input[index]))
    read = {name for node in proto.graph.node for name in (*node.input, *captured(node))}
    read.update(output.name for output in proto.graph.output)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return model.replace(proto)


def _dtype(model: Model, tensor: str) -> np.dtype[np.generic]:
    info = model.info(tensor)
    name = info.dtype if info is not None else "float32"
    return helper.tensor_dtype_to_np_dtype(getattr(TensorProto, {"float32": "FLOAT"}.get(name, name.upper())))


def _free(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name
