"""Nodes that a low float type would make wrong though nothing overflows: positions, and the angles of sines.

Model, ranges -> nodes from where large whole numbers come to where their exact value matters. FP16 holds all whole
numbers up to 2048, BF16 up to 256; and the sine of a large angle keeps none of its digits where the angle is rounded.
This module must not know why other nodes stay FP32.

| from | to |
|---|---|
| a Cast from whole numbers, a Range, what was measured beyond the type's whole numbers | Sin, Floor, ==, an index |
| the product, or what else is no pointwise step, that makes an angle measured as large | Sin, Cos, Tan |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from onnx import NodeProto

from engines.core.operators import ARITHMETIC, COMPARISONS, CONTRACTIONS, CURVES, PICKERS, RAMPS, family
from qdq.assemble.precision.types import finfo
from qdq.model.model import Model

ANGLE_ERROR = 2.0**-7  # of a rounded angle, at most: -42 dB of a sine
MOVES = PICKERS | RAMPS | family("Compress Dropout Max Min ReduceMax ReduceMin ReverseSequence ScatterElements Trilu")
STEEP = family("Ceil Cos Floor Mod Round Sin Tan")  # a small error of what they read may become a large one
POINTWISE = CURVES | ARITHMETIC | STEEP | family("Atan IsInf IsNaN Mean Sign Sum ThresholdedRelu")
PERIODIC = family("Cos Sin Tan")
_EXACT = COMPARISONS | STEEP | {"GridSample"}
_WHOLE = ("int16", "uint16", "int32", "uint32", "int64", "uint64")


class Positions:
    """Reasons by node."""

    def __init__(self, model: Model, low: str, ranges: Mapping[str, float]) -> None:
        """Take a model, all tensors typed, and the largest magnitudes of some tensors."""
        self._model, self._ranges = model, ranges
        info = finfo(low)
        self._whole = 2.0 ** (info.nmant + 1)
        angle = ANGLE_ERROR / float(info.eps) * 2
        sources = {n.name for n in model.graph.node if self._makes_whole(n)}
        ends = {n.name for n in model.graph.node if n.op_type in _EXACT or self._ends_whole(n)}
        exact = self._spread(sources, self._readers) & self._spread(ends, self._makers)
        why = f"it computes positions, and {low} holds all whole numbers only up to {self._whole:.0f}"
        self.reasons = dict.fromkeys(sorted(exact), why)
        turning = [n for n in model.graph.node if n.op_type in PERIODIC and self._reach(n.input) > angle]
        for name in sorted(self._spread({n.name for n in turning}, self._makers, products=True)):
            self.reasons.setdefault(name, f"it computes angles beyond {angle:.0f}, of which {low} keeps too few digits")

    def _reach(self, tensors: Iterable[str]) -> float:
        return max((self._ranges.get(name, 0.0) for name in tensors if self._is_float(name)), default=0.0)

    def _is_float(self, tensor: str) -> bool:
        info = self._model.info(tensor)
        return bool(tensor) and info is not None and info.dtype == "float32"

    def _readers(self, node: NodeProto) -> Iterator[NodeProto]:
        return (u.node for t in node.output for u in self._model.consumers(t) if u.index >= 0)

    def _makers(self, node: NodeProto) -> Iterator[NodeProto]:
        return filter(None, map(self._model.producer, node.input))

    def _makes_whole(self, node: NodeProto) -> bool:
        fed = [t for t in node.input if t and self._model.producer(t) is None]
        if self._reach([*node.output, *fed]) > self._whole:
            return True
        if not any(self._is_float(t) for t in node.output):
            return False
        info = self._model.info(node.input[0]) if node.input else None
        return node.op_type == "Range" or (node.op_type == "Cast" and info is not None and info.dtype in _WHOLE)

    def _ends_whole(self, node: NodeProto) -> bool:
        info = self._model.info(node.output[0]) if node.op_type == "Cast" else None
        return info is not None and info.dtype in _WHOLE and self._is_float(node.input[0])

    def _spread(
        self, start: Collection[str], near: Callable[[NodeProto], Iterable[NodeProto]], *, products: bool = False
    ) -> set[str]:
        """Nodes reached from `start` through moves, pointwise operators and outer products.

        With `products`, those that end there as well: products whose sums are what is looked at.
        """
        found, front = set(start), [self._model.node(name) for name in start]
        while front:
            for node in near(front.pop()):
                if node.name in found or not any(self._is_float(t) for t in (*node.input, *node.output)):
                    continue
                if node.op_type in MOVES | POINTWISE | _EXACT | {"Cast", "Range", "CumSum"} or self._outer(node):
                    found.add(node.name)
                    front.append(node)
                elif products and node.op_type in CONTRACTIONS:
                    found.add(node.name)
        return found

    def _outer(self, node: NodeProto) -> bool:
        """Whether a MatMul multiplies without summing: positions times frequencies."""
        info = self._model.info(node.input[1]) if node.op_type == "MatMul" else None
        return info is not None and info.shape is not None and len(info.shape) > 1 and info.shape[-2] == 1
