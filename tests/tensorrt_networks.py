"""A network whose placement for TensorRT is worth a search, and who prices it: shared by tests of the exact choice."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from graphs import build, node, normal

from engines.backends.compiler import ShapeRange
from qdq.build.pricing.tensorrt_pricer import TensorRtPricer, pricer_of
from qdq.build.recipe import Recipe
from qdq.model.model import Model


def network(*, size: int = 28, batch: int = 32, replaced: Mapping[str, np.ndarray] = MappingProxyType({})) -> Model:
    """A stem, a residual block, a wide branch that is concatenated, a head: 7 convolutions of 32 to 128 channels."""
    tensors = {
        "w0": normal(64, 32, 3, 3, seed=0),
        "w1": normal(64, 64, 3, 3, seed=1),
        "w2": normal(64, 64, 3, 3, seed=2),
        "w3": normal(64, 64, 1, 1, seed=3),
        "w4": normal(64, 64, 3, 3, seed=4),
        "w5": normal(128, 128, 1, 1, seed=5),
        "w6": normal(32, 128, 1, 1, seed=6),
        **replaced,
    }
    nodes = [
        node("Conv", "x w0", "a0", "stem", pads=[1] * 4),
        node("Relu", "a0", "r0"),
        node("Conv", "r0 w1", "a1", "first", pads=[1] * 4),
        node("Relu", "a1", "r1"),
        node("Conv", "r1 w2", "a2", "second", pads=[1] * 4),
        node("Add", "a2 r0", "s2", "shortcut"),
        node("Relu", "s2", "r2"),
        node("Conv", "r2 w3", "a3", "left"),
        node("Conv", "r2 w4", "a4", "right", pads=[1] * 4),
        node("Concat", "a3 a4", "c", axis=1),
        node("Conv", "c w5", "a5", "wide"),
        node("Relu", "a5", "r5"),
        node("Conv", "r5 w6", "y", "head"),
    ]
    return build(nodes, {"x": (batch, 32, size, size)}, tensors)


def pricer(model: Model, **given: object) -> TensorRtPricer:
    recipe = Recipe.from_mapping({"compiler": "tensorrt", "target": "sm80", "gpu": "a100", **given})
    shapes = {i.name: ShapeRange.fixed([int(d) for d in i.shape or ()]) for i in model.inputs}
    made = pricer_of(recipe, shapes)
    assert isinstance(made, TensorRtPricer)
    return made
