"""What the Q/DQ nodes of a graph say, and which operands of which products they quantize.

Graph with types and shapes -> `Quantizer` per Q and DQ; node that multiplies and adds -> `Product`, whose operands are
traced back to DequantizeLinear. Values of constants are read only when they are asked for. It must not judge or change
a graph.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from engines.core import fp4
from engines.core.nodes import attribute, bodies, constant_tensor, ints, weight_axis
from engines.core.operators import CONTRACTIONS, MOVERS
from engines.core.shapes import inferred_at

# What compilers call types that they name otherwise than ONNX does. TensorRT reads UINT8 codes as INT8.
_CALLED: Mapping[int, str] = {TensorProto.UINT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8", TensorProto.FLOAT4E2M1: "fp4"}
_INTEGERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)


def code_name(dtype: int) -> str:
    """What an audit calls an ONNX type of codes: 'int8', 'fp8', 'fp4', else its own name: 'int2', 'float8e5m2', ..."""
    return _CALLED.get(dtype) or str(TensorProto.DataType.Name(dtype)).lower()


def code_bits(dtype: int) -> int:
    """Bits of one code of an ONNX type; 64 where the type is unknown, or its name says none."""
    digits = re.search(r"\d+", TensorProto.DataType.Name(dtype))
    return int(digits[0]) if digits else 64


# The types that count as low precision, as `code_name` calls them.
LOW = frozenset(code_name(dtype) for dtype in TensorProto.DataType.values() if code_bits(dtype) <= 8)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantizer:
    """One QuantizeLinear or DequantizeLinear.

    Attributes:
        node: the node itself.
        dtype: ONNX type of the codes by the ONNX standard, 0 where it is not known.
        scales: shape of the scale, None where it is not known.
        axis: of a vector or block scale, counted from the front where the rank is known; the default where absent.
        shape: of the quantized tensor, None where unknown.
        stored: the codes are constant.
        computed_scale: the scale depends on an input.
        computed_zero: the zero point depends on an input.
        source: of a DQ, the Q that makes its codes.
        names: of the scale and the zero point, '' where there is none.
        constant_of: the values of a constant by its name, None of what depends on an input.
    """

    node: NodeProto
    dtype: int
    scales: tuple[int, ...] | None
    axis: int
    shape: tuple[int | None, ...] | None
    stored: bool
    computed_scale: bool
    computed_zero: bool
    source: Quantizer | None
    names: tuple[str, str]
    constant_of: Callable[[str], np.ndarray | None]

    @property
    def is_q(self) -> bool:
        """Whether this is a QuantizeLinear."""
        return bool(self.node.op_type == "QuantizeLinear")

    @property
    def scale(self) -> np.ndarray | None:
        """The values of the scale, None where they are computed from an input."""
        return self.constant_of(self.names[0])

    @property
    def zero(self) -> np.ndarray | None:
        """The zero points; None where absent, or computed (`computed_zero`)."""
        return self.constant_of(self.names[1]) if self.names[1] else None

    @property
    def count(self) -> int:
        """Number of scales, 0 where it is not known."""
        return 0 if self.scales is None else math.prod(self.scales)

    @property
    def vector(self) -> bool:
        """More than one scale along one axis."""
        return self.scales is not None and len(self.scales) == 1 and self.count > 1

    @property
    def blocked(self) -> bool:
        """Scales of the rank of the tensor."""
        return self.scales is not None and len(self.scales) > 1

    @property
    def dynamic(self) -> bool:
        """Whether the engine computes the scale as it runs, other than NVFP4's block scales of data."""
        return self.computed_scale and self.dtype != TensorProto.FLOAT4E2M1

    @property
    def constant(self) -> bool:
        """Whether what is dequantized is constant: stored codes, or a constant that a Q makes codes of."""
        return self.stored or (self.source is not None and self.source.stored)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operand:
    """One factor of a product.

    Attributes:
        tensor: what the product reads.
        dq: the DequantizeLinear it comes from, None where it is float.
        constant: it does not depend on an input.
        output_axis: the axis of `dq` that holds the product's output channels, None where it cannot be followed.
        elem: ONNX type, 0 where unknown.
    """

    tensor: str
    dq: Quantizer | None
    constant: bool
    output_axis: int | None
    elem: int

    @property
    def dtype(self) -> int:
        """The type of its codes, 0 where it is float."""
        return self.dq.dtype if self.dq else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Product:
    """One node that multiplies two operands and adds."""

    node: NodeProto
    operands: tuple[Operand, Operand]

    @property
    def weight(self) -> Operand | None:
        """The constant factor, None where there is none or both are."""
        constant = [o for o in self.operands if o.constant]
        return constant[0] if len(constant) == 1 else None

    @property
    def data(self) -> Operand:
        """The factor that is not the weight; the first where both are computed."""
        return self.operands[1] if self.operands[0].constant else self.operands[0]


