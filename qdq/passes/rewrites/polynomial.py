"""What a tensor is in terms of a few others, whatever the order of the operators: what several rewrites recognize by.

(x - m) / s * gain + shift, however it is written  ->  {x^1 s^-1: gain, m^1 s^-1: -gain, 1: shift}
Add, Sub, Mul, Div, Neg, Reciprocal and Pow with small whole exponents, of the given tensors and of constants, which may
be arrays that broadcast. It must not decide what a polynomial stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model

OPERATORS = ("Add", "Sub", "Mul", "Div", "Neg", "Reciprocal", "Pow")
DEPTH = 12  # operators from a tensor down to what it is expressed in
TERMS = 8
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, of one number

Powers = frozenset[tuple[str, int]]  # a product of powers of tensors; empty for a constant
Polynomial = Mapping[Powers, np.ndarray]  # coefficients in float64

ONE: Powers = frozenset()


def powers(**exponents: int) -> Powers:
    """A product of powers, as a key of a polynomial.

    >>> sorted(powers(x=1, s=-1, m=0))
    [('s', -1), ('x', 1)]
    """
    return frozenset((name, exponent) for name, exponent in exponents.items() if exponent)


def polynomial(model: Model, tensor: str, variables: Mapping[str, str], depth: int = DEPTH) -> Polynomial | None:
    """A tensor as a polynomial in others that it is computed from: `variables`, tensor -> its name in the result.

    The coefficients that are not zero; None if it depends on anything else, through `depth` operators, or is too long.
    """
    if tensor in variables:
        return {powers(**{variables[tensor]: 1}): np.ones(())}
    if model.is_constant(tensor):
        info = model.info(tensor)
        floats = info is not None and info.dtype in ("float32", "float16", "float64", "bfloat16")
        return _shortened({ONE: model.array(tensor).astype(np.float64)}) if floats else None
    node = model.producer(tensor)
    if node is None or node.domain or node.op_type not in OPERATORS or not depth:
        return None
    parts = [polynomial(model, name, variables, depth - 1) for name in node.input]
    known = [part for part in parts if part is not None]
    found = _combined(node, known) if len(known) == len(parts) else None
    return None if found is None or len(found) > TERMS else _shortened(found)


def ancestors(model: Model, tensor: str) -> Iterator[str]:
    """The tensors that polynomials may express a tensor in, the nearest first, itself included."""
    front, seen = [tensor], set[str]()
    for _ in range(DEPTH + 1):
        front = [t for t in dict.fromkeys(front) if t not in seen and not model.is_constant(t)]
        seen.update(front)
        yield from front
        makers = [node for t in front if (node := model.producer(t)) is not None]
        front = [t for node in makers if node.op_type in OPERATORS and not node.domain for t in node.input]


def agrees(found: Polynomial | None, wanted: Mapping[Powers, float], dtype: str = "float32") -> bool:
    """Whether a polynomial has these terms and no others, its coefficients equal within the rounding of a float type.

    `dtype` is that of the tensor, and so of the constants that it is made with.
    """
    tolerance = ROUNDING.get(dtype, 1e-6)
    return (
        found is not None
        and found.keys() == wanted.keys()
        and all(c.size == 1 and abs(c.item() - wanted[k]) <= tolerance * abs(wanted[k]) for k, c in found.items())
    )


def _combined(node: NodeProto, parts: list[Polynomial]) -> Polynomial | None:
    """What an operator makes of its operands."""
    first, *rest = parts
    match node.op_type:
        case "Neg":
            return {key: -value for key, value in first.items()}
        case "Reciprocal":
            return _inverse(first)
        case "Add" | "Sub":
            sign = 1 if node.op_type == "Add" else -1
            return dict(first) | {key: first.get(key, 0) + sign * value for key, value in rest[0].items()}
        case "Mul":
            return _product(first, rest[0])
        case "Div":
            inverse = _inverse(rest[0])
            return None if inverse is None else _product(first, inverse)
        case _:
            return _power(first, rest[0])


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    total: dict[Powers, np.ndarray] = {}
    for a, x in left.items():
        for b, y in right.items():
            names = dict(a)
            for name, exponent in b:
                names[name] = names.get(name, 0) + exponent
            total[powers(**names)] = total.get(powers(**names), 0) + x * y
    return total


def _inverse(value: Polynomial) -> Polynomial | None:
    """One divided by a single term; None for a sum, or where a coefficient is zero."""
    if len(value) != 1:
        return None
    ((key, factor),) = value.items()
    return {frozenset((name, -exponent) for name, exponent in key): 1 / factor} if factor.all() else None


def _power(value: Polynomial, exponent: Polynomial) -> Polynomial | None:
    """A term or sum multiplied with itself a few times; None for any other exponent."""
    constant = exponent.get(ONE)
    if len(exponent) != 1 or constant is None or constant.size != 1 or constant.item() not in (1, 2, 3):
        return None
    total = value
    for _ in range(int(constant.item()) - 1):
        total = _product(total, value)
    return total


def _shortened(value: Polynomial) -> Polynomial:
    """Without terms that are zero."""
    return {key: factor for key, factor in value.items() if factor.any()}
