"""Models with quantizers of their own, in the forms that quantization-aware training exports; built in code.

A form is what a toolkit writes; the network is always the same: two convolutions with a shortcut, a mean, a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


@dataclass
class Form:
    """How one toolkit writes its quantizers.

    Attributes:
        codes: weights are stored as codes; else as floats in front of a Q.
        unsigned: data are UINT8 with a zero point.
        constants: scales and zero points are Constant nodes; else initializers.
        linear: "gemm" (transB), or "matmul" behind a Transpose of the weight's DQ.
        bias: the convolutions' biases are INT32 codes.
        twice: the input is quantized again for each reader, and twice in a row.
        channels: data of the second convolution have a scale for each channel.
        shortcut: the shortcut is quantized too.
        skip: the classifier has no quantizers.
        per_tensor: weights have one scale.
        half: all floats are FP16.
        eight: codes are FP8.
        clipped: codes go to 127 only, by a Clip, and a weight's from -127.
    """

    codes: bool = False
    unsigned: bool = False
    constants: bool = False
    linear: str = "gemm"
    bias: bool = False
    twice: bool = False
    channels: bool = False
    shortcut: bool = False
    skip: bool = False
    per_tensor: bool = False
    half: bool = False
    eight: bool = False
    clipped: bool = False


FORMS: dict[str, Form] = {
    "pytorch-quantization": Form(),
    "model optimizer": Form(constants=True, shortcut=True),
    "torch.ao": Form(codes=True, unsigned=True, linear="matmul"),
    "torch.ao, weights with Q": Form(unsigned=True, linear="matmul"),
    "onnx runtime": Form(codes=True, unsigned=True, bias=True),
    "duplicated": Form(twice=True, linear="matmul"),
    "scales of channels": Form(channels=True),
    "part of it": Form(skip=True),
    "one scale": Form(per_tensor=True),
    "half": Form(half=True),
    "fp8": Form(eight=True),
    "pytorch, fewer codes": Form(unsigned=True, clipped=True, linear="matmul"),
}


@dataclass
class _Net:
    form: Form
    rng: np.random.Generator
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)

    @property
    def real(self) -> type[Any]:
        return np.float16 if self.form.half else np.float32

    def keep(self, name: str, values: Any, *, parameter: bool = False) -> str:
        stored = numpy_helper.from_array(np.ascontiguousarray(values).reshape(np.shape(values)), name)
        if parameter and self.form.constants:
            self.nodes.append(helper.make_node("Constant", [], [name], value=stored))
        else:
            self.tensors.append(stored)
        return name

    def op(self, op: str, inputs: Sequence[str], out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"/{out}/{op}", **attributes))
        return out

    def data(self, tensor: str, name: str, scale: Any, zero: int = 0) -> str:
        """Q and DQ of data."""
        kind = np.dtype(ml_dtypes.float8_e4m3fn if self.form.eight else np.uint8 if self.form.unsigned else np.int8)
        zeros = np.full(np.shape(scale), zero).astype(kind)
        inputs = [self.keep(f"{name}.scale", np.asarray(scale, self.real), parameter=True)]
        inputs.append(self.keep(f"{name}.zero", zeros, parameter=True))
        extra = {"axis": 1} if np.ndim(scale) else {}
        codes = self.op("QuantizeLinear", [tensor, *inputs], f"{name}.q", **extra)
        if self.form.clipped:
            codes = self.op("Clip", [codes, "", self.keep(f"{name}.most", np.uint8(127))], f"{name}.clip")
        return self.op("DequantizeLinear", [codes, *inputs], f"{name}.dq", **extra)

    def weight(self, name: str, values: np.ndarray) -> str:
        """Q and DQ of a weight, scales along axis 0, that do not clip a thing."""
        largest = np.abs(values).reshape(len(values), -1).max(axis=1)
        scale = np.asarray((largest.max() if self.form.per_tensor else largest) / 127, self.real)
        zero = np.zeros(scale.shape, ml_dtypes.float8_e4m3fn if self.form.eight else np.int8)
        inputs = [self.keep(f"{name}.scale", scale, parameter=True), self.keep(f"{name}.zero", zero, parameter=True)]
        extra = {} if self.form.per_tensor else {"axis": 0}
        wide = scale.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale
        codes = np.clip(np.rint(values / wide), -128, 127).astype(np.int8)
        stored = self.keep(name, codes if self.form.codes else values.astype(self.real))
        if not self.form.codes:
            stored = self.op("QuantizeLinear", [stored, *inputs], f"{name}.q", **extra)
        if self.form.clipped:
            ends = [self.keep(f"{name}.{end}", np.int8(value)) for end, value in (("least", -127), ("most", 127))]
            stored = self.op("Clip", [stored, *ends], f"{name}.clip")
        return self.op("DequantizeLinear", [stored, *inputs], f"{name}.dq", **extra)

    def bias(self, name: str, count: int, scale: float) -> str:
        values = self.rng.normal(size=count) * 0.1
        if not self.form.bias:
            return self.keep(name, values.astype(self.real))
        codes = self.keep(name, np.rint(values / scale).astype(np.int32))
        inputs = [codes, self.keep(f"{name}.scale", np.asarray(scale, self.real))]
        return self.op("DequantizeLinear", inputs, f"{name}.dq")


def qat(form: Form | str, *, seed: int = 0) -> onnx.ModelProto:
    """x (1, 3, 12, 12) -> y (1, 10), with quantizers as a toolkit writes them."""
    form = FORMS[form] if isinstance(form, str) else form
    g = _Net(form, np.random.default_rng(seed))
    zero = 0 if not form.unsigned else 61 if form.clipped else 121
    x = g.data("x", "x_in", 0.03, zero)
    if form.twice:
        x = g.data(x, "x_again", 0.03, zero)
    w1, w2 = (g.rng.normal(size=(8, c, 3, 3)) * 0.2 for c in (3, 8))
    c1 = g.op("Conv", [x, g.weight("w1", w1), g.bias("b1", 8, 0.001)], "c1", pads=[1] * 4)
    r1 = g.op("Relu", [c1], "r1")
    scale = np.linspace(0.02, 0.04, 8) if form.channels else 0.03
    a = g.data(r1, "r1_in", scale)
    c2 = g.op("Conv", [a, g.weight("w2", w2), g.bias("b2", 8, 0.001)], "c2", pads=[1] * 4)
    s = g.data(r1, "cut", 0.03) if form.shortcut or form.twice else r1
    r2 = g.op("Relu", [g.op("Add", [c2, s], "sum")], "r2")
    flat = g.op("Flatten", [g.op("GlobalAveragePool", [r2], "pool")], "flat")
    w3 = g.rng.normal(size=(10, 8)) * 0.3
    f = flat if form.skip else g.data(flat, "flat_in", 0.02)
    w = g.keep("w3", w3.astype(g.real)) if form.skip else g.weight("w3", w3)
    if form.linear == "gemm":
        g.op("Gemm", [f, w, g.keep("b3", np.zeros(10, g.real))], "y", transB=1)
    else:
        g.op("MatMul", [f, g.op("Transpose", [w], "w3.t", perm=[1, 0])], "y")
    kind = TensorProto.FLOAT16 if form.half else TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(n, kind, s) for n, s in (("x", [1, 3, 12, 12]), ("y", [1, 10]))]
    graph = helper.make_graph(g.nodes, "qat", ends[:1], ends[1:], g.tensors)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 19 if form.half or form.eight else 17)], ir_version=9
    )


def images(count: int = 6, *, half: bool = False, seed: int = 3) -> list[dict[str, np.ndarray]]:
    """Samples for `qat`."""
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float16 if half else np.float32)} for _ in range(count)]


def in_tensorrts(proto: onnx.ModelProto, *, traced: bool) -> onnx.ModelProto:
    """An FP8 model with quantizers by TensorRT's own names, as Model Optimizer traces and as it finishes them."""
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = "trt"
            node.op_type = f"TRT_FP8{node.op_type}" if traced else node.op_type
            if traced:
                del node.input[2:]
    proto.opset_import.append(helper.make_opsetid("trt", 1))
    return proto


