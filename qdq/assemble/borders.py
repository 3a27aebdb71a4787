"""What is added around the data of a node in front of its quantizer, and the writer that adds it.

A padded convolution, channels in fours and the last block of a weight need zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.backends.profile import Profile
from engines.core.operators import MOVERS
from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams
from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.model.weight_store import WeightStore
from qdq.model.writer import GraphWriter
from qdq.plan.weighted_node import WeightedNode

CHANNEL_MULTIPLE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """Zeros before and after each spatial axis, and zero channels behind each group."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    channels: int
    groups: int
    spatial: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Zeros behind one axis of the data of a product, which fill up the last block of its weight."""

    axis: int
    missing: int


def missing_channels(model: Model, node: WeightedNode, profile: Profile) -> int:
    """Zero channels that bring each group of a Conv's input to a multiple of CHANNEL_MULTIPLE, where that pays."""
    if not profile.padding or node.window is None or (node.groups > 1 and model.sizes(node.data, 2) is None):
        return 0
    return -node.shape[1] % CHANNEL_MULTIPLE


def border(model: Model, node: WeightedNode, pads: tuple[int, ...], channels: int) -> Border | None:
    """What is padded in front of a Conv; None for nothing."""
    if not any(pads) and not channels:
        return None
    groups, axes = node.groups if channels else 1, node.spatial
    spatial = model.sizes(node.data, 2) or () if groups > 1 else ()
    return Border(before=pads[:axes], after=pads[axes:], channels=channels, groups=groups, spatial=spatial)


def rows(node: WeightedNode, params: QParams) -> Rows | None:
    """What the last block of a product's weight, quantized with `params`, lacks; None for nothing."""
    if params.block is None or params.length is None or not (missing := -params.length % params.block):
        return None
    return Rows(axis=-2 if node.data_transposed else -1, missing=missing)


def reflected(model: Model, tensor: str) -> bool:
    """Whether a tensor of a body is padded by reflection and then moved or multiplied at most.

    TensorRT-RTX 1.7.1 fails on a Q behind that ("CHECK(append_to->parent() == this)"), but not behind an Add of 0.
    """
    maker = model.producer(tensor) if tensor in model.inner_tensors else None
    while maker is not None and maker.op_type in MOVERS | {"Div", "Mul"}:
        maker = model.producer(maker.input[0])
    return maker is not None and maker.op_type == "Pad" and attribute_value(maker, "mode", b"") == b"reflect"


class OperandWriter(GraphWriter):
    """A writer that knows what it has made, puts zeros around tensors, and Q and DQ of one scale behind them."""

    def __init__(self, model: Model, store: WeightStore | None) -> None:
        """Nothing is made yet."""
        super().__init__(model, store)
        self._made: dict[tuple[object, ...], str] = {}

    def _padded(self, tensor: str, source: str, around: Border | Rows | None) -> str:
        """A tensor, or `source` that it became, with zeros around it; itself where there are none."""
        if around is None:
            return source
        if isinstance(around, Rows):
            key = (source, around, "padded")  # `_activation` has (tensor, around) for its own
            if key not in self._made:
                pads = self._constant(f"{tensor}_pads", np.array([0, around.missing], dtype=np.int64))
                axes = self._constant(f"{tensor}_pad_axes", np.array([around.axis], dtype=np.int64))
                self._made[key] = self._append("Pad", (source, pads, "", axes), f"{tensor}_Pad")
            return self._made[key]
        front = [0] if around.groups == 1 else [0, 0]
        amounts = [*front, 0, *around.before, *front, around.channels, *around.after]
        pads = self._constant(f"{tensor}_pads", np.array(amounts, dtype=np.int64))
        if around.groups == 1:
            return self._append("Pad", (source, pads), f"{tensor}_Pad")
        info = self._model.info(tensor)
        assert info is not None and info.shape is not None and isinstance(info.shape[1], int)
        each = info.shape[1] // around.groups
        apart = np.array([0, around.groups, each, *around.spatial], dtype=np.int64)
        sizes = [b + s + a for b, s, a in zip(around.before, around.spatial, around.after, strict=True)]
        joined = np.array([0, around.groups * (each + around.channels), *sizes], dtype=np.int64)
        source = self._append("Reshape", (source, self._constant(f"{tensor}_groups", apart)), f"{tensor}_Reshape")
        source = self._append("Pad", (source, pads), f"{tensor}_Pad")
        return self._append("Reshape", (source, self._constant(f"{tensor}_joined", joined)), f"{source}_Reshape")

    def _coded(self, tensor: str, params: QParams, like: str) -> str:
        """A tensor of the Q/DQ model behind Q and DQ of one symmetric scale, of the type of a tensor of the model."""
        scale = self._constant(f"{tensor}_scale", params.scale, self._model.dtype(like))
        zero = self._constant(f"{tensor}_zero_point", np.zeros((), dtype=FORMATS[params.format].dtype))
        codes = self._append("QuantizeLinear", (tensor, scale, zero), f"{tensor}_QuantizeLinear")
        return self._append("DequantizeLinear", (codes, scale, zero), f"{tensor}_DequantizeLinear")
