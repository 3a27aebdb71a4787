"""Gradients in the codes of the weights that they are of, so that forces stay those of the quantized energy.

A graph with an energy and its forces reads a weight twice: along one axis for the energy, along the other for the
gradient. Each rounded for itself, the two are other numbers, and forces no gradient of any energy. Here the second
reader gets the codes of the first, and its data are multiplied by the scales that these codes had per output channel:

    y = x W,  W[k, n] ~ q[k, n] s[n]      gradient of x = g W^T ~ (g s / c) (q^T c)

c is the largest of s, the one scale of q^T; all products stay integer products. What the activations' own rounding does
to the energy has no gradient: that is as of a straight-through estimator. It must not round a weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from qdq.core.arrays import Singles
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams, QTensor, representable
from qdq.measure.inference.samples import Sample
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.plan.weighted_node import Weight, WeightedNode, by_weight
from qdq.solve.activations import coarse_scale
from qdq.solve.equalize.channels import look


@dataclass(frozen=True, slots=True, kw_only=True)
class Tied:
    """What becomes of the second readers.

    Attributes:
        weights: their codes.
        divisors: data tensor -> (channels,) what its channels are divided by.
        params: data tensor -> parameters of the divided tensor.
        note: how many weights are read both ways, and how many of these share codes.
    """

    weights: Mapping[Weight, QTensor]
    divisors: Mapping[str, Singles]
    params: Mapping[str, QParams]
    note: str


def tied(
    model: Model,
    plan: Plan,
    nodes: Mapping[str, WeightedNode],
    weights: Mapping[Weight, QTensor],
    table: CalibrationTable,
    samples: Iterable[Sample] | None,
    on_progress: Progress | None = None,
) -> Tied:
    """The codes of the first reader for every weight of INT8 that two nodes read along different axes.

    Args:
        nodes: in the order of the graph.
        weights: as each was rounded for itself.
        samples: that show the ranges of the data's channels; without them the table bounds them.
    """
    pairs = _pairs(model, nodes)
    found = [(first, second) for first, second in pairs if _fits(plan, nodes, first, second, weights)]
    shown = {} if samples is None else look(model, {b.data: [b] for _, b in found}, samples, on_progress)
    codes, divisors, params = dict[Weight, QTensor](), dict[str, Singles](), dict[str, QParams]()
    for first, second in found:
        made = weights[first.key]
        scale = made.params.scale.reshape(-1).astype(np.float64)
        whole = float(scale.max())
        if second.data in shown:
            limits = shown[second.data].limits
            size = np.maximum(-limits.low, limits.high)
        else:
            size = np.full(scale.shape, table.tensors[second.data].amax)
        amax, dtype = float((size * scale / whole).max()), model.dtype(second.data)
        plain = representable(amax / 127 if amax else 1.0, dtype)
        twice = second.data_spec is not None and second.data_spec.residual
        again = made.codes if first.input_axis == second.output_axis else np.ascontiguousarray(made.codes.T)
        grid = np.full(again.shape[second.output_axis], whole, np.float32)
        codes[second.key] = QTensor(
            codes=again, params=QParams(scale=grid, axis=second.output_axis, format=made.params.format)
        )
        divisors[second.data] = (whole / scale).astype(np.float32)
        params[second.data] = QParams(scale=coarse_scale(amax, dtype) if twice else plain)
    note = f"{len(found)} of {len(pairs)} weights that a gradient reads again have one set of codes for both"
    return Tied(weights=codes, divisors=divisors, params=params, note=note)


def _pairs(model: Model, nodes: Mapping[str, WeightedNode]) -> list[tuple[WeightedNode, WeightedNode]]:
    """Weights that two nodes read, each along its own axis: the earlier one and the later one.

    They may be one constant, or two of which one is the other transposed, as a folded Transpose leaves them.
    """
    order = {name: number for number, name in enumerate(nodes)}
    readers: dict[str, list[WeightedNode]] = {}
    backwards: dict[str, str] = {}
    for reader, *others in by_weight(nodes.values()).values():
        if others or len(reader.shape) != 2:
            continue
        values = np.asarray(model.array(reader.weight))
        values = values if reader.input_axis == 0 else values.T  # (inputs, outputs)
        readers.setdefault(_digest(values), []).append(reader)
        backwards[reader.name] = _digest(values.T)
    found = []
    for each in (reader for some in readers.values() for reader in some):
        others = readers.get(backwards[each.name], [])
        if len(others) == 1 and order[each.name] < order[others[0].name]:
            found.append((each, others[0]))
    return found


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(str(values.shape).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def _fits(
    plan: Plan,
    nodes: Mapping[str, WeightedNode],
    first: WeightedNode,
    second: WeightedNode,
    weights: Mapping[Weight, QTensor],
) -> bool:
    """Whether both are integer products with one scale per channel, and nothing else reads the second one's data."""
    made = weights[first.key].params
    readers = sum(node.data == second.data for node in nodes.values())
    uses = sum(len(p.uses) for p in plan.activations if p.tensor == second.data)
    plain = made.block is None and made.axis is not None and FORMATS[made.format].integer
    read = second.data_spec is not None and second.data_spec.token is None and not second.data_transposed
    return plain and read and first.data_spec is not None and readers == uses == 1 and second.alpha == first.alpha == 1
