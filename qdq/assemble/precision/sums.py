"""Whether a reduction may compute in a low float type: what it sums was measured, and what its result is for.

Model, ranges -> for each node a reason against it. A kernel may keep partial sums in the type of the tensors, so the
magnitudes of all terms together must fit, not the result alone; and a normalization divides by its sums, which must not
lose small terms. This module must not know other rules.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from onnx import NodeProto

from engines.core.operators import family
from qdq.assemble.precision.positions import MOVES, POINTWISE
from qdq.model.model import Model, TensorInfo

SUMS = family("CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd ReduceSum ReduceSumSquare")
_PLAIN = family("ReduceL1 ReduceLogSum ReduceMean ReduceSum")
_SQUARES = family("ReduceL2 ReduceSumSquare")
TINY_SQUARE = 2.0**-10  # below, most squares of a tensor have few bits in FP16 or none


class Sums:
    """What is known of the reductions of a graph."""

    def __init__(self, model: Model, ranges: Mapping[str, float]) -> None:
        """Take a model, all tensors typed, and the largest magnitudes of some tensors."""
        self._model, self._ranges = model, ranges

    def unsafe(self, node: NodeProto, limit: float) -> str | None:
        """Why a reduction needs FP32, '' where it was not measured; None where it does not.

        `limit` is what its terms may reach together.
        """
        reach = self._reach(node)
        if reach is None:
            return ""
        if reach > limit:
            return f"the magnitudes that it sums may reach {reach:.4g} together"
        if self._applied(node):
            return "it is a step of a normalization, which divides what was summed by the result"
        return None

    def read(self, node: NodeProto) -> bool:
        """Whether a reduction sums what a node makes, perhaps moved or with a constant factor."""
        near = behind(self._model, node, MOVES, factors=True)
        return any(u.node.op_type in SUMS for n in near for name in n.output for u in self._model.consumers(name))

    def _reach(self, node: NodeProto) -> float | None:
        """What the magnitudes of all terms are together at most; None where that is not known."""
        amax, count = self._ranges.get(node.input[0]), self._count(node)
        if amax is None or count is None:
            return None
        if node.op_type in _PLAIN:
            return amax * count
        if node.op_type in _SQUARES:
            return amax**2 * count if amax == 0 or amax**2 > TINY_SQUARE else None
        return None

    def _count(self, node: NodeProto) -> float | None:
        """How many elements each result sums; None where an open size is among them."""
        inputs, outputs = self._model.info(node.input[0]), self._model.info(node.output[0])
        if inputs is None or outputs is None or inputs.shape is None or outputs.shape is None:
            return None
        open_sizes = [sum(not isinstance(d, int) for d in info.shape or ()) for info in (inputs, outputs)]
        return elements(inputs) / max(elements(outputs), 1) if open_sizes[0] == open_sizes[1] else None

    def _applied(self, node: NodeProto) -> bool:
        """Whether the result meets, pointwise, what it was made of: x - mean(x), x / norm(x), exp(x) / sum(exp(x))."""
        sources, front = {node.input[0]}, [node.input[0]]
        while front:
            producer = self._model.producer(front.pop())
            if producer is not None and producer.op_type in MOVES | POINTWISE:
                new = {name for name in producer.input if name and not self._model.is_constant(name)} - sources
                sources |= new
                front.extend(new)
        ahead = list(behind(self._model, node, MOVES | POINTWISE | SUMS))
        made = {name for n in ahead for name in n.output}
        readers = (u.node for name in made for u in self._model.consumers(name))
        return any(sources & (set(r.input) - made) for r in readers if r.op_type in POINTWISE)


def behind(model: Model, node: NodeProto, passing: Collection[str], *, factors: bool = False) -> Iterator[NodeProto]:
    """A node and those behind it that are reached through operators of some kinds.

    With `factors`, through products and quotients with a constant too.
    """
    front, seen = [node], {node.name}
    while front:
        node = front.pop()
        yield node
        for use in (use for name in node.output for use in model.consumers(name)):
            scales = factors and use.node.op_type in ("Mul", "Div") and any(map(model.is_constant, use.node.input))
            if use.node.name not in seen and (use.node.op_type in passing or scales):
                seen.add(use.node.name)
                front.append(use.node)


def elements(info: TensorInfo | None) -> float:
    """Elements of a tensor, 1 for each open size: those that are not summed cancel in a ratio."""
    return float(math.prod(d for d in (info.shape if info and info.shape else ()) if isinstance(d, int)))
