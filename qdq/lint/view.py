"""What the Q/DQ nodes of anyone's model say, and which operands of which products they quantize.

Model -> View: types and shapes inferred, constants folded -> `Quantizer` per Q and DQ, `Product` per weighted node.
Only the main graph is read: bodies of If, Loop and Scan are not. This module must not judge or change a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper

from qdq.model.external import is_external, tensor_bytes
from qdq.model.model import Model
from qdq.model.nodes import bodies, without_initializers

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators through which the compiler moves a quantizer (DequantizeLinear down, QuantizeLinear up).
MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Expand", "Tile", "MaxPool")
FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
SMALL = 4096  # bytes; shape inference sees larger tensors by type and shape only
FOLDABLE = 1 << 16  # elements; a larger computed constant is no scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantizer:
    """One QuantizeLinear or DequantizeLinear.

    Attributes:
        node: the node itself.
        dtype: ONNX type of the codes by the ONNX standard, 0 where it is not known.
        scale: its values, None where they are computed from an input.
        zero: the zero points; None where absent, or computed (`computed_zero`).
        computed_zero: the zero point depends on an input.
        axis: of a vector or block scale, counted from the front where the rank is known; the default where absent.
        shape: of the quantized tensor, None where unknown.
        stored: the codes are constant.
        source: of a DQ, the Q that makes its codes.
    """

    node: NodeProto
    dtype: int
    scale: np.ndarray | None
    zero: np.ndarray | None
    computed_zero: bool
    axis: int
    shape: tuple[int | None, ...] | None
    stored: bool
    source: Quantizer | None = None

    @property
    def is_q(self) -> bool:
        """Whether this is a QuantizeLinear."""
        return bool(self.node.op_type == "QuantizeLinear")

    @property
    def count(self) -> int:
        """Number of scales, 0 where they are computed."""
        return 0 if self.scale is None else int(self.scale.size)

    @property
    def vector(self) -> bool:
        """More than one scale along one axis."""
        return self.scale is not None and self.scale.ndim == 1 and self.scale.size > 1

    @property
    def blocked(self) -> bool:
        """Scales of the rank of the tensor."""
        return self.scale is not None and self.scale.ndim > 1

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
    """One Conv, ConvTranspose, Gemm or MatMul."""

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


def label(node: NodeProto) -> str:
    """What a finding calls a node: its name, or what TensorRT's parser calls one without a name."""
    return str(node.name or f"node_of_{node.output[0]}")


