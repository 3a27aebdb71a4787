"""Tiny ONNX graphs for the engine tests, built in code: one weighted operator, quantized in the way a test asks for.

Never holds trained weights: values come from a seeded generator and only shapes, types and scales matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STORAGE = {
    "int8": (TensorProto.INT8, np.int8),
    "fp8": (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    "int4": (TensorProto.INT4, ml_dtypes.int4),
    "fp4": (TensorProto.FLOAT4E2M1, ml_dtypes.float4_e2m1fn),
}


def value(name: str, shape: Sequence[int | str], elem_type: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """A graph input or output."""
    return helper.make_tensor_value_info(name, elem_type, list(shape))


def const(name: str, array: np.ndarray) -> onnx.TensorProto:
    """An initializer holding an array."""
    return numpy_helper.from_array(np.asarray(array), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 21,
) -> onnx.ModelProto:
    """A checked model with an IR version that ONNX Runtime accepts."""
    graph = helper.make_graph(list(nodes), "tiny", list(inputs), list(outputs), list(initializers))
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    onnx.checker.check_model(result)
    return result


def identity(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """y = x, (1, 4)."""
    node = helper.make_node("Identity", ["x"], ["y"], name="same")
    return model([node], [value("x", [1, 4], dtype)], [value("y", [1, 4], dtype)])


class Graph:
    """Collects nodes and initializers; its methods return the name of the tensor they made."""

    def __init__(self, dtype: type = np.float32, seed: int = 0) -> None:
        """An empty graph whose float tensors are `dtype`."""
        self.dtype = dtype
        self.elem_type = TensorProto.FLOAT if dtype is np.float32 else TensorProto.FLOAT16
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op_type: str, inputs: Sequence[str], *, name: str, **attributes: Any) -> str:
        """One node with one output."""
        self.nodes.append(helper.make_node(op_type, list(inputs), [name + "_out"], name=name, **attributes))
        return name + "_out"

    def init(self, name: str, array: np.ndarray) -> str:
        """One initializer."""
        self.initializers.append(const(name, array))
        return name

    def activation(
        self, x: str, *, fmt: str = "int8", scale: float | np.ndarray = 0.05, axis: int | None = None
    ) -> str:
        """QuantizeLinear and DequantizeLinear on a float tensor."""
        s: np.ndarray = np.asarray(scale, self.dtype)
        scale_name = self.init(x + "_scale", s)
        zero = self.init(x + "_zero", np.zeros(s.shape, STORAGE[fmt][1]))
        extra = {} if axis is None else {"axis": axis}
        q = self.add("QuantizeLinear", [x, scale_name, zero], name=x + "_QuantizeLinear", **extra)
        return self.add("DequantizeLinear", [q, scale_name, zero], name=x + "_DequantizeLinear", **extra)

    def weight(
        self, name: str, shape: Sequence[int], *, fmt: str | None = "int8", axis: int | None = 0, block: int = 0
    ) -> str:
        """A constant, stored in `fmt` and dequantized; `fmt` None: plain float. `axis` None: one scale."""
        w = self.rng.normal(size=shape)
        if fmt is None:
            return self.init(name, w.astype(self.dtype))
        codes = np.round(np.clip(w * 3, -7, 7)).astype(STORAGE[fmt][1])
        scale_shape = [] if axis is None else [shape[axis]]
        extra = {} if axis is None else {"axis": axis}
        if block:
            assert axis is not None
            scale_shape = list(shape)
            scale_shape[axis] //= block
            extra["block_size"] = block
        scale = self.init(name + "_scale", np.full(scale_shape, 0.02, self.dtype))
        return self.add("DequantizeLinear", [self.init(name, codes), scale], name=name + "_DequantizeLinear", **extra)

    def finish(
        self, y: str, in_shape: Sequence[int | str], out_shape: Sequence[int | str], *, opset: int = 21
    ) -> onnx.ModelProto:
        """The model from input x to tensor y."""
        return model(
            self.nodes,
            [value("x", in_shape, self.elem_type)],
            [value(y, out_shape, self.elem_type)],
            self.initializers,
            opset=opset,
        )


def conv(
    *,
    op: str = "Conv",
    data: str | None = "int8",
    fmt: str | None = "int8",
    axis: int | None = 0,
    data_axis: int | None = None,
    dtype: type = np.float32,
    batch: int | str = 1,
    group: int = 1,
    block: int = 0,
    opset: int = 21,
) -> onnx.ModelProto:
    """Conv or ConvTranspose 16 -> 16 channels, 3x3 on 8x8 with padding 1, so 16*16/group*9*64 multiply-adds."""
    g = Graph(dtype)
    data_scale: float | np.ndarray = 0.05 if data_axis is None else np.full(16, 0.05)
    x = g.activation("x", fmt=data, scale=data_scale, axis=data_axis) if data else "x"
    w = g.weight("w", [16, 16 // group, 3, 3], fmt=fmt, axis=axis, block=block)
    y = g.add(op, [x, w], name="conv", pads=[1, 1, 1, 1], group=group)
    return g.finish(y, [batch, 16, 8, 8], [batch, 16, 8, 8], opset=opset)


def matmul(
    *,
    data: str | None = "int8",
    fmt: str | None = "int8",
    axis: int | None = 1,
    dtype: type = np.float32,
    rows: int = 32,
    block: int = 0,
    op: str = "MatMul",
    opset: int = 21,
) -> onnx.ModelProto:
    """MatMul or Gemm (rows, 128) x (128, 64)."""
    g = Graph(dtype)
    x = g.activation("x", fmt=data) if data else "x"
    y = g.add(op, [x, g.weight("w", [128, 64], fmt=fmt, axis=axis, block=block)], name="product")
    return g.finish(y, [rows, 128], [rows, 64], opset=opset)


def attention(*, data: str | None = None, softmax: bool = False, dtype: type = np.float32) -> onnx.ModelProto:
    """softmax(x x^T) x on (1, 4, 64, 64): two products of activations, both unweighted."""
    g = Graph(dtype)
    x = g.activation("x", fmt=data) if data else "x"
    t = g.add("Transpose", [x], name="keys", perm=[0, 1, 3, 2])
    s = g.add("Softmax", [g.add("MatMul", [x, t], name="scores")], name="softmax", axis=-1)
    p = g.activation(s, fmt=data or "int8", scale=1 / 448) if softmax else s
    y = g.add("MatMul", [p, x], name="mix")
    return g.finish(y, [1, 4, 64, 64], [1, 4, 64, 64])
