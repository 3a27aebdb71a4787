"""Keep biases exact where the product cancels them, when all is rounded to FP16 or BF16: above all behind shifts.

`insert` subtracts an offset c before Q and adds c * sum(W) to the bias behind the product. Rounded one by one, the
scale s, the weights' scales and that bias no longer cancel: up to 2^-12 * 128 = 0.03 steps (BF16: 0.25), the same for
every input, times sum(W). Here the bias is computed anew, from what will be stored, so that zero stays exactly zero:

    k = clip(round(-c / s))           the code of zero; Sub and Q stay FP32 (`rules`, rule "shift")
    bias' = bias - c * sum(W) - k * s' * sum(W')        s' and W' as DQ stores them

Each weight is rounded too, and their sum with them: of the scales of the low type within half an INT8 step (`steady`)
each channel gets the one by which these roundings add up to least; an integer kernel knows none of them, and one scale
for all channels (`one_scale`) causes none.

The bias is written as two numbers of the low type: one in the product's bias, the remainder in a Sub behind it, which
TensorRT-RTX fuses (ONNX Runtime would fold an Add back into the bias). Where the compiler fuses it, a float product
whose bias loses more by rounding than its weight gets the same: a folded BatchNormalization often leaves a large bias
that the product cancels.
`model.shift_correction` cannot do it: it knows the exact offset only. This module must not touch nodes that stay FP32.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from qdq.assemble.precision.types import finfo, fits
from qdq.model.external import release
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, Names, attribute, factor, weight_axis
from qdq.passes.rewrites.edit import altered

Floats = npt.NDArray[np.float64]
STEPS = 4  # values of the low type next to a scale that are looked at, each way
NEAR = 2.0**-9  # by which a scale may differ at most: a quarter of a step at the largest code


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shift:
    """Offset of a shifted tensor, and the value that zero gets after rounding: -c in exact arithmetic."""

    offset: float
    zero: float


def compensate(
    model: Model, low: str, kept: Collection[str], *, split_biases: bool, one_scale: Collection[str] = ()
) -> Model:
    """The model, still in float32, with biases behind shifted tensors that are exact in the low type.

    All tensors are typed; Q/DQ nodes are those of `insert`, others are left alone. `low` is 'float16' or 'bfloat16';
    the nodes named in `kept` stay FP32, the weights of those in `one_scale` will not be rounded. Biases of float
    products are left alone without `split_biases`.
    """
    draft = _Draft(model, low, one_scale)
    for node in model.graph.node:
        copy = altered(node)
        draft.nodes.append(copy)
        shift = None if node.op_type not in WEIGHTED or node.name in kept else shift_of(model, node, low)
        if shift is not None:
            draft.shifted(node, copy, shift)
        elif split_biases and node.op_type in ("Conv", "Gemm") and node.name not in kept and draft.coarse(node):
            draft.split(copy, np.zeros(1), at=2)
        elif node.name in draft.pending:
            draft.split(copy, draft.pending.pop(node.name), at=[model.is_constant(t) for t in node.input].index(True))
    return draft.finish()


def _exact_sum(codes: npt.NDArray[np.generic], axis: tuple[int, ...], *, keepdims: bool = False) -> Floats:
    """Sum of codes, float64; of INT8 without a copy as large as eight times the codes."""
    wide = codes if codes.dtype.kind in "iu" else codes.astype(np.float64)
    return np.asarray(wide.sum(axis=axis, dtype=np.float64, keepdims=keepdims))


def rounded(values: npt.ArrayLike, low: str) -> Floats:
    """Values as the low type stores them: infinite where it cannot hold them."""
    dtype = np.dtype(np.float16) if low == "float16" else np.dtype(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.float32).astype(dtype).astype(np.float64)


def shift_of(model: Model, node: NodeProto, low: str) -> _Shift | None:
    """The shift of the tensor that a product reads, None where there is none."""
    dequantize = model.producer(node.input[0])
    quantize = model.producer(dequantize.input[0]) if dequantize is not None else None
    sub = model.producer(quantize.input[0]) if quantize is not None else None
    found = [n.op_type if n is not None else "" for n in (dequantize, quantize, sub)]
    if found != ["DequantizeLinear", "QuantizeLinear", "Sub"] or dequantize is None or sub is None:
        return None
    if not (model.is_constant(sub.input[1]) and model.is_constant(dequantize.input[1])):
        return None
    offset, scale = model.array(sub.input[1]), model.array(dequantize.input[1])
    if offset.size != 1 or scale.size != 1:
        return None
    code = np.clip(np.rint(-float(offset.item()) / float(scale.item())), -128, 127)
    return _Shift(offset=float(offset.item()), zero=float(code) * rounded(scale, low).item())


def steadied(model: Model, node: NodeProto, low: str) -> Floats | None:
    """The scales to store of a product's INT8 weight, see `steady`; None where it has none per output for itself."""
    dequantize = model.producer(node.input[1])
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or attribute(dequantize, "block_size", 0):
        return None
    codes, scale = dequantize.input[:2]
    mine = len(model.consumers(scale)) == 1 and model.only_use(dequantize.output[0]) is not None
    if not (mine and model.is_constant(codes) and model.is_constant(scale)) or model.dtype(codes) != "int8":
        return None
    values, scales = model.array(codes), model.array(scale).astype(np.float64)
    outputs = weight_axis(node, values.ndim)
    if scales.shape != (values.shape[outputs],) or attribute(dequantize, "axis", 1) % values.ndim != outputs:
        return None
    found = steady(np.moveaxis(values, outputs, 0).reshape(scales.size, -1), scales, low)
    release(values)
    return found