def attribute(node: NodeProto, name: str, default: int | None = None) -> int | None:
    """An integer attribute."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


class View:
    """A model with its quantizers read once."""

    def __init__(self, model: Model) -> None:
        """Infer types and shapes, and read every Q and DQ of the main graph.

        Args:
            model: any ONNX model; it need not be valid in its quantizers.
        """
        self.model = model
        self.nodes = tuple(model.graph.node)  # held, so that the identity of a node stays valid as long as the view
        self._fixed = set(model.initializers)
        for node in self.nodes:  # in the order of the graph: what a node reads is known before it
            if (
                not any(bodies(node))
                and not node.op_type.startswith("Random")
                and all(n in self._fixed for n in node.input if n)
            ):
                self._fixed.update(node.output)
        self._constants: dict[str, np.ndarray | None] = {}
        self._shown = _inferred(model)
        self.by_output: dict[str, Quantizer] = {}
        for node in self.nodes:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 1:
                self.by_output[node.output[0]] = self._read(node)

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Every Q and DQ, in the order of the graph."""
        return tuple(self.by_output.values())

    @cached_property
    def heads(self) -> tuple[Quantizer, ...]:
        """Quantizers that are not the DQ of a Q with the same parameters: what is wrong is said once, at these."""
        return tuple(
            q for q in self.quantizers if q.source is None or list(q.source.node.input[1:]) != list(q.node.input[1:])
        )

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """Every product of the main graph that has two factors."""
        found = []
        for node in self.nodes:
            if node.op_type in PRODUCTS and len(node.input) > 1 and all(node.input[:2]):
                found.append(Product(node=node, operands=(self._operand(node, 0), self._operand(node, 1))))
        return tuple(found)

    @cached_property
    def _fed(self) -> dict[int, list[tuple[Product, int]]]:
        found: dict[int, list[tuple[Product, int]]] = {}
        for product in self.products:
            for index, operand in enumerate(product.operands):
                if operand.dq is not None:
                    found.setdefault(id(operand.dq), []).append((product, index))
        return found

    def products_of(self, q: Quantizer) -> tuple[tuple[Product, int], ...]:
        """Products that a DQ feeds, with the index of the operand."""
        return tuple(self._fed.get(id(q), ()))

    def is_constant(self, name: str) -> bool:
        """Whether a tensor does not depend on an input."""
        return name in self._fixed

    def constant(self, name: str) -> np.ndarray | None:
        """The values of a tensor that does not depend on an input; None if it does, or cannot be folded."""
        if name not in self._constants:
            self._constants[name] = self._fold(name)
        return self._constants[name]

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """The shape as far as it is known, None for a dynamic size."""
        info = self._shown.info(name)
        if info is None or info.shape is None:
            return None
        return tuple(d if isinstance(d, int) else None for d in info.shape)

    def elem(self, name: str) -> int:
        """The ONNX type of a tensor, 0 where it is not known."""
        info = self._shown.info(name)
        if info is None or info.dtype in ("undefined", "string") or info.dtype.endswith("_type"):
            return 0
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(info.dtype)))

    def output_type(self, q: Quantizer) -> int:
        """The float type that a DQ gives."""
        return attribute(q.node, "output_dtype") or self.elem(q.node.input[1])

    def _fold(self, name: str) -> np.ndarray | None:
        if self.model.is_constant(name):
            return self.model.array(name)
        if not self.is_constant(name):
            return None
        node = self.model.producer(name)
        assert node is not None
        if node.op_type == "DequantizeLinear":  # onnx's evaluator knows it from opset 19 on
            try:
                return dequantized(self, self._read(node)).astype(
                    np.dtype(helper.tensor_dtype_to_np_dtype(self.elem(node.input[1])))
                )
            except ValueError:
                return None
        shape = self.shape(name)
        if node.op_type != "Constant" and shape is not None and math.prod(d or 1 for d in shape) > FOLDABLE:
            return None
        from onnx.reference import ReferenceEvaluator

        feeds = {i: self.constant(i) for i in node.input if i}
        if any(v is None for v in feeds.values()):
            return None
        try:
            one = helper.make_graph([node], "fold", [helper.make_empty_tensor_value_info(i) for i in feeds], [])
            one.output.extend(helper.make_empty_tensor_value_info(o) for o in node.output if o == name)
            proto = helper.make_model(one, opset_imports=list(self.model.proto.opset_import))
            folded: Any = ReferenceEvaluator(proto).run([name], feeds)
            return np.asarray(folded[0])
        except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, KeyError, DecodeError):
            return None  # an operator that onnx's evaluator lacks, or refuses

    def _read(self, node: NodeProto) -> Quantizer:
        shape = self.shape(node.input[0])
        scale = self.constant(node.input[1])
        zero_name = node.input[2] if len(node.input) > 2 else ""
        source = self.by_output.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and not source.is_q:
            source = None
        if node.op_type == "QuantizeLinear":
            dtype = self.elem(zero_name) or attribute(node, "output_dtype") or TensorProto.UINT8
        else:
            dtype = (source.dtype if source else 0) or self.elem(node.input[0]) or self.elem(zero_name)
        axis = attribute(node, "axis", 1 if self.model.opset >= 13 else 0) or 0
        if axis < 0 and shape is not None:
            axis += len(shape)
        return Quantizer(
            node=node,
            dtype=dtype,
            scale=scale,
            zero=self.constant(zero_name) if zero_name else None,
            computed_zero=bool(zero_name) and not self.is_constant(zero_name),
            axis=axis,
            shape=shape,
            stored=self.is_constant(node.input[0]),
            source=source,
        )

    def _operand(self, node: NodeProto, index: int) -> Operand:
        tensor = node.input[index]
        axis = self._output_axis(node, index)
        name = tensor
        while (dq := self.by_output.get(name)) is None:
            mover = self.model.producer(name)
            if mover is None or mover.op_type not in MOVES:
                break
            if mover.op_type == "Transpose" and axis is not None:
                shape = self.shape(mover.input[0])
                perm = next((list(a.ints) for a in mover.attribute if a.name == "perm"), None)
                perm = perm or (list(range(len(shape)))[::-1] if shape is not None else [])
                axis = perm[axis] if axis < len(perm) else None
            elif mover.op_type not in ("Identity", "MaxPool", "Slice"):
                axis = None
            name = mover.input[0]
        if dq is not None and dq.is_q:
            dq = None
        elem = self.output_type(dq) if dq else self.elem(tensor)
        return Operand(tensor=tensor, dq=dq, constant=self.is_constant(tensor), output_axis=axis, elem=elem)

    def _output_axis(self, node: NodeProto, index: int) -> int | None:
        """The axis of a product's operand that is not summed over: of a weight, its output channels."""
        if node.op_type == "Conv":
            return 0
        if node.op_type == "ConvTranspose":
            return 1
        if node.op_type == "Gemm":
            return int(bool(attribute(node, "transA"))) if index == 0 else 1 - int(bool(attribute(node, "transB")))
        shape = self.shape(node.input[index])
        if shape is None or len(shape) < 2:
            return None
        return len(shape) - 1 - (index == 0)


