"""The noise that quantization must make at a model's outputs: what a result is held to, whoever made it.

float model + which operands are quantized + one sample -> every such tensor with uniform noise one step wide, drawn
several times -> root mean square of what it changes at each output.

A step is that of the plainest quantizer: the largest magnitude of a tensor, or of an output channel of a weight, over
the 127 codes on one side of zero. Of qdq only the plan is used: names of tensors and operands, and the axis of a
weight. Ranges, scales, codes and Q/DQ nodes have no say, so that an error in any of them shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, helper

from engines.core import onnx_runtime
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.plan.plan import Plan, Point

CODES = 127
DRAWS = 16
Sample = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Noise:
    """Noise of one tensor: `steps` are aligned with its shape."""

    point: Point
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    steps: np.ndarray

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Half a step to each side at most."""
        return np.asarray(rng.uniform(-0.5, 0.5, self.shape) * self.steps).astype(self.dtype)


def expected_noise(model: Model, plan: Plan, sample: Sample, *, seed: int = 0) -> list[float]:
    """The root of the mean square of the noise's norm at each output, 0 where none arrives or it holds no floats.

    Raises:
        ValueError: a quantized tensor lies in a body.
    """
    noises = list(_noises(model, plan, sample))
    if len(noises) < len(plan.points):
        raise ValueError("a quantized tensor lies in a body, where no noise is added")
    proto, rng = _with_inputs(model, noises), np.random.default_rng(seed)
    still = {each.name: np.zeros(each.shape, each.dtype) for each in noises}
    draws = ({each.name: each.draw(rng) for each in noises} for _ in range(DRAWS))
    quiet, *noisy = (list(y.values()) for y in onnx_runtime.run(proto, [{**sample, **d} for d in (still, *draws)]))
    return [
        float(np.sqrt(np.mean([distance(y[i], plain) ** 2 for y in noisy]))) if plain.dtype.kind == "f" else 0.0
        for i, plain in enumerate(quiet)
    ]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of a difference, where what is wanted is finite."""
    finite = np.isfinite(wanted)
    return float(np.linalg.norm(found[finite].astype(np.float64) - wanted[finite].astype(np.float64)))


def _noises(model: Model, plan: Plan, sample: Sample) -> Iterator[_Noise]:
    """Of each tensor of the main graph that is quantized."""
    data = [p for p in plan.activations if p.tensor not in model.inner_tensors]
    seen = Session(model, [p.tensor for p in data])(sample) if data else {}
    for number, point in enumerate((*data, *plan.weights)):
        stored = point.role == "weight"
        if stored and point.tensor not in model.initializers:
            continue
        values = model.array(point.tensor) if stored else seen[point.tensor]
        others = tuple(i for i in range(values.ndim) if i != point.spec.axis) if point.spec.axis is not None else None
        steps = np.abs(values).max(axis=others, keepdims=True, initial=0).astype(np.float64) / CODES
        yield _Noise(point=point, name=f"noise_{number}", shape=values.shape, dtype=values.dtype, steps=steps)


def _with_inputs(model: Model, noises: list[_Noise]) -> ModelProto:
    """The model, whose quantized operands read their tensor plus an input of its shape."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    for each in noises:
        tensor, sum_ = each.point.tensor, f"{each.name}_sum"
        kind = helper.np_dtype_to_tensor_dtype(each.dtype)
        graph.input.append(helper.make_tensor_value_info(each.name, kind, each.shape))
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == tensor and (node.name, index) in each.point.uses:
                    node.input[index] = sum_
        place = next((i + 1 for i, node in enumerate(graph.node) if tensor in node.output), 0)
        graph.node.insert(place, helper.make_node("Add", [tensor, each.name], [sum_], each.name))
    return proto
