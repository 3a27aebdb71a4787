"""Four engines whose measured time corrects what is predicted: a residual CNN and a transformer, in FP32 and in FP16.

They are built in code with random weights; their time does not depend on these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from engines.timing.probes import Graph

LAYERS, WIDTH, HEADS, TOKENS = 4, 384, 6, 128
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A graph to predict and to measure."""

    name: str
    model: onnx.ModelProto


def networks() -> list[Network]:
    """Those of this file, the lightest types first."""
    return [
        Network(name=f"{name}_{dtype}", model=make(dtype))
        for dtype in ("float16", "float32")
        for name, make in (("cnn", residual_network), ("transformer", transformer))
    ]


def residual_network(dtype: str) -> onnx.ModelProto:
    """18 convolutions with shortcuts, of (4, 64, 56, 56) down to (4, 512, 7, 7)."""
    g = Graph()
    y, before = "x", STAGES[0][0]
    for stage, (channels, _) in enumerate(STAGES):
        for block in range(2):
            name, stride = f"s{stage}b{block}", 2 if stage and not block else 1
            shortcut = y if stride == 1 else _conv(g, y, f"{name}down", (channels, before, 1, 1), dtype, stride)
            z = g.add("Relu", [_conv(g, y, f"{name}a", (channels, before, 3, 3), dtype, stride)], f"{name}relu_a")
            z = _conv(g, z, f"{name}b", (channels, channels, 3, 3), dtype)
            y = g.add("Relu", [g.add("Add", [z, shortcut], f"{name}add")], f"{name}relu")
            before = channels
    return g.model(["x"], [4, *_square(STAGES[0])], y, dtype, written=[4, *_square(STAGES[-1])])


def _square(stage: tuple[int, int]) -> tuple[int, int, int]:
    channels, size = stage
    return channels, size, size


def _conv(g: Graph, x: str, name: str, shape: Sequence[int], dtype: str, stride: int = 1) -> str:
    weight = g.weight(f"{name}_w", shape, dtype)
    pads = [shape[-1] // 2] * 4
    return g.add("Conv", [x, weight], name, kernel_shape=list(shape[2:]), pads=pads, strides=[stride] * 2)


def transformer(dtype: str) -> onnx.ModelProto:
    """Four encoder layers of width 384 with 6 heads, on (2, 128) tokens."""
    g = Graph()
    y = "x"
    for i in range(LAYERS):
        y = _normalized(g, g.add("Add", [y, _attention(g, y, f"l{i}", dtype)], f"l{i}add_a"), f"l{i}a", dtype)
        z = g.add("MatMul", [y, g.weight(f"l{i}up_w", [WIDTH, 4 * WIDTH], dtype)], f"l{i}up")
        z = g.add("Gelu", [z], f"l{i}gelu")
        z = g.add("MatMul", [z, g.weight(f"l{i}down_w", [4 * WIDTH, WIDTH], dtype)], f"l{i}down")
        y = _normalized(g, g.add("Add", [y, z], f"l{i}add_b"), f"l{i}b", dtype)
    return g.model(["x"], [2, TOKENS, WIDTH], y, dtype)


def _attention(g: Graph, x: str, name: str, dtype: str) -> str:
    split = g.constant(f"{name}_split", np.array([0, 0, HEADS, WIDTH // HEADS], np.int64))
    heads = []
    for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        y = g.add("MatMul", [x, g.weight(f"{name}{part}_w", [WIDTH, WIDTH], dtype)], f"{name}{part}")
        heads.append(g.add("Transpose", [g.add("Reshape", [y, split], f"{name}{part}r")], f"{name}{part}t", perm=order))
    scale = g.constant(f"{name}_scale", g.cast(np.full((), (WIDTH / HEADS) ** -0.5), dtype))
    scores = g.add("Mul", [g.add("MatMul", heads[:2], f"{name}qk"), scale], f"{name}scaled")
    y = g.add("MatMul", [g.add("Softmax", [scores], f"{name}softmax", axis=-1), heads[2]], f"{name}av")
    y = g.add("Transpose", [y], f"{name}back", perm=[0, 2, 1, 3])
    y = g.add("Reshape", [y, g.constant(f"{name}_whole", np.array([0, 0, WIDTH], np.int64))], f"{name}joined")
    return g.add("MatMul", [y, g.weight(f"{name}o_w", [WIDTH, WIDTH], dtype)], f"{name}o")


def _normalized(g: Graph, x: str, name: str, dtype: str) -> str:
    ones = g.constant(f"{name}_gamma", g.cast(np.ones(WIDTH), dtype))
    zeros = g.constant(f"{name}_beta", g.cast(np.zeros(WIDTH), dtype))
    return g.add("LayerNormalization", [x, ones, zeros], f"{name}norm", axis=-1)
