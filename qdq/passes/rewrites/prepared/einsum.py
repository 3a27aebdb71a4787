"""Einsum with constant operands and one computed tensor, which no quantizer reads: a product with a weight.

    batch letters    in the data, the constant and the result          MatMul: leading axes
    rows             in the data and the result                        MatMul: axes of the data before the last
    sums             in the data and the constant                      MatMul: the last axis of the data, one or several
    columns          in the constant and the result                    MatMul: the last axis of the result, likewise
    others           of one operand alone: summed before

    bcij,oc->boij    channels on axis 1, two or more axes behind: a 1 x 1 Conv, with nothing around it
    any other        Transpose, Reshape (several sums), MatMul, Reshape (several columns), Transpose; as far as needed

Sizes of the data may be dynamic: those of sums and columns are the constant's. Several constants are multiplied first.
It must not touch an Einsum of two computed tensors, one without a sum, or the scores of attention.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from qdq.model.model import Model
from qdq.model.nodes import attribute_value
from qdq.passes.fold import GROWTH_LIMIT
from qdq.passes.rewrites.attention.scores import weighs_values
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node
from qdq.passes.rewrites.prepared.left_weight import FLOATS

STAGE, RANK = "prepared", 1

HIDDEN = [chr(code) for code in range(0x3B1, 0x3C1)]  # letters for the axes of an ellipsis: no equation has Greek ones


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Write Einsum as MatMul or Conv, which takes its name."""
    return each_node(model, only, ["Einsum"], _multiply, inside=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The letters of the axes of each operand and of the result."""

    operands: tuple[str, ...]
    result: str

    @classmethod
    def of(cls, equation: str, ranks: list[int]) -> Terms:
        """Read an equation; an ellipsis becomes letters of its own, and a result that it leaves out is written out."""
        left, arrow, right = equation.replace(" ", "").partition("->")
        counts = [rank - len(t.replace("...", "")) for t, rank in zip(left.split(","), ranks, strict=True)]
        wide = max((n for n, t in zip(counts, left.split(","), strict=True) if "..." in t), default=0)
        if wide > len(HIDDEN):
            raise Unfit(f"its ellipsis stands for {wide} axes")
        hidden = "".join(HIDDEN[:wide])
        operands = [t.replace("...", hidden[wide - n :]) for n, t in zip(counts, left.split(","), strict=True)]
        if not arrow:
            letters = left.replace(",", "").replace(".", "")
            right = ("..." if "..." in left else "") + "".join(sorted(c for c in letters if letters.count(c) == 1))
        return cls(operands=tuple(operands), result=right.replace("...", hidden))


def _multiply(model: Model, edit: Edit, node: NodeProto) -> None:
    computed = [i for i, name in enumerate(node.input) if not model.is_constant(name)]
    if len(computed) != 1 or len(node.input) < 2:
        raise Unfit(f"{len(computed)} of its {len(node.input)} operands are computed, not one of several")
    ranks = [model.rank(name) for name in node.input]
    if None in ranks or model.dtype(node.input[computed[0]]) not in FLOATS:
        raise Unfit("the rank of its data is not known, or they are no floats")
    terms = Terms.of(attribute_value(node, "equation", b"").decode(), [r or 0 for r in ranks])
    data = node.input[computed[0]]
    axes = terms.operands[computed[0]]
    if len(set(axes)) < len(axes) or len(set(terms.result)) < len(terms.result):
        raise Unfit("its equation takes a diagonal")
    letters, weight = _weight(model, node, terms, computed[0])
    if weighs_values(model, node.output[0]):
        raise Unfit("it makes the scores of attention")
    info = model.info(data)
    sizes = dict(zip(axes, info.shape or (), strict=True)) if info else {}
    if lost := [c for c in letters if sizes.get(c) == 1]:
        raise Unfit(f"axis {lost[0]!r} has one element in its data and several in the constant")
    split = _Split.of(axes, letters, terms.result)
    chain = _Chain(edit, node, data)
    if alone := [i for i, c in enumerate(axes) if c not in letters and c not in terms.result]:
        chain.then("ReduceSum", np.array(alone, np.int64), keepdims=0)
        axes = "".join(c for i, c in enumerate(axes) if i not in alone)
    write = _convolve if _is_convolution(axes, split, terms.result) else _matmul
    write(chain, axes, terms.result, split, _Weight(letters, weight))
    chain.close()


@dataclass(frozen=True, slots=True)
class _Split:
    """The letters of a product by what they do in it."""

    batch: list[str]
    rows: list[str]
    sums: list[str]
    columns: list[str]

    @classmethod
    def of(cls, axes: str, letters: str, result: str) -> _Split:
        """Of the axes of the data and the letters of the constant; `Unfit` where that is no matrix."""
        batch, rows = ([c for c in result if c in axes and (c in letters) is shared] for shared in (True, False))
        sums = [c for c in axes if c in letters and c not in result]
        columns = [c for c in result if c not in axes]
        if not sums or not columns:
            raise Unfit("it sums over no axis, or its constant has no columns")
        return cls(batch, rows, sums, columns)


@dataclass(frozen=True, slots=True)
class _Weight:
    letters: str
    values: np.ndarray

    def size(self, *letters: str) -> int:
        """How many elements some axes have together."""
        return math.prod(self.values.shape[self.letters.index(c)] for c in letters)

    def arranged(self, *groups: list[str]) -> np.ndarray:
        """The values with their axes in this order, those of a group as one."""
        order = [self.letters.index(c) for group in groups for c in group]
        return self.values.transpose(order).reshape([self.size(*group) for group in groups])


class _Chain:
    """Nodes one after the other that take the place of one."""

    def __init__(self, edit: Edit, node: NodeProto, source: str) -> None:
        self._edit, self._node, self._last, self._nodes = edit, node, source, list[NodeProto]()

    def then(self, op_type: str, *constants: np.ndarray, product: bool = False, **attributes: Any) -> None:
        """Add a node that reads what the last one makes, and constants; the product takes the name of the node."""
        name = f"{self._node.name}_{'weight' if product else op_type}"
        inputs = [self._edit.constant(name, values) for values in constants]
        made = self._edit.node(op_type, [self._last, *inputs], f"{self._node.name}_{op_type}", **attributes)
        self._last = made.output[0]
        if product:
            made.name = self._node.name
        self._nodes.append(made)

    def turned(self, before: list[str], after: list[str]) -> None:
        """Transpose axes into another order, if it is another."""
        if before != after:
            self.then("Transpose", perm=[before.index(c) for c in after])

    def close(self) -> None:
        """Put the nodes in the place of the one."""
        self._nodes[-1].output[0] = self._node.output[0]
        self._edit.replace(self._node, self._nodes)


def _convolve(chain: _Chain, axes: str, result: str, split: _Split, weight: _Weight) -> None:
    """A 1 x 1 convolution."""
    held = weight.arranged(split.columns, split.sums)
    chain.then("Conv", held.reshape(*held.shape, *[1] * (len(axes) - 2)), product=True)


def _matmul(chain: _Chain, axes: str, result: str, split: _Split, weight: _Weight) -> None:
    """The general form."""
    kept = [c for c in axes if c in result]
    if split.rows:  # the last axis before the sums is that of the rows of a matrix; others may broadcast
        last = next(c for c in reversed(kept) if c in split.rows)
        kept = [*(c for c in kept if c != last), last]
    chain.turned(list(axes), [*kept, *split.sums])
    if len(split.sums) > 1:
        chain.then("Reshape", np.array([0] * len(kept) + [weight.size(*split.sums)], np.int64))
    lone = bool(split.batch) and not split.rows  # a vector for each of the batch: as a matrix of one row
    behind = np.array([len(kept)], np.int64)
    if lone:
        chain.then("Unsqueeze", behind)
    batch = [c for c in kept if c in split.batch]
    leading = kept if lone else kept[:-1]
    shape = [weight.size(c) if c in batch else 1 for c in leading[leading.index(batch[0]) :]] if batch else []
    held = weight.arranged(batch, split.sums, split.columns)
    chain.then("MatMul", held.reshape(*shape, *held.shape[1:]), product=True)
    if lone:
        chain.then("Squeeze", behind)
    if len(split.columns) > 1:
        chain.then("Reshape", np.array([0] * len(kept) + [weight.size(c) for c in split.columns], np.int64))
    chain.turned([*kept, *split.columns], list(result))


def _weight(model: Model, node: NodeProto, terms: Terms, computed: int) -> tuple[str, np.ndarray]:
    """The product of all constants, as the letters of its axes and its values; axes of their own are summed over.

    An axis of one element in a constant stands for all of the data's, and is no axis of the weight.
    """
    needed = {*terms.operands[computed], *terms.result}
    places = {letter: i for i, letter in enumerate(dict.fromkeys("".join(terms.operands)))}
    operands: list[object] = []
    sizes: dict[str, int] = {}
    arrays = [(terms.operands[i], model.array(name)) for i, name in enumerate(node.input) if i != computed]
    for axes, values in arrays:
        for letter, size in zip(axes, values.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    shared = set(terms.operands[computed])
    for axes, values in arrays:
        one = tuple(i for i, (c, n) in enumerate(zip(axes, values.shape, strict=True)) if n == 1 and c in shared)
        kept = [c for i, c in enumerate(axes) if i not in one]
        exact = values.squeeze(one).astype(np.float64 if len(arrays) > 1 else np.float32)
        operands += [exact, [places[c] for c in kept]]
        needed -= {c for c in axes if sizes[c] == 1 and c in shared}
    letters = "".join(c for c in sizes if c in needed)
    if math.prod(sizes[c] for c in letters) * 4 > max(GROWTH_LIMIT, sum(2 * v.nbytes for _, v in arrays)):
        raise Unfit("the product of its constants would be larger than they are")
    made = np.einsum(*operands, [places[c] for c in letters])  # type: ignore[call-overload]
    return letters, np.asarray(made).astype(arrays[0][1].dtype)


def _is_convolution(axes: str, split: _Split, result: str) -> bool:
    """Whether the data are a feature map whose channels, on axis 1, become others."""
    if split.batch or len(split.sums) != 1 or len(split.columns) != 1 or not 4 <= len(axes) <= 5:
        return False
    first, *others = split.rows
    return list(axes) == [first, *split.sums, *others] and list(result) == [first, *split.columns, *others]
