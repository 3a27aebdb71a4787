"""Small questions about one node, and new names for what a pass adds. Must not know models or passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnx import NodeProto, helper

# Of TensorRT's parser: data -> FP4 codes and FP8 scales of blocks of 16. No standard operator does it.
FP4_QUANTIZE, TRT_DOMAIN = "TRT_FP4DynamicQuantize", "trt"


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def ints(node: NodeProto, name: str, default: list[int]) -> list[int]:
    """An attribute of integers."""
    return next((list(a.ints) for a in node.attribute if a.name == name), default)


def attribute_value(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute of any kind, or what the standard says where it is absent."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def input_axis(node: NodeProto, rank: int) -> int:
    """The axis of a weight that runs over input channels: Conv 1; Gemm 0 or 1 by transB; MatMul the last but one."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 1
    return rank - 2


class Names:
    """The names of a graph, which only grow.

    >>> names = Names(["x"])
    >>> names.fresh("x"), names.fresh("x"), names.fresh("y")
    ('x_2', 'x_3', 'y')
    """

    def __init__(self, taken: Iterable[str]) -> None:
        """Start with the names that are taken."""
        self._taken = set(taken)

    def fresh(self, wanted: str) -> str:
        """`wanted`, or the first of wanted_2, wanted_3, ... that is free; it is taken from then on."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name
