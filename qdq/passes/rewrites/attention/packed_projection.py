"""A packed projection of attention as one product for each part that is cut out of its result.

    Split(X W + b) -> Q, K, V     becomes     X W_q + b_q,  X W_k + b_k,  X W_v + b_v

Columns of the weight and of what is added stay what they are, so every number is the same. TensorRT-RTX 1.7.1 moves the
cuts above the product itself where the parts become heads; there it dequantizes an INT8 weight in a kernel of its own,
in every inference, and multiplies in float. Of three products it makes one integer kernel (measured, SM80, 86, 89 and
120; FP32 and FP16; static and dynamic shapes). A gated unit, whose parts do not become heads, stays whole.

A cut moves up by one node at a time, as the elements that it takes of one axis:

| node | the cut of its input |
|---|---|
| Transpose, Squeeze, Unsqueeze | of the axis that becomes the cut one |
| Add, Sub, Mul, Div with a constant | the same, of the constant too |
| Cast, Clip | the same |
| Reshape of one axis into some, the cut one among them | of that axis: the elements that the cut leaves of it |
| MatMul, Gemm with a constant matrix | columns of the matrix, and of the bias |

It must not touch a product whose result is also read whole, part what comes together again (the halves of rotary
positions), or compute an element twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from engines.core.operators import family
from qdq.model.model import Model
from qdq.model.nodes import all_nodes, attribute, attribute_value, weight_axis
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, altered, each_node

STAGE, RANK = "float", 20  # before the others of attention, which read Q, K and V
NOT_FOR = {"tensorrt": "TensorRT is not known to part a packed projection, and its documented form has one product"}
USUAL = (
    "int8",
)  # FP8, FP4 and 4-bit weights are multiplied whole as asked for, with as few bytes or fewer (SM89, 120)

CUTS = family("Split Slice Gather GatherND")
MOVES = family("Transpose Squeeze Unsqueeze Reshape")
PAIRS = family("Add Sub Mul Div")
SINGLES = family("Cast Clip")
PRODUCTS = family("MatMul Gemm Conv Einsum")
COMPOUNDS = family("Attention MultiHeadAttention GroupQueryAttention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a cut takes: `elements` of an `axis`; `output` is its name, `dropped` whether the axis goes."""

    output: str
    axis: int
    elements: np.ndarray
    dropped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A node that cuts parts out of what the nodes of `path`, the product first, make."""

    node: NodeProto
    path: tuple[NodeProto, ...]
    parts: tuple[Part, ...]


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Give each part its product; fires on MatMul and Gemm, and again on a part that is cut itself."""
    first = done = each_node(model, only, ["MatMul", "Gemm"], _separate, inside=True)
    while done.fired:
        before = {node.name for node in all_nodes(model.graph)}
        model = done.model
        new = {node.name for node in all_nodes(model.graph)} - before
        done = each_node(model, new, ["MatMul", "Gemm"], _separate, inside=True)
    return Rewritten(model=model, fired=first.fired, unfit=first.unfit)


def _separate(model: Model, edit: Edit, product: NodeProto) -> None:
    weight = product.input[1]
    if model.is_constant(product.input[0]) or not model.is_constant(weight) or model.rank(weight) != 2:
        raise Unfit("it does not multiply a computed tensor with a constant matrix")
    whole: list[str] = []
    cuts = list(_cuts(model, (product,), product.output[0], whole))
    parts = [part for c in cuts for part in c.parts]
    if len(parts) < 2:
        raise Unfit("its result is not cut into parts")
    if whole:
        raise Unfit(f"its result is cut into parts, but also read whole: {whole[0]}")
    if not all(len(part.elements) for part in parts):
        raise Unfit("a part of its result is empty")
    reached = [found for part in parts if (found := _reached(model, part.output))]
    if not reached:
        raise Unfit("no part of its result comes to a product of two computed tensors: the compiler keeps it whole")
    if sum(map(len, reached)) > len(frozenset().union(*reached)):
        raise Unfit("parts of its result come together again in one operand, as the halves of rotary positions do")
    made: dict[str, list[NodeProto]] = {c.node.name: [] for c in cuts}
    columns = 0
    for number, (cut, part) in enumerate((c, p) for c in cuts for p in c.parts):
        nodes, count = _copied(model, edit, cut.path, part, str(number))
        made[cut.node.name] += nodes
        columns += count
    if columns > model.initializers[weight].dims[weight_axis(product, 2)]:
        raise Unfit("its parts overlap")
    for cut in cuts:
        edit.replace(cut.node, made[cut.node.name], product)


def _cuts(model: Model, path: tuple[NodeProto, ...], tensor: str, whole: list[str]) -> Iterator[Cut]:
    """Every cut of a tensor, or of what layout makes of it; `whole` receives what else reads them."""
    if model.is_output(tensor):
        whole.append(f"{tensor!r} is an output of the model")
    for use in model.consumers(tensor):
        node = use.node
        if use.index == 0 and node.op_type in CUTS and not node.domain:
            yield Cut(node=node, path=path, parts=_parts(model, node))
        elif _passes(model, node, tensor):
            yield from _cuts(model, (*path, node), node.output[0], whole)
        else:
            whole.append(f"by {node.op_type} {node.name!r}")