def four_bits(*, traced: bool, inputs: int = 32, outputs: int = 16, block: int = 16) -> tuple[onnx.ModelProto, Any]:
    """x (4, inputs) -> y (4, outputs) by a weight in INT4 blocks as of Model Optimizer; and the weight's values.

    It writes axis 0 for blocks of rows. Its trace has the floats, a block a row, for which its finish puts the codes.
    """
    rng = np.random.default_rng(5)
    scale = np.asarray(rng.uniform(0.02, 0.05, (outputs, inputs // block)), np.float32)
    codes = rng.integers(-7, 7, (outputs, inputs))  # no block reaches its largest code: no maximum tells the scale
    wide = np.repeat(scale, block, axis=1)
    floats = np.asarray((codes + rng.uniform(-0.4, 0.4, codes.shape)) * wide, np.float32)
    if traced:
        stored = numpy_helper.from_array(floats.reshape(-1, block), "w")
        scale = scale.reshape(-1, 1)
    else:
        stored = numpy_helper.from_array(codes.astype(ml_dtypes.int4), "w")
    tensors = [stored, numpy_helper.from_array(scale, "s"), numpy_helper.from_array(np.array([outputs, inputs]), "to")]
    dq = helper.make_node("DequantizeLinear", ["w", "s"], ["d"], "DQ", domain="trt", axis=0, block_size=block)
    reshape = helper.make_node("Reshape", ["d", "to"], ["r"], "Reshape")
    gemm = helper.make_node("Gemm", ["x", "r" if traced else "d"], ["y"], "Gemm", transB=1)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, k]) for n, k in (("x", inputs), ("y", outputs))]
    nodes = [dq, reshape, gemm] if traced else [dq, gemm]
    graph = helper.make_graph(nodes, "four", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("trt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), np.asarray(codes * wide, np.float32)
