"""Data in two codes: the first scale, what is divided for the sake of the weights, and what both gain."""

from __future__ import annotations

import graphs
import models
import numpy as np
import onnx
import pytest
from onnx import helper

from qdq import Settings, load_float, quantize
from qdq.solve.activations import coarse_scale

W = np.random.default_rng(8).normal(size=(32, 12))
SPREAD = np.geomspace(1, 1e-3, 32)


def product(size: float = 1.0) -> onnx.ModelProto:
    """x (16, 32), whose channels differ a thousand times, -> times `size` -> MatMul -> y."""
    weights = {"w": W, "size": np.full(1, size)}
    nodes = [
        helper.make_node("Mul", ["x", "size"], ["scaled"], "scale"),
        helper.make_node("MatMul", ["scaled", "w"], ["y"], "product"),
    ]
    tensors = [models.constant(name, array.astype(np.float32)) for name, array in weights.items()]
    return models.assemble(nodes, {"x": (16, 32)}, {"y": (16, 12)}, tensors)


def samples(count: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": (rng.normal(size=(16, 32)) * SPREAD).astype(np.float32)} for _ in range(count)]


def error(settings: Settings, proto: onnx.ModelProto) -> float:
    """Root mean square on samples, as a part of the output's."""
    plain = load_float(proto)
    made = quantize(plain, samples(), settings=settings)
    pairs = zip(graphs.run(made.model, samples()), graphs.run(plain, samples()), strict=True)
    found = [(np.square(a["y"] - b["y"]).sum(), np.square(b["y"]).sum()) for a, b in pairs]
    return float(np.sqrt(sum(f[0] for f in found) / sum(f[1] for f in found)))


@pytest.mark.parametrize("amax", [1e-6, 0.02, 1.0, 100.0, 3e4])
def test_the_first_scale_is_a_power_of_two_with_headroom(amax: float) -> None:
    scale = float(coarse_scale(amax, "float32"))
    assert np.log2(scale) % 1 == 0 and 1.25 * amax <= 127 * scale < 2.5 * amax
    assert float(coarse_scale(0.0, "float32")) == 1


def test_only_the_weights_err_and_less_where_channels_are_divided() -> None:
    plain = {"rounding": "nearest", "bias_correction": "off", "calibrator": "max", "shift": False}
    proto = product()
    once = error(Settings(scheme="int8", equalize="none", **plain), proto)
    twice = error(Settings(scheme="w8a16", equalize="none", **plain), proto)
    divided = error(Settings(scheme="w8a16", equalize="rms", **plain), proto)
    assert twice < 0.8 * once and divided < 0.8 * twice


def test_small_tensors_keep_scales_that_fp16_holds() -> None:
    settings = Settings(scheme="w8a16", equalize="rms", rounding="nearest", bias_correction="off")
    made = quantize(product(1e-4), samples(), settings=settings)
    assert float(made.solution.activations["scaled"].scale) >= 2**-6
    large = quantize(product(), samples(), settings=settings)
    assert np.array_equal(large.solution.weights["w", 1].codes, made.solution.weights["w", 1].codes)
