"""Quantized models, each broken in one way: the material of the lint tests, built in code.

`BROKEN` maps a name to a function that gives the model; `EXPECTED` says which rule finds which node in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


class Net:
    """Collects nodes and initializers; every method that adds a node returns the name of its output."""

    def __init__(self, *, opset: int = 21, seed: int = 0, elem: int = FLOAT) -> None:
        """An empty graph."""
        self.opset, self.elem = opset, elem
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inits: list[onnx.TensorProto] = []

    def init(self, name: str, array: Any) -> str:
        """One initializer."""
        self.inits.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(np.shape(array)), name))
        return name

    def op(self, op_type: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """One node; its outputs are `<name>.out`, `<name>.out1`, ..."""
        names = [f"{name}.out{i or ''}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, **attributes))
        return names[0]

    def normal(self, name: str, shape: Sequence[int], scale: float = 0.3) -> str:
        """A float initializer of normal values."""
        dtype = np.float16 if self.elem == HALF else np.float32
        return self.init(name, (self.rng.normal(size=shape) * scale).astype(dtype))

    def params(self, name: str, scale: Any = 0.02, zero: Any = 0, dtype: Any = np.int8) -> list[str]:
        """Scale and zero point initializers; `zero` None: no zero point."""
        kind = np.float16 if self.elem == HALF else np.float32
        scale = np.asarray(scale)
        scale = scale.astype(kind) if scale.dtype in (np.float64, np.int64) else scale
        names = [self.init(name + ".scale", scale)]
        if zero is not None:
            zero = np.asarray(zero)
            full = np.full(scale.shape, zero) if zero.ndim == 0 and not isinstance(zero, np.ndarray) else zero
            names.append(self.init(name + ".zero", np.broadcast_to(full, full.shape).astype(dtype)))
        return names

    def qdq(self, x: str, name: str, scale: Any = 0.02, zero: Any = 0, dtype: Any = np.int8, **attributes: Any) -> str:
        """`<name>.Q` and `<name>.DQ` on a float tensor."""
        if np.ndim(scale) and np.ndim(zero) == 0 and zero is not None:
            zero = np.full(np.shape(scale), zero)
        params = self.params(name, scale, zero, dtype)
        q = self.op("QuantizeLinear", [x, *params], name + ".Q", **attributes)
        return self.op("DequantizeLinear", [q, *params], name + ".DQ", **attributes)

    def dq(self, codes: Any, name: str, scale: Any = 0.01, zero: Any = 0, **attributes: Any) -> str:
        """`<name>.DQ` on stored codes."""
        if np.ndim(scale) and np.ndim(zero) == 0 and zero is not None:
            zero = np.full(np.shape(scale), zero)
        params = self.params(name, scale, zero, codes.dtype)
        return self.op("DequantizeLinear", [self.init(name + ".codes", codes), *params], name + ".DQ", **attributes)

    def codes(self, shape: Sequence[int], dtype: Any = np.int8, low: int = -100, high: int = 100) -> np.ndarray:
        """Random codes."""
        return self.rng.integers(low, high, size=shape).astype(dtype)

    def done(
        self, y: str | Sequence[str], x_shape: Sequence[int], y_shape: Sequence[int], *, elem: int = 0
    ) -> onnx.ModelProto:
        """The model from input x to the tensors y."""
        ends = [y] if isinstance(y, str) else list(y)
        graph = helper.make_graph(
            self.nodes,
            "broken",
            [helper.make_tensor_value_info("x", self.elem, list(x_shape))],
            [helper.make_tensor_value_info(name, elem or self.elem, list(y_shape)) for name in ends],
            self.inits,
        )
        domains = sorted({n.domain for n in self.nodes} - {""})
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)]
        return helper.make_model(graph, opset_imports=imports, ir_version=min(10, 10))
