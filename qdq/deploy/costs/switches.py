"""A Q/DQ model in which each quantized tensor can be let through in float, by a boolean input of its own.

Q/DQ model + float weights -> a Where behind each DequantizeLinear, beside the float tensor -> `Switched`.
Must not run the result, nor change the model given.

A weight's float values are those of the float model under its name, each channel times the factor that brings it
nearest to the quantized values (equalization). Where its data are shifted by c, the bias holds c times the sum of the
quantized weight, so the float weight comes with c times the difference of the sums.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engines.verify.report import TensorCost
from qdq.assemble.held_out import in_its_types
from qdq.core.formats import FORMATS
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.model.nodes import FP4_QUANTIZE, WEIGHTED, Names, attribute, factor, input_axis, weight_axis

# Energy of the error over that of a weight, beyond which the float weight of that name is not what was quantized:
# three to ten times what rounding to 8 and to 4 bits leaves.
NEAR = {8: 0.01, 4: 0.1}
TURNS = 3  # of the fit of factors: inputs, then outputs
ALIKE = 0.8  # squared cosine of a channel and its codes, below which no factor is taken from them
_FOUR_BITS = {f.onnx_type for f in FORMATS.values() if f.bits == 4}
_CODES = re.compile(r"(.+?)_quantized(?:_\w+)?")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FloatWeight:
    """A weight that was quantized.

    Attributes:
        name: in the float model.
        values: float32, in the shape of the codes.
        missing: float32, what the output of its node lacks with these values, by channels that broadcast; None for 0.
    """

    name: str
    values: np.ndarray
    missing: np.ndarray | None


@dataclass(slots=True, kw_only=True)
class Switched:
    """The model; its tensors and their switches in one order, and for each the energy of its error and its own."""

    proto: ModelProto
    tensors: list[TensorCost] = field(default_factory=list)
    switches: list[str] = field(default_factory=list)
    noises: list[str] = field(default_factory=list)
    signals: list[str] = field(default_factory=list)
    untold: int = 0  # quantized weights whose float values are not known


def float_weights(quantized: Model, float_model: Model, sample: Sample) -> dict[str, FloatWeight]:
    """The weights whose float values can be told, by the output of their last DequantizeLinear.

    Raises:
        InputError: ONNX Runtime refuses the model.
    """
    found = {}
    for node in quantized.graph.node:
        match = _CODES.fullmatch(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if match and quantized.is_constant(node.input[0]) and float_model.is_constant(match[1]):
            found[_last(node, quantized)] = (match[1], quantized.initializers[node.input[0]].data_type)
    near: dict[str, FloatWeight] = {}
    made = in_its_types(quantized, list(found))(sample) if found else {}
    for output, (name, kind) in found.items():
        use = quantized.only_use(output)
        values, rounded = (np.asarray(a, np.float64) for a in (float_model.array(name), made[output]))
        grows = values.ndim == rounded.ndim and all(a <= b for a, b in zip(values.shape, rounded.shape, strict=True))
        if use is None or use.index != 1 or use.node.op_type not in WEIGHTED or not grows or values.ndim < 2:
            continue
        values = _fitted(values, rounded, use.node)
        error = float(((values - rounded) ** 2).sum())
        if error <= NEAR[4 if kind in _FOUR_BITS else 8] * float((values**2).sum()):
            missing = _missing(values - rounded, use.node, quantized)
            near[output] = FloatWeight(name=name, values=values.astype(np.float32), missing=missing)
    return near


def _last(node: NodeProto, quantized: Model) -> str:
    """The tensor that the product reads: of a weight in two levels, behind the second pair."""
    use = quantized.only_use(node.output[0])
    again = quantized.only_use(use.node.output[0]) if use is not None and use.node.op_type == "QuantizeLinear" else None
    last: str = (node if again is None or again.node.op_type != "DequantizeLinear" else again.node).output[0]
    return last


def _fitted(values: np.ndarray, rounded: np.ndarray, node: NodeProto) -> np.ndarray:
    """A weight, padded with zeros to the other's shape, with each input and output channel times a factor.

    The factors bring it nearest to the other: least squares for the inputs, then the outputs, in turn. A channel that
    rounding has left unlike itself keeps its values.
    """
    values = np.pad(values, [(0, there - here) for here, there in zip(values.shape, rounded.shape, strict=True)])
    groups = attribute(node, "group", 1) if node.op_type == "Conv" else 1
    axis = input_axis(node, values.ndim)
    w, q = (np.moveaxis(a, axis, 0) for a in (values, rounded))  # (inputs, outputs, ...)
    whole = w.shape
    shape = (w.shape[0], groups, w.shape[1] // groups, -1)
    w, q = w.reshape(shape), q.reshape(shape)
    for axes in ((2, 3), (0, 3)) * TURNS:
        of_w, of_q, both = ((a * b).sum(axes, keepdims=True) for a, b in ((w, w), (q, q), (w, q)))
        alike = both * both > ALIKE * of_w * of_q
        w = w * np.where(alike, both / np.where(alike, of_w, 1), 1)
    return np.moveaxis(w.reshape(whole), 0, axis)


def _missing(difference: np.ndarray, node: NodeProto, quantized: Model) -> np.ndarray | None:
    """c times the sums of a difference of weights, where the node's data are shifted by c."""
    codes = quantized.producer(node.input[0])
    pair = quantized.producer(codes.input[0]) if codes is not None and codes.op_type == "DequantizeLinear" else None
    shift = quantized.producer(pair.input[0]) if pair is not None and pair.op_type == "QuantizeLinear" else None
    if shift is None or shift.op_type != "Sub" or not quantized.is_constant(shift.input[1]):
        return None
    offset = quantized.array(shift.input[1]).astype(np.float64)
    if offset.size != 1:
        return None
    outputs = weight_axis(node, difference.ndim)
    sums = difference.sum(tuple(i for i in range(difference.ndim) if i != outputs)) * float(offset.reshape(()))
    shape = (-1, *(1,) * (difference.ndim - 2)) if node.op_type == "Conv" else (-1,)
    return np.asarray(sums * factor(node, "alpha")).reshape(shape).astype(np.float32)


