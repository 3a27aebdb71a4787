"""Twelve small networks of kinds that fail in INT8, built in code: uneven channels and correlated data.

A network is `Built`: an ONNX model, samples to calibrate on, and louder or quieter ones of other seeds to score on.
Channels differ by factors of e, as behind folded normalizations, and some outputs are small beside others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

Samples = list[dict[str, np.ndarray]]
CALIBRATION, EVALUATION = 16, 8


@dataclass(frozen=True, slots=True)
class Built:
    """A float model, samples to calibrate on and others to score on."""

    model: ModelProto
    calibration: Samples
    evaluation: Samples


class Net:
    """A graph in the making: each method appends nodes and returns the name of what they make."""

    def __init__(self, seed: int) -> None:
        """Nothing is in it yet."""
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node; the name of its first output."""
        name = f"{kind}_{len(self.nodes)}"
        names = [name] + [f"{name}_{i}" for i in range(1, outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"n_{name}", **attributes))
        return name

    def const(self, values: Any, dtype: Any = np.float32) -> str:
        """Append a constant."""
        name = f"c_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def uneven(self, count: int, spread: float = 0.7) -> np.ndarray:
        """(count,) factors around 1 that differ as channels behind folded normalizations do."""
        return np.exp(spread * self.rng.normal(size=count))

    def conv(self, x: str, into: int, out: int, kernel: int, rank: int = 2, group: int = 1, **attributes: Any) -> str:
        """A convolution with bias, padded to keep sizes at stride 1."""
        shape = (out, into // group, *(kernel,) * rank)
        weight = self.rng.standard_t(5, size=shape) / np.sqrt(np.prod(shape[1:]))
        weight *= self.uneven(out).reshape(-1, *(1,) * (rank + 1))
        pads = [attributes.get("dilations", [1])[0] * (kernel // 2)] * (2 * rank)
        bias = self.const(self.rng.normal(size=out) * 0.3)
        return self.op("Conv", x, self.const(weight), bias, group=group, pads=pads, **attributes)

    def linear(self, x: str, into: int, out: int, *, bias: bool = True) -> str:
        """MatMul and Add."""
        weight = self.rng.normal(size=(into, out)) / np.sqrt(into) * self.uneven(out, 0.3)
        made = self.op("MatMul", x, self.const(weight))
        return self.op("Add", made, self.const(self.rng.normal(size=out) * 0.2)) if bias else made

    def norm(self, x: str, width: int) -> str:
        """LayerNormalization whose gains have a few large channels, as in trained transformers."""
        gain = self.uneven(width, 0.4)
        gain[:2] *= 12
        bias = self.const(self.rng.normal(size=width) * 0.2)
        return self.op("LayerNormalization", x, self.const(gain), bias, axis=-1)

    def swish(self, x: str) -> str:
        """x * sigmoid(x)."""
        return self.op("Mul", x, self.op("Sigmoid", x))

    def squeeze(self, x: str, width: int) -> str:
        """Squeeze and excitation."""
        hidden = self.op("Relu", self.conv(self.op("GlobalAveragePool", x), width, max(4, width // 4), 1))
        return self.op("Mul", x, self.op("HardSigmoid", self.conv(hidden, max(4, width // 4), width, 1)))

    def finish(self, outputs: dict[str, str], shape: tuple[int, ...]) -> ModelProto:
        """The model that puts these out, {name: tensor}, of an input x."""
        self.nodes += [helper.make_node("Identity", [t], [name], name=f"out_{name}") for name, t in outputs.items()]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        start = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "plain", start, ends, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


def smooth(shape: tuple[int, ...], count: int, seed: int) -> Samples:
    """Samples whose neighbours along the last axes are alike, each of another loudness and mean."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        values = rng.normal(size=shape)
        for axis in range(2, len(shape)):
            values = np.cumsum(values, axis) * 0.5 + values
            values -= values.mean(axis, keepdims=True)
        values = values / values.std() * np.exp(0.5 * rng.normal()) + 0.5 * rng.normal()
        made.append({"x": values.astype(np.float32)})
    return made


def _built(net: Net, outputs: dict[str, str], shape: tuple[int, ...], seed: int) -> Built:
    model = net.finish(outputs, shape)
    return Built(model, smooth(shape, CALIBRATION, 100 + seed), smooth(shape, EVALUATION, 900 + seed))


def mobile(seed: int) -> Built:
    """Depthwise convolutions with hard-swish and squeeze-and-excitation, and a classifier."""
    net = Net(seed)
    x = net.op("HardSwish", net.conv("x", 3, 16, 3, strides=[2, 2]))
    for wide in (48, 64, 72):
        y = net.op("HardSwish", net.conv(x, 16, wide, 1))
        y = net.squeeze(net.op("HardSwish", net.conv(y, wide, wide, 5, group=wide)), wide)
        x = net.op("Add", x, net.conv(y, wide, 16, 1))
    pooled = net.op("Flatten", net.op("GlobalAveragePool", net.op("HardSwish", net.conv(x, 16, 96, 1))))
    return _built(net, {"logits": net.linear(pooled, 96, 20)}, (1, 3, 48, 48), seed)


def gated_wave(seed: int) -> Built:
    """A dilated 1-D network of tanh times sigmoid with skip sums, as in audio."""
    net = Net(seed)
    x, skips = net.conv("x", 1, 16, 3, rank=1), []
    for dilation in (1, 2, 4, 8):
        two = [net.conv(x, 16, 16, 3, rank=1, dilations=[dilation]) for _ in range(2)]
        y = net.op("Mul", net.op("Tanh", two[0]), net.op("Sigmoid", two[1]))
        skips.append(net.conv(y, 16, 16, 1, rank=1))
        x = net.op("Add", x, net.conv(y, 16, 16, 1, rank=1))
    total = net.op("Relu", net.op("Sum", *skips))
    return _built(net, {"wave": net.conv(total, 16, 1, 1, rank=1)}, (1, 1, 512), seed)


def volume(seed: int) -> Built:
    """A 3-D U-Net of InstanceNormalization, LeakyRelu and a transposed convolution."""
    net = Net(seed)

    def block(x: str, into: int, out: int, **attributes: Any) -> str:
        y = net.conv(x, into, out, 3, rank=3, **attributes)
        y = net.op("InstanceNormalization", y, net.const(net.uneven(out)), net.const(net.rng.normal(size=out)))
        return net.op("LeakyRelu", y, alpha=0.01)

    top = block("x", 1, 8)
    low = block(block(top, 8, 16, strides=[2, 2, 2]), 16, 16)
    up = net.op("ConvTranspose", low, net.const(net.rng.normal(size=(16, 8, 2, 2, 2)) / 4), strides=[2, 2, 2])
    joined = block(net.op("Concat", up, top, axis=1), 16, 8)
    return _built(net, {"logits": net.conv(joined, 8, 3, 1, rank=3)}, (1, 1, 16, 16, 16), seed)


def voice(seed: int) -> Built:
    """A voice detector: 1-D convolutions, a GRU, a linear layer, a probability."""
    net = Net(seed)
    x = net.op("Relu", net.conv("x", 24, 32, 3, rank=1))
    x = net.op("Relu", net.conv(x, 32, 32, 3, rank=1, strides=[2]))
    x = net.op("Transpose", x, perm=[2, 0, 1])
    parts = [net.const(net.rng.normal(size=(1, 72, width)) / np.sqrt(width)) for width in (32, 24)]
    x = net.op("Squeeze", net.op("GRU", x, *parts, outputs=2, hidden_size=24), net.const([1], np.int64))
    x = net.linear(net.op("Relu", net.linear(x, 24, 32)), 32, 1)
    return _built(net, {"speech": net.op("Sigmoid", x)}, (1, 24, 64), seed)


def tiny_head(seed: int) -> Built:
    """A regression of two numbers, one a thousandth of the other, behind a mean over the image."""
    net = Net(seed)
    x = "x"
    for into, out in ((3, 16), (16, 24), (24, 32)):
        x = net.op("Relu", net.conv(x, into, out, 3, strides=[2, 2]))
    hidden = net.op("Relu", net.linear(net.op("Flatten", net.op("GlobalAveragePool", x)), 32, 16))
    weight = net.rng.normal(size=(2, 16)) * [[1.0], [1e-3]]
    made = net.op("Gemm", hidden, net.const(weight), net.const([0.5, 1e-3]), transB=1)
    return _built(net, {"two": made}, (1, 3, 40, 40), seed)


def channels_last(seed: int) -> Built:
    """Convolutions between Transposes of an image whose channels lie last, in and out."""
    net = Net(seed)
    x, into = "x", 3
    for out in (16, 24):
        y = net.conv(net.op("Transpose", x, perm=[0, 3, 1, 2]), into, out, 3)
        x, into = net.op("Elu", net.op("Transpose", y, perm=[0, 2, 3, 1])), out
    return _built(net, {"map": net.linear(net.norm(x, into), into, 5)}, (1, 24, 24, 3), seed)


def encoder(seed: int) -> Built:
    """Two layers of a transformer with outlier channels behind LayerNormalization."""
    net = Net(seed)
    width, heads = 48, 4
    x = net.linear("x", 20, width)
    for _ in range(2):
        y, parts = net.norm(x, width), []
        for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            part = net.op("Reshape", net.linear(y, width, width), net.const([1, -1, heads, width // heads], np.int64))
            parts.append(net.op("Transpose", part, perm=perm))
        scores = net.op("Mul", net.op("MatMul", *parts[:2]), net.const((width // heads) ** -0.5))
        y = net.op("Transpose", net.op("MatMul", net.op("Softmax", scores, axis=-1), parts[2]), perm=[0, 2, 1, 3])
        x = net.op("Add", x, net.linear(net.op("Reshape", y, net.const([1, -1, width], np.int64)), width, width))
        y = net.op("Gelu", net.linear(net.norm(x, width), width, 4 * width))
        x = net.op("Add", x, net.linear(y, 4 * width, width))
    return _built(net, {"tokens": net.linear(net.norm(x, width), width, 10)}, (1, 32, 20), seed)


def convnext(seed: int) -> Built:
    """Depthwise 7x7, LayerNormalization with channels last, GELU, and a small layer scale."""
    net = Net(seed)
    x, width = net.conv("x", 3, 24, 4, strides=[4, 4]), 24
    for _ in range(3):
        y = net.op("Transpose", net.conv(x, width, width, 7, group=width), perm=[0, 2, 3, 1])
        y = net.linear(net.op("Gelu", net.linear(net.norm(y, width), width, 72)), 72, width)
        y = net.op("Mul", y, net.const(0.1 * net.uneven(width)))
        x = net.op("Add", x, net.op("Transpose", y, perm=[0, 3, 1, 2]))
    pooled = net.op("Flatten", net.op("GlobalAveragePool", x))
    return _built(net, {"logits": net.linear(net.norm(pooled, width), width, 12)}, (1, 3, 64, 64), seed)


def detector(seed: int) -> Built:
    """Scores, and boxes of exponentials, from two levels."""
    net = Net(seed)
    x = net.swish(net.conv(net.swish(net.conv("x", 3, 16, 3, strides=[2, 2])), 16, 24, 3, strides=[2, 2]))
    low = net.swish(net.conv(x, 24, 32, 3, strides=[2, 2]))
    made = {}
    for level, (y, width) in enumerate(((x, 24), (low, 32))):
        y = net.swish(net.conv(y, width, width, 3, group=width))
        made[f"scores{level}"] = net.op("Sigmoid", net.conv(y, width, 4, 1))
        made[f"boxes{level}"] = net.op("Exp", net.op("Tanh", net.conv(y, width, 4, 1)))
    return _built(net, made, (1, 3, 48, 48), seed)


def shuffled(seed: int) -> Built:
    """Super-resolution: Mish, residual blocks, DepthToSpace, the input added at the end."""
    net = Net(seed)
    x = first = net.conv("x", 1, 16, 3)
    for _ in range(3):
        x = net.op("Add", x, net.conv(net.op("Mish", net.conv(x, 16, 16, 3)), 16, 16, 3))
    fine = net.op("DepthToSpace", net.conv(net.op("Add", x, first), 16, 4, 3), blocksize=2)
    sizes = net.const([1, 1, 2, 2], np.float32)
    return _built(net, {"image": net.op("Add", fine, net.op("Resize", "x", "", sizes))}, (1, 1, 24, 24), seed)


def recurrent(seed: int) -> Built:
    """An LSTM in both directions between linear layers, three labels a step."""
    net = Net(seed)
    x = net.op("Tanh", net.linear("x", 12, 24))
    parts = [net.const(net.rng.normal(size=(2, 64, width)) / np.sqrt(width)) for width in (24, 16)]
    time = net.op("Transpose", x, perm=[1, 0, 2])
    y = net.op("LSTM", time, *parts, outputs=3, hidden_size=16, direction="bidirectional")
    y = net.op("Reshape", net.op("Transpose", y, perm=[2, 0, 1, 3]), net.const([1, -1, 32], np.int64))
    return _built(net, {"labels": net.op("LogSoftmax", net.linear(y, 32, 3), axis=-1)}, (1, 40, 12), seed)


def grouped(seed: int) -> Built:
    """Groups of channels, a channel shuffle, PRelu, and a mean subtracted at the end."""
    net = Net(seed)
    x = net.op("PRelu", net.conv("x", 4, 24, 3, strides=[2, 2]), net.const(np.full((24, 1, 1), 0.2)))
    for _ in range(2):
        y = net.conv(x, 24, 24, 1, group=3)
        y = net.op("Transpose", net.op("Reshape", y, net.const([1, 3, 8, 16, 16], np.int64)), perm=[0, 2, 1, 3, 4])
        y = net.op("Reshape", y, net.const([1, 24, 16, 16], np.int64))
        x = net.op("Add", x, net.conv(net.op("Relu", net.conv(y, 24, 24, 3, group=24)), 24, 24, 1, group=3))
    y = net.conv(x, 24, 6, 1)
    mean = net.op("ReduceMean", y, net.const([2, 3], np.int64))
    return _built(net, {"centred": net.op("Sub", y, mean)}, (1, 4, 32, 32), seed)


NETWORKS: dict[str, Callable[[int], Built]] = {
    made.__name__: made
    for made in (
        mobile,
        gated_wave,
        volume,
        voice,
        tiny_head,
        channels_last,
        encoder,
        convnext,
        detector,
        shuffled,
        recurrent,
        grouped,
    )
}