class QuantizedGraph:
    """One graph (main, or a body inside it) with its quantizers read once; names of outer graphs stay visible."""

    multiplying: ClassVar[frozenset[str]] = CONTRACTIONS
    # What is looked through on the way from a product to its DQ. Cast changes the float type, not the codes.
    through: ClassVar[frozenset[str]] = MOVERS | {"Cast"}

    def __init__(
        self,
        nodes: Sequence[NodeProto],
        shown: GraphProto,
        stored: Iterable[TensorProto],
        *,
        opset: int,
        outer: QuantizedGraph | None = None,
        turns: int | None = 1,
    ) -> None:
        """Reads names, types, shapes and quantizers.

        Args:
            nodes: of the graph, in its order.
            shown: the graph that states types and shapes, after inference.
            stored: its initializers.
            opset: version of the default operator set.
            outer: the graph around a body.
            turns: how often the graph runs in one inference; None where that depends on values.
        """
        self.turns = turns
        self.nodes = tuple(nodes)  # held, so that the identity of a node stays valid as long as the graph
        self.uses = Counter(name for node in self.nodes for name in node.input)  # tensor -> how often nodes read it
        self._opset = opset
        self._types: dict[str, int] = dict(outer._types) if outer else {}
        self._shapes: dict[str, tuple[int | None, ...]] = dict(outer._shapes) if outer else {}
        self._constants: set[str] = set(outer._constants) if outer else set()
        self._producers: dict[str, NodeProto] = dict(outer._producers) if outer else {}
        self._single: dict[str, int] = dict(outer._single) if outer else {}  # values of integers and bools
        self.by_output: dict[str, Quantizer] = dict(outer.by_output) if outer else {}
        for info in (*shown.input, *shown.output, *shown.value_info):
            tensor = info.type.tensor_type
            self._types[info.name] = tensor.elem_type
            if tensor.HasField("shape"):
                dims = tensor.shape.dim
                self._shapes[info.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
        for constant in (*shown.initializer, *(stored := list(stored)), *(constant_tensor(n) for n in self.nodes)):
            if constant is not None and constant.data_type in _INTEGERS and math.prod(constant.dims) == 1:
                self._single[constant.name] = int(numpy_helper.to_array(constant).item())
        for constant in stored:
            self._types[constant.name], self._shapes[constant.name] = constant.data_type, tuple(constant.dims)
            self._constants.add(constant.name)
        for node in self.nodes:  # what a node reads is known before it
            drawn = node.op_type.startswith("Random") or next(bodies(node), None) is not None
            if not drawn and all(name in self._constants for name in node.input if name):
                self._constants.update(node.output)
            self._producers.update(dict.fromkeys(filter(None, node.output), node))
            if node.op_type == fp4.QUANTIZE:
                self._types[node.output[0]] = TensorProto.FLOAT4E2M1
        for node in self.nodes:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 1:
                self.by_output[node.output[0]] = self.read(node)

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """Every product of this graph that has two factors."""
        return tuple(self.product(n) for n in self.nodes if self._multiplies(n))

    def all_products(self) -> Iterator[tuple[QuantizedGraph, Product]]:
        """Every product of the graph and of the bodies inside it that depends on an input, with its graph."""
        for node in self.nodes:
            if self._multiplies(node) and not self.is_constant(node.output[0]):
                yield self, self.product(node)
            for body in bodies(node):
                yield from self._inner(node, body).all_products()

    def all_graphs(self) -> Iterator[QuantizedGraph]:
        """This graph and the bodies inside it."""
        yield self
        for node in self.nodes:
            for body in bodies(node):
                yield from self._inner(node, body).all_graphs()

    def _inner(self, node: NodeProto, body: GraphProto) -> QuantizedGraph:
        """A body of a node."""
        each = self._turns(node, body)
        turns = None if each is None or self.turns is None else each * self.turns
        return QuantizedGraph(body.node, body, body.initializer, opset=self._opset, outer=self, turns=turns)

    def _turns(self, node: NodeProto, body: GraphProto) -> int | None:
        """How often a body runs each time that its node does; None where that depends on values."""
        if node.op_type == "Scan" and self._opset > 8:
            count = attribute(node, "num_scan_inputs", 0)
            shape = self.shape(node.input[len(node.input) - count])
            axis = ints(node, "scan_input_axes", [0] * count)[0]
            return None if shape is None else shape[axis]
        if node.op_type == "Loop":
            trip, start = self._single.get(node.input[0]), node.input[1]
            goes_on = not start or self._single.get(start) == 1
            return trip if goes_on and self._stays(body) else None
        return 1 if node.op_type == "If" else None

    def _stays(self, body: GraphProto) -> bool:
        """Whether a Loop's body never ends it: its condition is what it was, or true."""
        makers = {name: node for node in body.node for name in node.output}
        name = body.output[0].name
        while (maker := makers.get(name)) is not None and maker.op_type in ("Identity", "Cast"):
            name = maker.input[0]
        constants = (*body.initializer, *(constant_tensor(node) for node in body.node))
        own = {t.name: t for t in constants if t is not None}
        true = bool(numpy_helper.to_array(own[name]).all()) if name in own else self._single.get(name) == 1
        return name == body.input[1].name or true

    def product(self, node: NodeProto) -> Product:
        """A node of two factors as a product."""
        return Product(node=node, operands=(self._operand(node, 0), self._operand(node, 1)))

    def is_constant(self, name: str) -> bool:
        """Whether a tensor does not depend on an input."""
        return name in self._constants

    def constant(self, name: str) -> np.ndarray | None:
        """The values of a constant: None here, for a graph alone does not know where they lie."""
        return None

    def scale_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a scale, 1 for a size left open; None where its rank is not known."""
        shape = self.shape(name)
        return None if shape is None else tuple(size or 1 for size in shape)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """The shape as far as it is known, None for a dynamic size."""
        return self._shapes.get(name)

    def producer(self, name: str) -> NodeProto | None:
        """The node that makes a tensor, None for an input and an initializer."""
        return self._producers.get(name)

    def elem(self, name: str) -> int:
        """The ONNX type of a tensor, 0 where it is not known."""
        return self._types.get(name, 0)

    def output_type(self, q: Quantizer) -> int:
        """The float type that a DQ gives."""
        return attribute(q.node, "output_dtype", 0) or self.elem(q.node.input[1])

    def read(self, node: NodeProto) -> Quantizer:
        """A QuantizeLinear or DequantizeLinear; of a DQ, what it reads must have been read before."""
        shape = self.shape(node.input[0])
        scale, zero = node.input[1], node.input[2] if len(node.input) > 2 else ""
        source = self.by_output.get(node.input[0])
        if node.op_type == "QuantizeLinear" or (source is not None and not source.is_q):
            source = None
        if node.op_type == "QuantizeLinear":
            dtype = self.elem(zero) or attribute(node, "output_dtype", 0) or TensorProto.UINT8
        else:
            dtype = (source.dtype if source else 0) or self.elem(node.input[0]) or self.elem(zero)
        axis = attribute(node, "axis", 1 if self._opset >= 13 else 0)
        return Quantizer(
            node=node,
            dtype=dtype,
            scales=self.scale_shape(scale),
            axis=axis + len(shape) if axis < 0 and shape is not None else axis,
            shape=shape,
            stored=self.is_constant(node.input[0]),
            computed_scale=not self.is_constant(scale),
            computed_zero=bool(zero) and not self.is_constant(zero),
            source=source,
            names=(scale, zero),
            constant_of=self.constant,
        )

    def _multiplies(self, node: NodeProto) -> bool:
        return node.op_type in self.multiplying and len(node.input) > 1 and all(node.input[:2])

    def _operand(self, node: NodeProto, index: int) -> Operand:
        tensor = name = node.input[index]
        shape = self.shape(tensor)
        by_rank = node.op_type in ("MatMul", "Einsum")
        known = not by_rank or (shape is not None and len(shape) > 1)
        axis = weight_axis(node, len(shape or ()), index) if known else None
        while (dq := self.by_output.get(name)) is None:
            mover = self._producers.get(name)
            if mover is None or mover.op_type not in self.through:
                break
            axis = self._before(mover, axis)
            name = mover.input[0]
        if dq is not None and dq.is_q:
            dq = None
        elem = self.output_type(dq) if dq else self.elem(tensor)
        return Operand(tensor=tensor, dq=dq, constant=self.is_constant(tensor), output_axis=axis, elem=elem)

    def _before(self, mover: NodeProto, axis: int | None) -> int | None:
        """Where an axis of what a mover gives lies in what it reads, None where it cannot be followed."""
        if axis is None or mover.op_type in self.through - MOVERS | {"Identity", "Slice"}:
            return axis
        if mover.op_type != "Transpose":
            return None
        perm = ints(mover, "perm", []) or list(range(len(self.shape(mover.input[0]) or ())))[::-1]
        return perm[axis] if axis < len(perm) else None


def read_graph(model: ModelProto, inputs: Mapping[str, Sequence[int]]) -> QuantizedGraph:
    """The main graph of a model, without external data, with all shapes that given shapes of inputs decide."""
    shown = inferred_at(model, inputs)
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    return QuantizedGraph(shown.node, shown, model.graph.initializer, opset=opset)
