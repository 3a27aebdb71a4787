"""What an audit asks of a Q/DQ graph: which nodes multiply, how much, and how their operands are quantized.

ONNX model -> shapes inferred at fixed input shapes -> `Graph.products()` -> operands traced back to DequantizeLinear.
Must not load external data or change the model it was given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import TensorProto

from engines.core import fp4

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum")
# Operators that only move elements (or change the float type), so that DequantizeLinear before them still counts.
LAYOUT = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Expand", "Tile", "Cast")

STORED: dict[int, str] = {
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One factor of a product.

    `dtype` is '' where no DequantizeLinear feeds it; `axis` is None where it cannot be followed.
    """

    constant: bool
    dtype: str = ""
    per_axis: bool = False
    axis: int | None = None
    blocked: bool = False
    dynamic: bool = False
    unsigned: bool = False
    source: str = ""


class Graph:
    """One graph (main, or a body inside it) with inferred shapes; names of outer graphs stay visible."""

    def __init__(self, graph: onnx.GraphProto, outer: Graph | None = None) -> None:
        """Reads names, types and shapes of a graph after shape inference."""
        self.proto = graph
        self.shapes: dict[str, tuple[int, ...]] = dict(outer.shapes) if outer else {}
        self.types: dict[str, int] = dict(outer.types) if outer else {}
        self.producers: dict[str, onnx.NodeProto] = dict(outer.producers) if outer else {}
        self.constants: set[str] = set(outer.constants) if outer else set()
        self.uses: dict[str, int] = {}
        for info in (*graph.input, *graph.output, *graph.value_info):
            tensor = info.type.tensor_type
            self.types[info.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[info.name] = tuple(d.dim_value or 1 for d in tensor.shape.dim)
        for init in graph.initializer:
            self.types[init.name], self.shapes[init.name] = init.data_type, tuple(init.dims)
            self.constants.add(init.name)
        for node in graph.node:
            if all(name in self.constants for name in node.input if name) and not _bodies(node):
                self.constants.update(node.output)
            for name in node.output:
                self.producers[name] = node
            if node.op_type == fp4.QUANTIZE:
                self.types[node.output[0]] = TensorProto.FLOAT4E2M1
            for name in node.input:
                self.uses[name] = self.uses.get(name, 0) + 1

    @classmethod
    def read(cls, model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]]) -> Graph:
        """The main graph of a model with shapes inferred at given input shapes; 1 stands for a dimension left open."""
        fixed = onnx.ModelProto()
        fixed.CopyFrom(model)
        del fixed.graph.value_info[:]
        for info in fixed.graph.input:
            dims = info.type.tensor_type.shape.dim
            for i, dim in enumerate(dims):
                if info.name in inputs:
                    dim.dim_value = inputs[info.name][i]
                elif not dim.dim_value:
                    dim.dim_value = 1
        for info in fixed.graph.output:
            info.type.tensor_type.ClearField("shape")
        if fp4.holds_fp4(fixed):
            fp4.with_function(fixed)
        return cls(onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph)

    def products(self) -> Iterator[tuple[Graph, onnx.NodeProto]]:
        """Every product of the graph and of the bodies inside it that depends on an input, with its graph.

        A Loop body counts once: its trip count is not known.
        """
        for node in self.proto.node:
            if node.op_type in PRODUCTS and len(node.input) >= 2 and node.output[0] not in self.constants:
                yield self, node
            for body in _bodies(node):
                yield from Graph(body, self).products()

    def operand(self, name: str) -> Operand:
        """How one factor is quantized, looking through operators that only move elements."""
        node = self.producers.get(name)
        if node is None or node.op_type == "Constant":
            return Operand(constant=name in self.constants)
        if node.op_type == "DequantizeLinear":
            return self._dequantized(node)
        if node.op_type not in LAYOUT:
            return Operand(constant=name in self.constants)
        found = self.operand(node.input[0])
        axis = found.axis
        if axis is not None and node.op_type == "Transpose":
            default = range(len(self.shapes.get(name, ())))[::-1]
            perm = list(next((a.ints for a in node.attribute if a.name == "perm"), default))
            axis = perm.index(axis) if axis in perm else None
        elif node.op_type not in ("Identity", "Cast", "Slice"):
            axis = None
        return replace(found, axis=axis)

    def _dequantized(self, node: onnx.NodeProto) -> Operand:
        """The operand that a DequantizeLinear makes."""
        codes, scale = node.input[0], node.input[1]
        shape, scale_shape = self.shapes.get(codes, ()), self.shapes.get(scale, ())
        per_axis = math.prod(scale_shape) > 1
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        stored = self.types.get(codes, 0)
        if not stored and len(node.input) > 2:
            stored = self.types.get(node.input[2], 0)
        return Operand(
            constant=codes in self.constants,
            dtype=STORED.get(stored, "int8"),
            per_axis=per_axis and len(scale_shape) == 1,
            axis=(axis + len(shape) if axis < 0 else axis) if per_axis else None,
            blocked=per_axis and len(scale_shape) > 1,
            dynamic=scale not in self.constants and stored != TensorProto.FLOAT4E2M1,
            unsigned=stored not in STORED or stored == TensorProto.UINT8,
            source=node.output[0],
        )

    def shared(self, operands: Sequence[Operand]) -> bool:
        """Whether the dequantized operand also feeds something else."""
        return any(self.uses.get(o.source, 0) > 1 for o in operands if o.dtype)

    def output_axis(self, node: onnx.NodeProto) -> int:
        """The axis of a weight that holds the output channels."""
        if node.op_type == "Gemm":
            return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
        if node.op_type in ("MatMul", "Einsum"):
            return max(len(self.shapes.get(node.input[1], (0, 0))) - 1, 0)
        return 1 if node.op_type == "ConvTranspose" else 0

    def macs(self, node: onnx.NodeProto) -> int:
        """Multiply-adds of a product; 0 where a shape cannot be inferred.

        Conv: output elements x weight elements per output channel. ConvTranspose: input elements x weight elements
        per input channel. Gemm and MatMul: output elements x inner length. Einsum: product of all index lengths.
        """
        a, b = (self.shapes.get(name) for name in node.input[:2])
        out = self.shapes.get(node.output[0])
        if a is None or b is None:
            return 0
        if node.op_type == "Conv":
            return math.prod(out) * math.prod(b[1:]) if out else 0
        if node.op_type == "ConvTranspose":
            return math.prod(a) * math.prod(b[1:])
        if node.op_type == "Einsum":
            return self._einsum_macs(node)
        if node.op_type == "Gemm":
            flip = {x.name: x.i for x in node.attribute}
            rows, inner = a[::-1] if flip.get("transA") else a
            return rows * inner * b[0 if flip.get("transB") else 1]
        batch = math.prod(_broadcast(a[:-2], b[:-2]))
        return batch * (a[-2] if len(a) > 1 else 1) * a[-1] * (b[-1] if len(b) > 1 else 1)

    def _einsum_macs(self, node: onnx.NodeProto) -> int:
        """Product of the lengths of all indices; 0 with an ellipsis."""
        equation = next(x.s.decode() for x in node.attribute if x.name == "equation").replace(" ", "")
        terms = equation.split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for term, name in zip(terms, node.input, strict=True):
            if "." in term or len(term) != len(self.shapes.get(name, ())):
                return 0
            sizes.update(zip(term, self.shapes[name], strict=True))
        return math.prod(sizes.values())


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside an If, Loop or Scan."""
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def _broadcast(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """The broadcast of two lists of batch dimensions."""
    n = max(len(a), len(b))
    left, right = (*[1] * (n - len(a)), *a), (*[1] * (n - len(b)), *b)
    return [max(x, y) for x, y in zip(left, right, strict=True)]
