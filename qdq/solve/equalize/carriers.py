"""Where the factors of a tensor's channels can be carried by the constants that make it, instead of by a Mul.

Model + tensor -> walk back through channel-wise nodes -> `Carrier`: the constants to multiply, or None.
    x -> LayerNormalization(gain, bias) -> t                gain / s, bias / s: every t_j comes out divided by s_j
    x -> Conv(W, b) -> Relu -> MaxPool -> t                 W / s along its output channels, b / s
    g * (x W + b) -> t                                      W / s, b / s: one factor of a product is enough
Nothing else may read t or anything on the way, and no graph output may be among them: their values change. This module
must not choose factors or change a graph; `solve` and `insert` do what it finds.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438 (normalization); Nagel et al., arXiv 1906.04721, section 4.1 (the
layer before, through what is homogeneous for positive factors).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from engines.core.operators import ARITHMETIC, AXIS_1_NORMS, CONVOLUTIONS, HOMOGENEOUS, LAST_AXIS_NORMS, POOLS
from qdq.core.arrays import Floats, Singles
from qdq.core.formats import FORMATS
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, attribute, weight_axis
from qdq.plan.weighted_node import WeightedNode, by_data

MOST_FACTOR = 64.0  # that a linear node takes: in FP16, what an activation behind it cuts off must not overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryingConstant:
    """One constant that takes the factors.

    Attributes:
        node: that reads it.
        index: of the input.
        trailing: how many axes the node's output has behind the channels, as the constant is aligned with it.
        inverse: the node divides by it.
    """

    node: str
    index: int
    trailing: int
    inverse: bool = False

    def times(self, values: npt.NDArray[np.generic], factor: npt.NDArray[np.floating]) -> npt.NDArray[np.generic]:
        """The constant with (channels,) factors in it; one value for all channels becomes one for each."""
        shaped = factor.astype(np.float64).reshape(-1, *(1,) * self.trailing)
        wide = values.astype(np.float64)
        return np.asarray(wide / shaped if self.inverse else wide * shaped).astype(values.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """All constants that take the factors of one tensor; `linear` is the weighted node among their readers, if any."""

    operands: tuple[CarryingConstant, ...]
    linear: str | None = None


def find(model: Model, tensor: str, channels: int, *, readers: Iterable[WeightedNode]) -> Carrier | None:
    """What can carry the factors of a tensor's channels.

    Args:
        model: the prepared float model.
        tensor: whose channels, on axis 1 for Conv and else on the last one, are to be multiplied.
        channels: how many there are.
        readers: that take the factors back in their weights.

    Returns:
        The constants, or None where something else reads the tensor, or where what makes it has none.
    """
    taking, uses = {node.name: node for node in readers}, model.consumers(tensor)
    if not uses or any(u.index != 0 or u.node.name not in taking for u in uses) or model.is_output(tensor):
        return None
    return _Walk(model, channels, taking[uses[0].node.name].spatial).back(tensor)


def carried(model: Model, nodes: Mapping[str, WeightedNode], divisors: Mapping[str, Singles]) -> dict[str, Carrier]:
    """The constants that can take divisors, tensor by tensor; a Mul does it for the others.

    A weight with one integer scale takes none: its other channels would lose resolution.
    """
    readers = by_data(nodes.values())
    one_scale = {n.name for n in nodes.values() if n.spec.axis is None and FORMATS[n.spec.format].integer}
    found = {}
    for tensor, divisor in divisors.items():
        carrier = find(model, tensor, divisor.size, readers=readers[tensor])
        narrow = divisor.min() * MOST_FACTOR < 1
        if carrier and (carrier.linear is None or not (carrier.linear in one_scale or narrow)):
            found[tensor] = carrier
    return found


def factors(carriers: Mapping[str, Carrier], divisors: Mapping[str, Singles]) -> dict[str, Floats]:
    """Weighted node -> (channels,) what its output is multiplied by where it carries divisors."""
    return {c.linear: 1 / divisors[t].astype(np.float64) for t, c in carriers.items() if c.linear is not None}


def scaled(
    values: npt.NDArray[np.floating],
    reader: WeightedNode,
    divisor: Singles | None,
    factor: Floats | None,
) -> npt.NDArray[np.floating]:
    """A weight multiplied by a (input channels of all groups,) `divisor` and a (output channels,) `factor`."""
    if divisor is not None:
        groups = reader.groups
        if groups > 1:  # each group of output channels reads input channels of its own
            each = np.repeat(divisor.reshape(groups, -1), values.shape[0] // groups, axis=0)
            shaped = each.reshape(*each.shape, *(1,) * (values.ndim - 2))
        else:
            shaped = divisor.reshape([-1 if i == reader.input_axis else 1 for i in range(values.ndim)])
        values = _times(values, shaped)
    if factor is not None:
        shape = [-1 if i == reader.output_axis else 1 for i in range(values.ndim)]
        values = _times(values, factor.reshape(shape))
    return values


def _times(values: npt.NDArray[np.floating], by: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The product, computed in the wider type and rounded to that of the values; makes one copy, and no wider one."""
    return np.asarray(np.multiply(values, by, out=np.empty_like(values), casting="unsafe"))


