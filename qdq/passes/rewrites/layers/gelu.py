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
from qdq.passes.rewrites.edit import Edit, Rewritten
from qdq.passes.rewrites.polynomial import OPERATORS, agrees, ancestors, polynomial, powers

STAGE, RANK = "float", 3

CURVES = {"Erf": "none", "Tanh": "tanh"}
ARGUMENTS = {
    "Erf": {powers(x=1): math.sqrt(0.5)},
    "Tanh": {powers(x=1): math.sqrt(2 / math.pi), powers(x=3): 0.044715 * math.sqrt(2 / math.pi)},
}
RESULT = {powers(x=1): 0.5, powers(x=1, t=1): 0.5}
STEPS = 4  # operators behind Erf or Tanh: 1 +, times x, times 0.5, and one to spare


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Put Gelu in the place of what is written out.

    Args:
        model: prepared float model, static or dynamic sizes.
        only: names of the Erf and Tanh nodes whose GELU may be changed; None for all.

    Returns:
        The model and the Erf and Tanh nodes fired on; the Gelu takes the name.
    """
    edit = Edit(model, only)
    for curve in edit.candidates(*CURVES):
        found = _argument(model, curve)
        last = None if found is None else _last(model, curve, found)
        if found is None or last is None:
            continue
        gelu = edit.node("Gelu", [found], f"{curve.name}_Gelu", last.output[0], approximate=CURVES[curve.op_type])
        gelu.name = curve.name
        edit.replace(last, [gelu], curve)
    return edit.finish()


def _argument(model: Model, curve: NodeProto) -> str | None:
    """The tensor whose GELU a curve is part of; None for none."""
    dtype = model.dtype(curve.input[0])
    for tensor in ancestors(model, curve.input[0]):
        if agrees(polynomial(model, curve.input[0], {tensor: "x"}), ARGUMENTS[curve.op_type], dtype):
            return tensor
    return None


def _last(model: Model, curve: NodeProto, argument: str) -> NodeProto | None:
    """The node that makes the GELU, as wide as its argument; None if nothing does."""
    node, dtype = curve, model.dtype(curve.output[0])
    for _ in range(STEPS):
        use = model.only_use(node.output[0])
        if use is None or use.node.op_type not in OPERATORS:
            return None
        node = use.node
        if agrees(polynomial(model, node.output[0], {argument: "x", curve.output[0]: "t"}), RESULT, dtype):
            before, after = model.rank(argument), model.rank(node.output[0])
            return node if before == after is not None else None
    return None
