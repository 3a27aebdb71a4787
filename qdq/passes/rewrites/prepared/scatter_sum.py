"""ScatterND and ScatterElements that add, as gradients and sums over neighbours do: a product with a one-hot matrix.

    data + sum of the updates of each index   ->  data + MatMul(Cast(Equal(row numbers, indices)), updates)

TensorRT's parser takes neither reduction. Repeated and negative indices are right; sums are in another order. Where all
columns have the same indices (torch.index_add, an index expanded over features) the matrix is rows x indices, else one
for each column. An infinite update would spread over its column, as 0 times infinity is no number. It must not make a
one-hot tensor above `LIMIT` elements, where it knows the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from onnx import NodeProto, TensorProto, helper

from engines.core.nodes import attribute_value
from qdq.model.model import Model
from qdq.passes.rewrites.edit import Edit, Rewritten, Unfit, each_node
from qdq.passes.rewrites.prepared.left_weight import FLOATS

STAGE, RANK = "prepared", 6

LIMIT = 1 << 24  # elements


def rewrite(model: Model, only: Collection[str] | None = None) -> Rewritten:
    """Write scattered sums as products, which take their names."""
    return each_node(model, only, ["ScatterND", "ScatterElements"], _sum)


def _sum(model: Model, edit: Edit, node: NodeProto) -> None:
    reduction = attribute_value(node, "reduction", b"none").decode()
    if reduction != "add":
        raise Unfit(f"its reduction is {reduction!r}, not 'add'")
    data, indices, updates = (model.info(name) for name in node.input[:3])
    if data is None or indices is None or updates is None or None in (data.shape, indices.shape, updates.shape):
        raise Unfit("the rank of one of its inputs is not known")
    if data.dtype not in FLOATS:
        raise Unfit(f"it adds {data.dtype}")
    _Sum(model, edit, node).write()


class _Sum:
    """One node on its way to nodes."""

    def __init__(self, model: Model, edit: Edit, node: NodeProto) -> None:
        self.model, self.edit, self.node = model, edit, node
        self.data, self.indices, self.updates = node.input[:3]
        self.shape, self.places = self._shape(self.data), self._shape(self.indices)
        self.nodes: list[NodeProto] = []

    def write(self) -> None:
        """Replace the node."""
        total = self._elements() if self.node.op_type == "ScatterElements" else self._blocks()
        if self.model.is_constant(self.data) and not self.model.array(self.data).any():
            self.nodes[-1].output[0] = self.node.output[0]
        else:
            self._put("Add", [self.data, total], output=self.node.output[0])
        self.edit.replace(self.node, self.nodes)

    def _blocks(self) -> str:
        """ScatterND: the indices of leading axes become row numbers, what lies behind them one column axis."""
        depth = self.places[-1]
        if not isinstance(depth, int) or not depth:
            raise Unfit("how many axes it indexes is not known")
        lead, width, count = self.shape[:depth], _product(self.shape[depth:]), _product(self.places[:-1])
        if width is None and count is None:
            raise Unfit("neither the number of its updates nor their size is static")
        self._limit(_product(lead), count)
        sizes, rows = self._leading(lead)
        index = self._put("Mod", [self.indices, sizes])
        if depth > 1:
            steps = self._steps(lead)
            index = self._put("ReduceSum", [self._put("Mul", [index, steps]), self._integers([-1])], keepdims=0)
        index = self._put("Reshape", [index, self._integers([1, -1])])
        columns = self._integers([-1, width] if width is not None else [count or 0, -1])
        flat = self._put("Reshape", [self.updates, columns])
        total = self._put("MatMul", [self._one_hot(rows, index), flat], named=True)
        return self._put("Reshape", [total, self._target()])

    def _elements(self) -> str:
        """ScatterElements: each line along the axis for itself, or all with one matrix where they share the indices."""
        rank = len(self.shape)
        axis = attribute_value(self.node, "axis", 0) % rank
        others = [i for i in range(rank) if i != axis]
        lines = [(self.places[i], self.shape[i]) for i in others]
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in lines):
            raise Unfit("its indices do not cover all lines of its data")
        size, rows = self._leading(self.shape[axis : axis + 1], axis)
        shared, count = self._shared(axis), self.places[axis]
        alike = 1 if shared else _product([self.shape[i] for i in others])
        self._limit(
            _product(self.shape[axis : axis + 1]),
            None if alike is None or not isinstance(count, int) else alike * count,
        )
        index = self._put("Mod", [shared or self.indices, size])
        if shared and axis == rank - 2:
            index = self._put("Reshape", [index, self._integers([1, -1])])
            return self._put("MatMul", [self._one_hot(rows, index), self.updates], named=True)
        last = [*others, axis]
        updates = self._turned(self.updates, last)
        if shared:
            index = self._put("Reshape", [index, self._integers([1, -1])])
            spread = self._put("Transpose", [self._one_hot(rows, index)], perm=[1, 0])
            total = self._put("MatMul", [updates, spread], named=True)
        else:
            behind = self._integers([-1])
            index = self._put("Unsqueeze", [self._turned(index, last), self._integers([-2])])
            column = self._put("Unsqueeze", [updates, behind])
            total = self._put("MatMul", [self._one_hot(rows, index), column], named=True)
            total = self._put("Squeeze", [total, behind])
        return self._turned(total, [last.index(i) for i in range(rank)])

    def _shared(self, axis: int) -> str:
        """A tensor with the indices of every line, where they are the same; "" elsewhere."""
        if self.model.is_constant(self.indices):
            values = np.moveaxis(self.model.array(self.indices), axis, -1)
            first = values.reshape(-1, values.shape[-1])[:1]
            return self.edit.constant(f"{self.indices}_line", first) if values.size and (values == first).all() else ""
        node = self.model.producer(self.indices)
        if node is None or node.op_type != "Expand" or node.domain:
            return ""
        source = self._shape(node.input[0])
        whole = [1] * (len(self.shape) - len(source)) + list(source)
        return node.input[0] if all(n == 1 for i, n in enumerate(whole) if i != axis) else ""

    def _one_hot(self, rows: str, index: str) -> str:
        """1 where a row number, down, is the index, across."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.model.dtype(self.data)))
        return self._put("Cast", [self._put("Equal", [rows, index])], to=kind)

    def _leading(self, lead: list[int | str | None], start: int = 0) -> tuple[str, str]:
        """The sizes of the axes that are indexed, from one on, and the numbers of all rows, as a column."""
        kind = np.dtype(self.model.dtype(self.indices))
        static = [n for n in lead if isinstance(n, int)]
        if len(static) == len(lead):
            numbers = np.arange(math.prod(static), dtype=kind).reshape(-1, 1)
            return self._constant("sizes", np.array(static, kind)), self._constant("rows", numbers)
        sizes = self._put("Shape", [self.data], start=start, end=start + len(lead))
        count = self._put("ReduceProd", [sizes, self._integers([0])], keepdims=0)
        scalars = [self._constant("bound", np.array(n, np.int64)) for n in (0, 1)]
        rows = self._put("Unsqueeze", [self._put("Range", [scalars[0], count, scalars[1]]), self._integers([1])])
        if kind != np.int64:
            sizes, rows = (self._put("Cast", [t], to=TensorProto.INT32) for t in (sizes, rows))
        return sizes, rows

    def _steps(self, lead: list[int | str | None]) -> str:
        """How many rows one step along each axis that is indexed skips."""
        behind = [n for n in lead[1:] if isinstance(n, int)]
        if len(behind) < len(lead) - 1:
            raise Unfit("a size behind the first axis that it indexes is dynamic")
        steps = [math.prod(behind[i:]) for i in range(len(lead))]
        return self._constant("steps", np.array(steps, self.model.dtype(self.indices)))

    def _target(self) -> str:
        """The shape of the data, for a Reshape."""
        dynamic = [i for i, n in enumerate(self.shape) if not isinstance(n, int)]
        if len(dynamic) > 1:
            return self._put("Shape", [self.data])
        return self._integers([n if isinstance(n, int) else -1 for n in self.shape])

    def _turned(self, tensor: str, order: list[int]) -> str:
        return tensor if order == sorted(order) else self._put("Transpose", [tensor], perm=order)

    def _limit(self, rows: int | None, count: int | None) -> None:
        if rows is not None and count is not None and rows * count > LIMIT:
            raise Unfit(f"its one-hot matrix would have {rows} x {count} elements, more than {LIMIT}")

    def _put(
        self, op_type: str, inputs: list[str], *, output: str = "", named: bool = False, **attributes: object
    ) -> str:
        """Add a node; returns its output."""
        made = self.edit.node(op_type, inputs, f"{self.node.name}_{op_type}", output, **attributes)
        if named:
            made.name = self.node.name
        self.nodes.append(made)
        return str(made.output[0])

    def _constant(self, wanted: str, values: np.ndarray) -> str:
        return self.edit.constant(f"{self.node.name}_{wanted}", values)

    def _integers(self, values: list[int]) -> str:
        return self._constant("shape", np.array(values, np.int64))

    def _shape(self, name: str) -> list[int | str | None]:
        info = self.model.info(name)
        return list(info.shape or ()) if info else []


def _product(sizes: list[int | str | None]) -> int | None:
    """How many elements axes have together; None where one is dynamic."""
    static = [n for n in sizes if isinstance(n, int)]
    return math.prod(static) if len(static) == len(sizes) else None
