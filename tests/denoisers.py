"""A tiny network that predicts noise: two convolutions, and the number of the step added between them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE = (3, 8, 8)


def denoising(batch: int | str = "batch", shape: tuple[int, int, int] = SHAPE) -> onnx.ModelProto:
    """Inputs x (batch, *shape) float32 and t (batch) int64, output noise like x."""
    random = np.random.default_rng(0)
    weights = {
        "first": random.standard_normal((16, 3, 3, 3)) / 4,
        "step": random.standard_normal((1, 16, 1, 1)) / 4,
        "second": random.standard_normal((3, 16, 3, 3)) / 10,
        "share": np.array(1e-3),
        "axes": np.array([1, 2, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["seen"], "first_conv", pads=[1] * 4),
        helper.make_node("Cast", ["t"], ["real"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real", "share"], ["small"], "scale"),
        helper.make_node("Unsqueeze", ["small", "axes"], ["columns"], "unsqueeze"),
        helper.make_node("Mul", ["columns", "step"], ["told"], "embed"),
        helper.make_node("Add", ["seen", "told"], ["sum"], "add"),
        helper.make_node("Relu", ["sum"], ["kept"], "relu"),
        helper.make_node("Conv", ["kept", "second"], ["change"], "second_conv", pads=[1] * 4),
        helper.make_node("Add", ["change", "x"], ["noise"], "residual"),
    ]
    stored = [numpy_helper.from_array(a.astype(np.int64 if n == "axes" else np.float32), n) for n, a in weights.items()]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape]),
        helper.make_tensor_value_info("t", TensorProto.INT64, [batch]),
    ]
    output = helper.make_tensor_value_info("noise", TensorProto.FLOAT, [batch, *shape])
    graph = helper.make_graph(nodes, "denoiser", inputs, [output], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
