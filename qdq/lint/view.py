"""A model as the rules of `lint` see it: what its quantizers say, and the values of its constants.

Model -> View: types and shapes inferred, constants folded. This module must not judge or change a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from engines.backends.profile import Profile
from engines.core.operators import MOVERS, PRODUCTS
from engines.core.quantizers import Product, QuantizedGraph, Quantizer
from engines.core.shapes import inferred
from qdq.model.model import Model

FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
FOLDABLE = 1 << 16  # elements; a larger computed constant is no scale


class View(QuantizedGraph):
    """The main graph of a model with the values of its constants; the bodies of If, Loop and Scan are not read."""

    multiplying = PRODUCTS
    # The compiler moves a quantizer through these (DequantizeLinear down, QuantizeLinear up). Not through Cast: the
    # float type that a DQ gives is what `scale-type` judges.
    through = MOVERS | {"MaxPool"}

    def __init__(self, model: Model, profile: Profile) -> None:
        """Infer types and shapes, and read every Q and DQ of the main graph; they need not be valid.

        `profile` is of the compiler that the model is judged for.
        """
        self.model, self.profile = model, profile
        self._values: dict[str, np.ndarray | None] = {}
        super().__init__(model.graph.node, inferred(model.proto), model.graph.initializer, opset=model.opset)
        for q in self.quantizers:
            _ = q.zero  # as the scale, before a repair changes what it is made of

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Every Q and DQ, in the order of the graph."""
        return tuple(self.by_output.values())

    @cached_property
    def heads(self) -> tuple[Quantizer, ...]:
        """Quantizers that are not the DQ of a Q with the same parameters: what is wrong is said once, at these."""
        pairs = ((q, q.source and list(q.source.node.input[1:])) for q in self.quantizers)
        return tuple(q for q, params in pairs if params != list(q.node.input[1:]))

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

    def constant(self, name: str) -> np.ndarray | None:
        """The values of a tensor that does not depend on an input; None if it does, or cannot be folded."""
        if name not in self._values:
            self._values[name] = self._fold(name)
        return self._values[name]

    def scale_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a scale; None where it is computed from an input, for then its values are what is wrong."""
        scale = self.constant(name)
        return None if scale is None else scale.shape

    def _fold(self, name: str) -> np.ndarray | None:
        if self.model.is_constant(name):
            return self.model.array(name)
        if not self.is_constant(name):
            return None
        node = self.model.producer(name)
        assert node is not None
        if node.op_type == "DequantizeLinear":  # onnx's evaluator knows it from opset 19 on
            try:
                return dequantized(self, self.read(node)).astype(
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
