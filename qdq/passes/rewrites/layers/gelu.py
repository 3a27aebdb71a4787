"""GELU written out, as exporters before opset 20 write it: the operator Gelu.

    x * 0.5 * (1 + erf(x / sqrt 2))                                   ->  Gelu(x)
    x * 0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))         ->  Gelu(x, approximate="tanh")

In any order of factors and operands. x^3 overflows FP16 from 40 on, so `precision` keeps part of the second form in
FP32, and TensorRT-RTX 1.7.1 no longer takes it into the product before it (measured, SM89); the operator it takes. It
must not touch a form whose constants differ by more than the rounding of their type.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from onnx import NodeProto

from qdq.model.model import Model
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node, only_reader
from qdq.passes.rewrites.polynomial import OPERATORS, agrees, ancestors, polynomial, powers

STAGE, RANK = "float", 3  # before flatten, which takes Gelu along

CURVES = {"Erf": "none", "Tanh": "tanh"}
ARGUMENTS = {
    "Erf": {powers(x=1): math.sqrt(0.5)},
    "Tanh": {powers(x=1): math.sqrt(2 / math.pi), powers(x=3): 0.044715 * math.sqrt(2 / math.pi)},
}
RESULT = {powers(x=1): 0.5, powers(x=1, t=1): 0.5}
STEPS = 4  # operators behind Erf or Tanh: 1 +, times x, times 0.5, and one to spare


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Put Gelu in the place of what is written out; fires on its Erf or Tanh, whose name it takes."""
    return each_node(model, only, CURVES, _put)


def _put(model: Model, edit: Edit, curve: NodeProto) -> None:
    argument = _argument(model, curve)
    last = _last(model, curve, argument)
    gelu = edit.node("Gelu", [argument], f"{curve.name}_Gelu", last.output[0], approximate=CURVES[curve.op_type])
    gelu.name = curve.name
    edit.replace(last, [gelu], curve)


def _argument(model: Model, curve: NodeProto) -> str:
    """The tensor whose GELU a curve is part of."""
    dtype = model.dtype(curve.input[0])
    for tensor in ancestors(model, curve.input[0]):
        if agrees(polynomial(model, curve.input[0], {tensor: "x"}), ARGUMENTS[curve.op_type], dtype):
            return tensor
    raise Unfit(f"its operand is not that of {curve.op_type} in GELU, within the rounding of its type")


def _last(model: Model, curve: NodeProto, argument: str) -> NodeProto:
    """The node that makes the GELU, as wide as its argument."""
    node, dtype = curve, model.dtype(curve.output[0])
    for _ in range(STEPS):
        node = only_reader(model, node.output[0])
        if node.op_type not in OPERATORS:
            break
        if agrees(polynomial(model, node.output[0], {argument: "x", curve.output[0]: "t"}), RESULT, dtype):
            before, after = model.rank(argument), model.rank(node.output[0])
            if before == after is not None:
                return node
            break
    raise Unfit(f"what reads it is not x * 0.5 * (1 + {curve.op_type.lower()} ...) with the operand's x and shape")