def _passes(model: Model, node: NodeProto, tensor: str) -> bool:
    """Whether a cut can move above a node."""
    if node.domain or node.op_type not in MOVES | SINGLES | PAIRS:
        return False
    if node.op_type in PAIRS:
        return sum(model.held(name) is not None for name in node.input) == 1
    constant = node.op_type == "Reshape" or all(model.held(name) is not None for name in node.input[1:])
    return constant and node.input[0] == tensor


def _parts(model: Model, cut: NodeProto) -> tuple[Part, ...]:
    """What a Split, Slice, Gather or GatherND takes; raises `Unfit` where that is not known, or is of several axes."""
    info = model.info(cut.input[0])
    shape = info.shape if info is not None and info.shape is not None else ()
    given = [model.held(t) for t in cut.input]
    if not shape or any(t and g is None for t, g in zip(cut.input[1:], given[1:], strict=True)):
        raise Unfit(f"what {cut.op_type} {cut.name!r} takes is not constant, or of an unknown shape")
    values = [np.atleast_1d(g) if g is not None else None for g in given] + [None] * 5
    if cut.op_type == "Slice":
        starts, ends, axes, steps = values[1:5]
        assert starts is not None and ends is not None
        axes = np.arange(len(starts)) if axes is None else axes
        steps = np.ones_like(starts) if steps is None else steps
        taken = {}
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            index = int(axis) % len(shape)
            taken[index] = np.arange(_size(cut, shape, index))[int(start) : _end(int(end), int(step)) : int(step)]
        if len(taken) != 1:
            raise Unfit(f"{cut.op_type} {cut.name!r} cuts {len(taken)} axes")
        return tuple(Part(output=cut.output[0], axis=a, elements=e) for a, e in taken.items())
    if cut.op_type == "GatherND":
        table = given[1]
        if table is None or table.ndim != 2 or table.shape[1] != 1 or attribute(cut, "batch_dims", 0):
            raise Unfit(f"{cut.op_type} {cut.name!r} takes more than elements of the first axis")
        return (Part(output=cut.output[0], axis=0, elements=np.arange(_size(cut, shape, 0))[table[:, 0]]),)
    axis = int(attribute(cut, "axis", 0)) % len(shape)
    every = np.arange(_size(cut, shape, axis))
    if cut.op_type == "Gather":
        if given[1] is None or given[1].ndim > 1:
            raise Unfit(f"{cut.op_type} {cut.name!r} takes a table of elements")
        return (Part(output=cut.output[0], axis=axis, elements=every[values[1]], dropped=given[1].ndim == 0),)
    chunk = -(-len(every) // len(cut.output))
    sizes = [chunk] * (len(cut.output) - 1) if values[1] is None else values[1][:-1]
    pieces = zip(cut.output, np.split(every, np.cumsum(sizes)), strict=True)
    return tuple(Part(output=name, axis=axis, elements=piece) for name, piece in pieces if model.consumers(name))


def _size(cut: NodeProto, shape: Sequence[int | str | None], axis: int) -> int:
    size = shape[axis]
    if not isinstance(size, int):
        raise Unfit(f"the axis that {cut.op_type} {cut.name!r} cuts has a dynamic size")
    return size


def _end(end: int, step: int) -> int | None:
    """The end of a Slice for Python: far below the start means to the first element, where steps are negative."""
    return None if step < 0 and end < -(2**30) else end


def _reached(model: Model, tensor: str) -> frozenset[tuple[str, int]]:
    """The operands of products of two computed tensors that a tensor comes to before any product with a weight."""
    seen, todo, found = {tensor}, [tensor], set()
    while todo:
        for use in model.consumers(todo.pop()):
            node = use.node
            if node.op_type in COMPOUNDS:
                found.add((node.name, use.index))
            elif node.op_type in PRODUCTS:
                if not any(map(model.is_constant, node.input[:2])):
                    found.add((node.name, use.index))
            else:
                new = set(node.output) - seen
                seen |= new
                todo += new
    return frozenset(found)


def _copied(
    model: Model, edit: Edit, path: Sequence[NodeProto], part: Part, number: str
) -> tuple[list[NodeProto], int]:
    """The nodes of a path for one part, in order, and how many columns of the weight it takes."""
    axis, taken = part.axis, part.elements
    output, nodes = part.output, []
    if part.dropped:
        axes, made = edit.small(f"{part.output}_axes", np.array([axis], np.int64), path[0])
        output = edit.name(f"{part.output}_one")
        nodes = [*made, edit.node("Squeeze", [output, axes], f"{part.output}_Squeeze", part.output)]
    for node, below in zip(reversed(path), [*reversed(path[:-1]), None], strict=True):
        copy, before = altered(node, output=output), []
        copy.name = edit.name(f"{node.name}_{number}")
        if below is not None:
            source = below.output[0]
            output = edit.name(f"{source}_{number}")
            data = 0 if node.input[0] == source else 1
            copy.input[data] = output
            if node.op_type == "Reshape":
                before = _target(model, edit, copy, node, axis=axis, size=len(taken))
                axis, taken = _above(model, node, axis, taken)
            elif node.op_type in MOVES:
                axis = _moved(model, node)[axis]
                if axis < 0:
                    raise Unfit(f"{part.output!r} is cut along an axis of size 1")
            elif node.op_type in PAIRS:
                copy.input[1 - data] = _cut(model, edit, copy.input[1 - data], axis, taken, node)
        else:
            if axis != _rank(model, node) - 1:
                raise Unfit(f"{part.output!r} is cut out of rows, not of columns")
            weight = model.array(node.input[1]).take(taken, weight_axis(node, 2))
            copy.input[1] = edit.constant(f"{node.input[1]}_{number}", weight)
            if len(node.input) > 2 and node.input[2]:
                if model.held(node.input[2]) is None:
                    raise Unfit("its bias is computed")
                copy.input[2] = _cut(model, edit, node.input[2], axis, taken, node)
        nodes = [*before, copy, *nodes]
    return nodes, len(taken)


def _cut(model: Model, edit: Edit, constant: str, axis: int, taken: np.ndarray, node: NodeProto) -> str:
    """The elements of a constant that are added to, or multiply, those taken of an axis of a node's result."""
    values = _values(model, constant)
    axis += values.ndim - _rank(model, node)
    if axis < 0 or values.shape[axis] == 1:
        return constant
    return edit.constant(f"{constant}_cut", values.take(taken, axis))


def _target(
    model: Model, edit: Edit, reshape: NodeProto, original: NodeProto, *, axis: int, size: int
) -> list[NodeProto]:
    """Make a copied Reshape ask for another size of one axis; the nodes that compute the shape, if it is computed."""
    shape = reshape.input[1]
    if (known := model.held(shape)) is not None:
        sizes = known.copy()
        sizes[axis] = size
        reshape.input[1], made = edit.small(f"{reshape.name}_shape", sizes, original)
        return made
    others = np.ones(_rank(model, original), np.int64)
    others[axis] = 0
    keep, first = edit.small(f"{reshape.name}_others", others, original)
    own, second = edit.small(f"{reshape.name}_size", (1 - others) * size, original)
    kept = edit.node("Mul", [shape, keep], f"{reshape.name}_Mul")
    whole = edit.node("Add", [kept.output[0], own], f"{reshape.name}_Add")
    reshape.input[1] = whole.output[0]
    return [*first, *second, kept, whole]


def _moved(model: Model, node: NodeProto) -> list[int]:
    """For each axis that a Transpose, Squeeze or Unsqueeze makes the one that it was; -1 for a new one."""
    rank = _rank(model, node)
    if node.op_type == "Transpose":
        return list(attribute_value(node, "perm", list(range(rank))[::-1]))
    before = model.rank(node.input[0]) or 0
    if len(node.input) < 2:
        raise Unfit(f"{node.op_type} {node.name!r} takes away whatever axes have size 1")
    if node.op_type == "Squeeze":
        gone = {int(axis) % before for axis in _values(model, node.input[1])}
        return [axis for axis in range(before) if axis not in gone]
    new = {int(axis) % rank for axis in _values(model, node.input[1])}
    old = iter(range(before))
    return [-1 if axis in new else next(old) for axis in range(rank)]


def _values(model: Model, constant: str) -> np.ndarray:
    """The values of what `_passes` and `_parts` found to be constant."""
    values = model.held(constant)
    assert values is not None
    return values


def _rank(model: Model, node: NodeProto) -> int:
    """The axes of what a node makes."""
    return model.rank(node.output[0]) or 0


def _above(model: Model, reshape: NodeProto, axis: int, taken: np.ndarray) -> tuple[int, np.ndarray]:
    """What a cut behind a Reshape takes in front of it: axis and elements.

    The cut axis is one of those that a single axis is divided into; nothing moves across that one's borders.
    """
    infos = [model.info(reshape.input[0]), model.info(reshape.output[0])]
    before, after = [info.shape if info is not None and info.shape is not None else () for info in infos]
    for old, size in enumerate(before):
        for start in range(axis + 1):
            for end in range(axis + 1, len(after) + 1):
                ends = _same(before[:old], after[:start]), _same(before[old + 1 :], after[end:])
                sizes = [s if isinstance(s, int) else -1 for s in after[start:end]]
                whole = -1 not in sizes and math.prod(sizes) == size and any(ends)
                if isinstance(size, int) and (whole or (sizes.count(-1) == 1 and all(ends))):
                    every = np.arange(size).reshape(sizes)
                    return old, every.take(taken, axis - start).reshape(-1)
    raise Unfit(f"Reshape {reshape.name!r} makes the axis that is cut from several")


def _same(left: Sequence[int | str | None], right: Sequence[int | str | None]) -> bool:
    """Whether axes have as many elements together, as far as is known."""
    if left == right and None not in left:
        return True
    static = [s for s in (*left, *right) if isinstance(s, int)]
    return len(static) == len(left) + len(right) and math.prod(static[: len(left)]) == math.prod(static[len(left) :])