class _Walk:
    """The way back from one tensor."""

    def __init__(self, model: Model, channels: int, trailing: int) -> None:
        self._model, self._channels, self._trailing = model, channels, trailing

    def back(self, tensor: str) -> Carrier | None:
        """The carrier of a tensor that may be changed."""
        node = self._model.producer(tensor)
        if node is None or node.domain not in ("", "ai.onnx") or tensor != node.output[0]:
            return None
        if node.op_type in HOMOGENEOUS or (node.op_type in POOLS and self._axis_1(node.input[0])):
            alone = all(not self._model.consumers(name) for name in node.output[1:])
            return self._inner(node.input[0]) if alone else None
        if node.op_type in WEIGHTED:
            return self._linear(node)
        if node.op_type in LAST_AXIS_NORMS:
            shape = self._shape(node.input[0])
            last = self._trailing == 0 and attribute(node, "axis", -1) in (-1, len(shape) - 1 if shape else -1)
            return self._affine(node) if last else None
        if node.op_type in AXIS_1_NORMS:
            fits = self._axis_1(node.input[0]) and not attribute(node, "training_mode", 0)
            return self._affine(node) if fits else None
        if node.op_type in ARITHMETIC:
            return self._pointwise(node)
        return None

    def _inner(self, tensor: str) -> Carrier | None:
        """The same of a tensor on the way, which must have all channels and no other reader."""
        use, shape = self._model.only_use(tensor), self._shape(tensor)
        alone = use is not None and use.index >= 0
        whole = len(shape) > self._trailing and shape[-1 - self._trailing] == self._channels
        return self.back(tensor) if alone and whole else None

    def _shape(self, tensor: str) -> tuple[int | str | None, ...]:
        info = self._model.info(tensor)
        return info.shape or () if info is not None else ()

    def _axis_1(self, tensor: str) -> bool:
        """Whether the channels lie on axis 1."""
        return len(self._shape(tensor)) == self._trailing + 2

    def _affine(self, node: NodeProto) -> Carrier | None:
        """Gain and bias of a normalization."""
        names = [name for name in node.input[1:3] if name]
        vectors = all(self._model.is_constant(n) and self._shape(n) == (self._channels,) for n in names)
        operands = (CarryingConstant(node=node.name, index=1 + i, trailing=0) for i in range(len(names)))
        return Carrier(operands=tuple(operands)) if names and vectors else None

    def _linear(self, node: NodeProto) -> Carrier | None:
        """Output channels of a weight that nothing else reads, and the bias."""
        bias = node.input[2] if len(node.input) > 2 else ""
        constant = self._model.is_constant(node.input[1]) and (not bias or self._model.is_constant(bias))
        if not constant or len(self._model.consumers(node.input[1])) > 1:
            return None
        shape = tuple(self._model.initializers[node.input[1]].dims)
        outputs = weight_axis(node, len(shape)) if len(shape) > 1 else 0
        spatial = len(shape) - 2 if node.op_type in CONVOLUTIONS else 0
        if len(shape) < 2 or spatial != self._trailing or shape[outputs] != self._channels:
            return None
        weight = CarryingConstant(node=node.name, index=1, trailing=len(shape) - outputs - 1)
        added = (CarryingConstant(node=node.name, index=2, trailing=0),) if bias else ()
        return Carrier(operands=(weight, *added), linear=node.name)

    def _pointwise(self, node: NodeProto) -> Carrier | None:
        """A constant per channel; of a sum the other side too, of a product with none any one side."""
        constant = [index for index in (0, 1) if self._model.is_constant(node.input[index])]
        if not constant:
            if node.input[0] == node.input[1]:  # a square would take the factor twice
                return None
            sides = {"Mul": (1, 0), "Div": (0,)}.get(node.op_type, ())
            return next((found for found in (self._inner(node.input[i]) for i in sides) if found is not None), None)
        index = constant[0]
        if len(constant) > 1 or not self._per_channel(node, index) or (node.op_type == "Div" and index == 0):
            return None
        own = CarryingConstant(node=node.name, index=index, trailing=self._trailing, inverse=node.op_type == "Div")
        if node.op_type in ("Mul", "Div"):
            return Carrier(operands=(own,))
        rest = self._inner(node.input[1 - index])
        return Carrier(operands=(own, *rest.operands), linear=rest.linear) if rest is not None else None

    def _per_channel(self, node: NodeProto, index: int) -> bool:
        """Whether a constant differs between channels at most."""
        shape = tuple(self._model.initializers[node.input[index]].dims)
        place = len(shape) - 1 - self._trailing
        within = all(size == 1 or (axis == place and size == self._channels) for axis, size in enumerate(shape))
        return within and len(shape) <= len(self._shape(node.output[0]))
