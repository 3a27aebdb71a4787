"""Which forms of a convolution with weights of few bits TensorRT-RTX keeps as such: real compiles, and their layers.

    python tools/low_bit_convolutions.py [--channels 256] [--target sm89] [--only REGEX]

A 1x1 and a 3x3 convolution of as many channels in as out, in FP16, in each form that a Q/DQ model could give it. The
engine's weights tell what is stored: 2 bytes a weight in FP16, 1 in INT8, half of one in INT4 (and scales). 3 and 2
bits are no types of the compiler: they would be INT4 codes with fewer values, so their rows are file size only.
A MatMul whose INT4 weight stands on the left is left out: TensorRT-RTX 1.7.1 ends with a segmentation fault.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from results import record

from engines.backends import rtx
from engines.backends.layers import SYNCHRONIZATION, Layer
from engines.core.errors import EngineError

BLOCK, SIDE = 64, 28


class Form:
    """A graph with one product, as its nodes and constants are added."""

    def __init__(self, channels: int, kernel: int) -> None:
        """Of a square kernel."""
        self.channels, self.kernel = channels, kernel
        self.nodes, self.constants = list[NodeProto](), list[TensorProto]()
        self.weight = np.random.default_rng(0).normal(size=(channels, channels, kernel, kernel)) / channels

    def constant(self, name: str, values: np.ndarray) -> str:
        """A constant of the type of its values."""
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def codes(self, name: str, values: np.ndarray) -> str:
        """INT4 codes."""
        whole = np.clip(np.rint(values * 7 / np.abs(values).max()), -7, 7).astype(np.int64)
        self.constants.append(helper.make_tensor(name, TensorProto.INT4, whole.shape, whole.reshape(-1)))
        return name

    def add(self, op_type: str, inputs: Sequence[str], output: str = "", **attributes: object) -> str:
        """A node; gives its output."""
        output = output or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=f"n{len(self.nodes)}", **attributes))
        return output

    def blocks(self, values: np.ndarray, axis: int) -> str:
        """INT4 codes in blocks along an axis, dequantized to FP16."""
        shape = [size // BLOCK if i == axis else size for i, size in enumerate(values.shape)]
        scale = self.constant("block_scale", np.full(shape, 2.0**-6, np.float16))
        return self.add("DequantizeLinear", [self.codes("codes", values), scale], axis=axis, block_size=BLOCK)

    def int8(self, tensor: str, axis: int, count: int) -> str:
        """Quantized to INT8 for each channel and back: the second level of two."""
        scale = self.constant("channel_scale", np.full(count, 2.0**-8, np.float16))
        zero = self.constant("channel_zero", np.zeros(count, np.int8))
        codes = self.add("QuantizeLinear", [tensor, scale, zero], axis=axis)
        return self.add("DequantizeLinear", [codes, scale, zero], axis=axis)

    def data(self, tensor: str) -> str:
        """INT8 with one scale."""
        scale = self.constant("data_scale", np.float16(2.0**-5).reshape(()))
        zero = self.constant("data_zero", np.zeros((), np.int8))
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [tensor, scale, zero]), scale, zero])

    def model(self) -> ModelProto:
        """The whole: x of FP16 images, y of the same size."""
        shape = [1, self.channels, SIDE, SIDE]
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in "xy")
        graph = helper.make_graph(self.nodes, "form", [x], [y], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def convolved(form: Form, data: str, weight: str) -> None:
    """The convolution."""
    form.add("Conv", [data, weight], "y", pads=[form.kernel // 2] * 4)


def plain(form: Form) -> None:
    """Conv, weight FP16."""
    convolved(form, "x", form.constant("w", form.weight.astype(np.float16)))


def channel(form: Form) -> None:
    """Conv, weight INT4 with a scale per channel."""
    scale = form.constant("scale", np.full(form.channels, 2.0**-6, np.float16))
    convolved(form, "x", form.add("DequantizeLinear", [form.codes("codes", form.weight), scale], axis=0))


def block(form: Form) -> None:
    """Conv, weight INT4 in blocks of input channels."""
    convolved(form, "x", form.blocks(form.weight, 1))


def two_levels(form: Form) -> None:
    """Conv, weight INT4 in blocks, then INT8 per channel; data INT8."""
    convolved(form, form.data("x"), form.int8(form.blocks(form.weight, 1), 0, form.channels))


def flat_two_levels(form: Form) -> None:
    """Conv, weight INT4 as a matrix in blocks, Reshape, then INT8 per channel; data INT8."""
    flat = form.blocks(form.weight.reshape(form.channels, -1), 1)
    shape = form.constant("shape", np.array(form.weight.shape, np.int64))
    made = form.add("Reshape", [flat, shape])
    convolved(form, form.data("x"), form.int8(made, 0, form.channels))


def _behind_channels_last(form: Form, multiply: Callable[[str], str]) -> None:
    last = form.add("Transpose", ["x"], perm=[0, 2, 3, 1])
    form.add("Transpose", [multiply(last)], "y", perm=[0, 3, 1, 2])


def product(form: Form) -> None:
    """MatMul with channels last, weight INT4 in blocks."""
    weight = form.blocks(form.weight[:, :, 0, 0].T, 0)
    _behind_channels_last(form, lambda data: form.add("MatMul", [data, weight]))


def product_two_levels(form: Form) -> None:
    """MatMul with channels last, weight INT4 in blocks, then INT8; data INT8."""
    weight = form.int8(form.blocks(form.weight[:, :, 0, 0].T, 0), 1, form.channels)
    _behind_channels_last(form, lambda data: form.add("MatMul", [form.data(data), weight]))


FORMS = {1: (plain, channel, block, two_levels, flat_two_levels, product, product_two_levels)}
FORMS[3] = FORMS[1][:5]


def _types(layer: Layer) -> str:
    """What a kernel reads, its constants behind a plus."""
    reads, stored = (sorted({t.dtype for t in tensors}) for tensors in (layer.inputs, layer.constants))
    return " and ".join(reads) + (f" + {' and '.join(stored)}" if stored else "")


def main() -> None:
    """Print a row for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--only", default="", help="of the forms' names")
    options = parser.parse_args()
    print(f"{options.channels} channels, {SIDE} x {SIDE}, blocks of {BLOCK}, compiled for {options.target}\n")
    print("| kernel | form | bytes per weight in the engine | kernels |\n|---|---|---|---|")
    for kernel, forms in FORMS.items():
        for make in forms:
            if not re.search(options.only, make.__name__):
                continue
            form = Form(options.channels, kernel)
            make(form)
            try:
                table = rtx.build(form.model(), targets=(options.target,)).table
                said = [f"{each.kind} ({_types(each)})" for each in table.layers if each.kind not in SYNCHRONIZATION]
                row = f"{table.weight_bytes / form.weight.size:.2f} | {len(said)}: {', '.join(said)}"
            except EngineError as error:
                row = f"- | refused: {' '.join(str(error).split())[:160]}"
            print(f"| {kernel}x{kernel} | {str(make.__doc__).rstrip('.')} | {row} |", flush=True)
    for bits in (3, 2):
        print(f"| any | {bits} bits, in a file packed so | file size only: {bits / 8:.3f} and the scales | - |")


if __name__ == "__main__":
    record(main)