def switched(quantized: Model, weights: Mapping[str, FloatWeight]) -> Switched:
    """Rename what a DequantizeLinear makes, and choose between that and the float tensor under the old name."""
    proto = ModelProto()
    proto.CopyFrom(quantized.proto)
    made, fresh = Switched(proto=proto), Names(quantized.names()).fresh
    nodes, late = list[NodeProto](), dict[str, tuple[str, np.ndarray]]()

    def choice(switch: str, one: str, other: str, output: str) -> str:
        """The first of two tensors where the switch is on; returns the other in its type."""
        if quantized.opset >= 15:
            nodes.append(helper.make_node("CastLike", [other, one], [like := fresh(f"{output}_like")]))
            other = like
        nodes.append(helper.make_node("Where", [switch, one, other], [output]))
        return other

    for node in quantized.graph.node:
        nodes.append(node)
        if node.op_type in WEIGHTED and node.input[1] in late:  # its weight comes with what is missing
            switch, missing = late[node.input[1]]
            inner, added, constant = (fresh(f"{node.output[0]}_{what}") for what in ("bare", "more", "missing"))
            proto.graph.initializer.append(numpy_helper.from_array(missing, constant))
            nodes[-1] = _renamed(node, inner)
            nodes.append(helper.make_node("CastLike", [constant, inner], [like := fresh(f"{constant}_like")]))
            nodes.append(helper.make_node("Sub", [inner, inner], [none := fresh(f"{inner}_zero")]))
            nodes.append(helper.make_node("Where", [switch, none, like], [added]))
            nodes.append(helper.make_node("Add", [inner, added], [node.output[0]]))
        if node.op_type != "DequantizeLinear" or not quantized.consumers(node.output[0]):
            continue
        output, source = node.output[0], quantized_data(node, quantized)
        weight = weights.get(output)
        if source is None and (weight is None or (weight.missing is not None and quantized.opset < 15)):
            made.untold += _is_weight(node, quantized)
            continue
        switch, inner = fresh(f"{output}_on"), fresh(f"{output}_rounded")
        nodes[-1] = _renamed(node, inner)
        if source is None and weight is not None:
            given = fresh(weight.name)
            proto.graph.initializer.append(numpy_helper.from_array(weight.values, given))
            if weight.missing is not None:
                late[output] = switch, weight.missing
        else:
            given = source or ""
        given = choice(switch, inner, given, output)
        proto.graph.input.append(helper.make_tensor_value_info(switch, TensorProto.BOOL, []))
        x, y, error, noise, signal = (fresh(f"{inner}_{what}") for what in ("x", "y", "error", "noise", "signal"))
        nodes += [
            helper.make_node("Cast", [given], [x], to=TensorProto.DOUBLE),
            helper.make_node("Cast", [inner], [y], to=TensorProto.DOUBLE),
            helper.make_node("Sub", [x, y], [error]),
            helper.make_node("ReduceSumSquare", [error], [noise], keepdims=0),
            helper.make_node("ReduceSumSquare", [x], [signal], keepdims=0),
        ]
        readers = tuple(dict.fromkeys(use.node.name for use in quantized.consumers(output)))
        role, name = ("data", source) if source else ("weight", weight.name if weight else "")
        made.tensors.append(TensorCost(tensor=name or "", role=role, nodes=readers, sqnr_db=math.inf))
        made.switches.append(switch)
        made.noises.append(noise)
        made.signals.append(signal)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return made


def _renamed(node: NodeProto, output: str) -> NodeProto:
    """A copy of a node with another first output."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.output[0] = output
    return copy


def quantized_data(node: NodeProto, quantized: Model) -> str | None:
    """The computed tensor that a DequantizeLinear stands for; None of a constant, or a part such as a scale."""
    maker = quantized.producer(node.input[0])
    if maker is None or maker.op_type not in ("QuantizeLinear", FP4_QUANTIZE) or node.input[0] != maker.output[0]:
        return None
    return None if _stored(maker.input[0], quantized) else str(maker.input[0])


def _stored(tensor: str, quantized: Model) -> bool:
    """Whether a tensor is a constant, quantized or not."""
    node = quantized.producer(tensor)
    if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return quantized.is_constant(tensor)
    return _stored(node.input[0], quantized)


def _is_weight(node: NodeProto, quantized: Model) -> bool:
    """Whether what it makes goes into a product as a constant, rather than into another quantizer."""
    readers = [use.node.op_type for use in quantized.consumers(node.output[0])]
    return _stored(node.input[0], quantized) and not {"QuantizeLinear", "DequantizeLinear"} & set(readers)