def dequantized(view: View, q: Quantizer, fits: int | None = None) -> np.ndarray:
    """What a constant DQ stands for, float64: its float constant where it is quantized at run time, else its codes.

    Args:
        view: that `q` comes from.
        q: a DequantizeLinear.
        fits: the axis of a vector of scales whose own axis is of another size.

    Raises:
        ValueError: it is not constant, or its scales fit in no way.
    """
    stored = view.constant((q.source or q).node.input[0])
    if stored is None:
        raise ValueError("not constant")
    if q.source is not None:
        return stored.astype(np.float64)
    scale, zero = _grid(q, stored.shape, fits)
    return np.asarray((stored.astype(np.float64) - zero) * scale)


def spread(values: np.ndarray, axis: int, shape: Sequence[int]) -> np.ndarray:
    """Scales or zero points in a shape that broadcasts with the tensor.

    Raises:
        ValueError: they fit in no way.
    """
    if values.size == 1:
        return values.reshape(())
    if values.ndim == 1:
        if not 0 <= axis < len(shape) or shape[axis] != values.size:
            raise ValueError("no axis of that size")
        return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if values.ndim != len(shape):
        raise ValueError("another rank")
    for i, size in enumerate(shape):
        values = np.repeat(values, -(-size // values.shape[i]), axis=i)[(slice(None),) * i + (slice(size),)]
    return values


def _grid(q: Quantizer, shape: Sequence[int], fits: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a constant, broadcastable; a vector that does not fit its axis is put on axis `fits`.

    Raises:
        ValueError: they cannot be derived.
    """
    if q.scale is None or q.computed_zero or not np.all(np.isfinite(q.scale.astype(np.float64))):
        raise ValueError("no scale")
    axis = q.axis
    if fits is not None and q.scale.ndim == 1 and (not 0 <= axis < len(shape) or shape[axis] != q.scale.size):
        axis = fits
    zero = np.zeros(()) if q.zero is None else q.zero
    scale = spread(q.scale, axis, shape).astype(np.float64)
    zero = zero.astype(np.float64)
    if zero.size not in (1, q.scale.size) and not np.any(zero != zero.flat[0]):
        zero = zero.flat[:1]
    return scale, spread(zero.reshape(q.scale.shape) if zero.size == q.scale.size else zero, axis, shape)


def _inferred(model: Model) -> Model:
    """The model with inferred types and shapes; large tensors are shown to onnx as inputs."""
    shown = without_initializers(model.proto)
    listed = {v.name for v in shown.graph.input}
    for tensor in model.graph.initializer:
        if tensor_bytes(tensor) <= SMALL and not is_external(tensor):
            shown.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            shown.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        return model.replace(onnx.shape_inference.infer_shapes(shown, data_prop=True))
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return model.replace(shown)