def steady(codes: npt.NDArray[np.generic], scales: Floats, low: str) -> Floats:
    """Of each channel the scale in the low type by which the roundings of its dequantized weights add up to least.

    Args:
        codes: (channels, weights) int8.
        scales: (channels,), positive.
        low: 'float16' or 'bfloat16'.
    """
    nearest = rounded(scales, low)
    if not fits(scales, low):
        return nearest
    counts = np.array([np.bincount(row.astype(np.int16) + 128, minlength=256) for row in codes], dtype=np.float64)
    step = np.exp2(np.floor(np.log2(nearest)) - finfo(low).nmant)
    best, least = nearest, _lost(counts, nearest, low)
    for index in sorted(range(-STEPS, STEPS + 1), key=abs)[1:]:
        other = rounded(nearest + index * step, low)
        lost = np.where(np.abs(other - scales) <= NEAR * scales, _lost(counts, other, low), np.inf)
        best, least = np.where(lost < least, other, best), np.minimum(lost, least)
    return best


def _lost(counts: Floats, scales: Floats, low: str) -> Floats:
    """(channels,) the magnitude of what rounding dequantized codes, -128 to 127 so many times, adds to their sum."""
    exact = np.arange(-128, 128) * scales[:, np.newaxis]
    return np.asarray(np.abs((counts * (rounded(exact, low) - exact)).sum(axis=1)))


