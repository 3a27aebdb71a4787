"""Cross-layer equalization: the channels between two weighted nodes are divided in the one and multiplied in the other.

Model + Plan -> pairs of layers with what lets factors through between them -> sweeps of `equalize.cle` over all pairs
-> per tensor divisors, and its range from sampled channel vectors divided by them. The float outputs stay equal, and
`absorb` says which constants carry the factors: no node is added. It must not change a graph.

Source: Nagel et al., arXiv 1906.04721, section 4.1. Clip (Relu6) lets no factor through, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from qdq.core.arrays import Floats
from qdq.core.progress import Progress
from qdq.measure import histogram, ranges
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.model.nodes import attribute, input_axis, weight_axis
from qdq.plan.plan import Plan
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve import shift
from qdq.solve.equalize import channels as channels_module
from qdq.solve.equalize.carriers import find
from qdq.solve.equalize.channels import Equalized, data_readers
from qdq.solve.equalize.formulas import cle

SWEEPS = 20  # over all pairs, at most
SETTLED = 0.01  # relative change of every divisor below which they stop


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """The largest magnitude of the weights between each output channel and each input channel of its group."""

    peaks: Floats  # (output channels, input channels per group)
    groups: int

    def made(self, inputs: Floats | None, outputs: Floats | None) -> Floats:
        """(output channels,) ranges of the weights that make each, with (channels,) factors in."""
        return np.asarray(self._scaled(inputs, outputs).max(axis=1))

    def read(self, inputs: Floats | None, outputs: Floats | None) -> Floats:
        """(input channels,) ranges of the weights that read each."""
        apart = self._scaled(inputs, outputs).reshape(self.groups, -1, self.peaks.shape[1])
        return np.asarray(apart.max(axis=1)).reshape(-1)

    def _scaled(self, inputs: Floats | None, outputs: Floats | None) -> Floats:
        found = self.peaks
        if inputs is not None:
            rows = np.repeat(inputs.reshape(self.groups, -1), self.peaks.shape[0] // self.groups, axis=0)
            found = found * rows
        return found if outputs is None else found * outputs[:, None]


def pairs(model: Model, plan: Plan) -> dict[str, str]:
    """Activation tensors between two layers -> the weighted node that makes them.

    Every reader is a quantized Conv, or every one a Gemm or MatMul without transA, whose weight nothing else reads;
    the tensor is no shortcut and tied to no other.
    """
    found, weighted = {}, weighted_nodes(model, plan)
    for point in plan.activations:
        nodes = data_readers(point, weighted)
        if not nodes or any(len(model.consumers(node.weight)) > 1 for node in nodes):
            continue
        carrier = find(model, point.tensor, _inputs(model, model.node(nodes[0].name)), readers=nodes)
        if carrier is not None and carrier.linear is not None:
            found[point.tensor] = carrier.linear
    return found


def divisors(model: Model, plan: Plan) -> dict[str, Floats]:
    """Tensor -> (channels,) divisors, from the weights alone."""
    makers = pairs(model, plan)
    readers = {p.tensor: [model.node(name) for name, _ in p.uses] for p in plan.activations if p.tensor in makers}
    names = {*makers.values(), *(node.name for nodes in readers.values() for node in nodes)}
    layers = {name: _layer(model, model.node(name)) for name in sorted(names)}
    made_by = {linear: tensor for tensor, linear in makers.items()}
    found: dict[str, Floats] = {t: np.ones(_inputs(model, nodes[0])) for t, nodes in readers.items()}

    def factors(node: NodeProto) -> tuple[Floats | None, Floats | None]:
        """What a layer's input and output channels are multiplied by so far."""
        tensor = made_by.get(node.name)
        return found.get(node.input[0]), None if tensor is None else 1 / found[tensor]

    for _ in range(SWEEPS):
        moved = 0.0
        for tensor, linear in makers.items():
            maker = model.node(linear)
            before = found[tensor]
            r1 = layers[linear].made(factors(maker)[0], None)
            nodes = readers[tensor]
            r2 = np.max([layers[n.name].read(None, factors(n)[1]) for n in nodes], axis=0)
            after = cle.scales(r1, r2)
            moved = max(moved, float(np.abs(after / before - 1).max()))
            found[tensor] = after
        if moved < SETTLED:
            break
    return found


def choose(
    model: Model, plan: Plan, samples: Iterable[Sample], *, on_progress: Progress | None = None
) -> dict[str, Equalized]:
    """Divisors of every tensor between two layers that lets them through, and its new range.

    Args:
        model: the prepared float model.
        plan: its points.
        samples: re-iterable calibration samples, for the ranges only.
        on_progress: called with (samples done, samples in all or None, text).

    Returns:
        Tensor -> scales and parameters; no gain is predicted, as the producer's own error would be part of it.
    """
    found = divisors(model, plan)
    points, nodes = {p.tensor: p for p in plan.activations if p.tensor in found}, weighted_nodes(model, plan)
    readers = {tensor: data_readers(point, nodes) for tensor, point in points.items()}
    made = {}
    for tensor, channels in channels_module.look(model, readers, samples, on_progress).items():
        s = found[tensor].astype(np.float32)
        limits = np.stack([channels.limits.low, channels.limits.high])
        # in the tensor's old unit: its calibrated range still says whether FP16 can hold it
        if limits.any():
            s *= np.float32(np.abs(limits / s).max() / np.abs(limits).max())
        seen = np.concatenate([(channels.rows / s).reshape(-1), (limits / s).reshape(-1)]).astype(np.float32)
        method = plan.settings.calibrator
        params = ranges.choose(
            histogram.Histogram.of(seen),
            method="mse" if method == "auto" else method,
            percentile=plan.settings.percentile,
            shift=shift.shifts(model, points[tensor]),
            fmt_name=points[tensor].spec.format,
            dtype=model.dtype(tensor),
        )
        made[tensor] = Equalized(scale=s, params=params, gain_db=0.0)
    return made


def _inputs(model: Model, node: NodeProto) -> int:
    """Input channels of a weighted node."""
    dims = model.initializers[node.input[1]].dims
    return int(dims[input_axis(node, len(dims))]) * (attribute(node, "group", 1) if node.op_type == "Conv" else 1)


def _layer(model: Model, node: NodeProto) -> _Layer:
    values = model.array(node.input[1])
    outputs, inputs = weight_axis(node, values.ndim), input_axis(node, values.ndim)
    ordered = np.moveaxis(values, (outputs, inputs), (0, 1)).reshape(values.shape[outputs], values.shape[inputs], -1)
    peaks = np.maximum(ordered.max(axis=2), -ordered.min(axis=2)).astype(np.float64)
    return _Layer(peaks=peaks, groups=attribute(node, "group", 1) if node.op_type == "Conv" else 1)