class _Draft:
    """The nodes in the making, the new constants, and corrections that wait for the Add behind a product."""

    def __init__(self, model: Model, low: str, one_scale: Collection[str]) -> None:
        self._model, self._low, self._one_scale = model, low, one_scale
        self.nodes: list[NodeProto] = []
        self._scales: dict[str, npt.NDArray[np.float32]] = {}
        self.pending: dict[str, Floats] = {}
        self._constants: dict[str, npt.NDArray[np.float32]] = {}
        self._renamed: dict[str, str] = {}
        self._name = Names(model.names()).fresh

    def shifted(self, node: NodeProto, copy: NodeProto, shift: _Shift) -> None:
        """Correct the constant bias of a product, or that of the only Add behind it."""
        sums = self._sums(node)
        if sums is None:
            return
        delta = -shift.offset * sums[0] - shift.zero * sums[1]
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias and self._model.is_constant(bias) and node.op_type != "MatMul":
            self._keep(node, sums[2])
            self.split(copy, delta, at=2)
            return
        use = self._model.only_use(node.output[0])
        constants = list(filter(self._model.is_constant, use.node.input)) if use is not None else []
        if use is not None and use.node.op_type == "Add" and len(constants) == 1:
            values = self._model.array(constants[0])
            if node.op_type == "Conv" and values.ndim > delta.ndim:
                delta = delta.reshape(-1, *[1] * (values.ndim - 1))
            if np.broadcast_shapes(delta.shape, values.shape) == values.shape:
                self._keep(node, sums[2])
                self.pending[use.node.name] = delta

    def _keep(self, node: NodeProto, scales: Floats | None) -> None:
        """Store other scales of a product's weight."""
        if scales is not None:
            self._scales[self._weight(node)[1]] = scales.astype(np.float32)

    def coarse(self, node: NodeProto) -> bool:
        """Whether rounding a float product's bias costs as much as rounding its weight, at inputs around 1/4."""
        if len(node.input) < 3 or not all(self._model.is_constant(t) for t in node.input[1:]):
            return False
        lost = [a - rounded(a, self._low) for a in (self._model.array(t).astype(np.float64) for t in node.input[1:])]
        return bool(np.linalg.norm(lost[1]) > 0.25 * np.linalg.norm(lost[0]))

    def split(self, node: NodeProto, delta: Floats, *, at: int) -> None:
        """Add delta to the constant operand `at`, as its rounded value and a Sub of the remainder behind the node."""
        exact = self._model.array(node.input[at]).astype(np.float64) + delta
        first = rounded(exact, self._low)
        rest = rounded(first - exact, self._low)
        if not np.isfinite(first).all():
            return
        node.input[at] = self._constant(f"{node.name}_rounded_bias", first)
        if not rest.any():
            return
        if node.op_type == "Conv":
            rank = self._model.rank(node.input[1])
            assert rank is not None  # the weight is constant or dequantized from a constant
            rest = rest.reshape(-1, *[1] * (rank - 2))
        output, name = node.output[0], self._name(f"{node.name}_remainder_Sub")
        node.output[0] = self._name(f"{output}_rounded")
        self._renamed[node.output[0]] = output
        remainder = self._constant(f"{node.name}_remainder", rest)
        self.nodes.append(helper.make_node("Sub", [node.output[0], remainder], [output], name=name))

    def finish(self) -> Model:
        """The model with new nodes and constants; all tensors typed."""
        proto = ModelProto()
        proto.CopyFrom(self._model.proto)
        graph = proto.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        for index, tensor in enumerate(graph.initializer):
            if tensor.name in self._scales:
                graph.initializer[index].CopyFrom(numpy_helper.from_array(self._scales[tensor.name], tensor.name))
        graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in self._constants.items())
        known = {v.name: v for v in (*graph.value_info, *graph.output)}
        for name, source in self._renamed.items():
            graph.value_info.append(known[source])
            graph.value_info[-1].name = name
        return self._model.replace(proto)

    def _weight(self, node: NodeProto) -> tuple[str, str, int]:
        """Codes, scale and axis of a product's weight; two empty names where it is not dequantized constants."""
        producer = self._model.producer(node.input[1])
        dequantizes = producer is not None and producer.op_type == "DequantizeLinear"
        if producer is None or not dequantizes or not all(map(self._model.is_constant, producer.input[:2])):
            return "", "", 0
        return producer.input[0], producer.input[1], attribute(producer, "axis", 1)

    def _sums(self, node: NodeProto) -> tuple[Floats, Floats, Floats | None] | None:
        """Sum of the weight per output channel, with its scales as they are and as stored; scales to store instead."""
        codes, scale, axis = self._weight(node)
        if not codes or (node.op_type == "Conv" and axis != 0):
            return None
        values, scales = self._model.array(codes), self._model.array(scale).astype(np.float64)
        if scales.ndim > 1 or (node.op_type == "Gemm" and attribute(node, "transA", 0)):
            return None
        channels = {"Conv": 0, "Gemm": 0 if attribute(node, "transB", 0) else 1}.get(node.op_type, values.ndim - 1)
        product = node.op_type == "MatMul"
        summed = (-2,) if product else tuple(i for i in range(values.ndim) if i != channels)
        if scales.size > 1 and axis % values.ndim != channels:
            return None
        total = _exact_sum(values, axis=summed, keepdims=product and values.ndim > 2)
        release(values)
        own = None if node.name in self._one_scale else steadied(self._model, node, self._low)
        stored = rounded(scales, self._low) if own is None else own
        alpha = factor(node, "alpha")
        return total * scales * alpha, total * stored * alpha, own

    def _constant(self, wanted: str, values: Floats) -> str:
        name = self._name(wanted)
        self._constants[name] = values.astype(np.float32)
        return name
