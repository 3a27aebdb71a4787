"""Sequences of tensors written as tensors: compilers have none, and scripted models of PyTorch hold them everywhere.

| sequence | what is read of it becomes |
|---|---|
| that a Loop gives: empty at first, one element appended a turn | of a scan output of the Loop, the elements stacked |
| SplitToSequence, in ones, in equal parts or in constant parts | Gather or Slice of the tensor that is split |
| SequenceConstruct, SequenceEmpty, SequenceInsert, SequenceErase | the elements themselves |

Readers are SequenceAt, SequenceLength and ConcatFromSequence, in the main graph and in bodies. Elements that a Loop
stacks must be alike: ONNX Runtime refuses others at run time. It must not touch a sequence that is an output or that
something else reads; the compiler then refuses it by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from engines.core.operators import family
from qdq.model.nodes import Names, all_graphs, all_nodes, attribute, bodies, constant_tensor
from qdq.passes.draft import Draft, assign

READERS = family("ConcatFromSequence SequenceAt SequenceLength")
MOST_PARTS = 256  # of a split, that are written out one by one
_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What SplitToSequence makes: parts of a tensor along an axis, of one size or of constant ones."""

    tensor: str
    axis: int
    size: int  # 0 where `sizes` say it
    sizes: tuple[int, ...]
    kept: bool  # the axis, in parts of one element


def write_out_sequences(draft: Draft) -> bool:
    """Write tensors in place of sequences where all their readers allow it; True if there was one."""
    if not any(node.op_type in READERS and not node.domain for node in all_nodes(draft.graph)):
        return False
    work = _Sequences(draft)
    for graph in all_graphs(draft.graph):
        for node in graph.node:
            if node.op_type == "Loop" and not node.domain:
                work.stack(node)
    changed = bool(work.stacked)
    for graph in reversed(list(all_graphs(draft.graph))):  # a body before what it is in, which is copied
        written = [(node, work.read(node)) for node in graph.node]
        if any(new is not None for _, new in written):
            changed = True
            copies = [NodeProto.FromString(n.SerializeToString()) for node, new in written for n in new or [node]]
            assign(graph.node, copies)
    return changed


class _Sequences:
    """Where the sequences of a model come from, and the nodes that stand for their readers."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._makers = {name: node for node in all_nodes(draft.graph) for name in node.output if name}
        self._fresh = Names([*draft.names(), *(node.name for node in all_nodes(draft.graph))]).fresh
        graphs = list(all_graphs(draft.graph))
        self._held = {t.name: t for graph in graphs for t in graph.initializer}
        self._ends = Counter(value.name for graph in graphs for value in graph.output)
        self._uses: dict[str, list[NodeProto]] = {}
        for node in all_nodes(draft.graph):
            for name in node.input:
                self._uses.setdefault(name, []).append(node)
        self.stacked: dict[str, tuple[str, str]] = {}  # sequence -> the elements stacked, and one of them

    def stack(self, loop: NodeProto) -> None:
        """Make scan outputs of the sequences that a Loop appends to and nothing else."""
        body = next(bodies(loop))
        for index in reversed(range(len(loop.input) - 2)):
            state, end = body.input[2 + index], body.output[1 + index]
            result, insert = loop.output[index], self._makers.get(end.name)
            if insert is None or insert.op_type != "SequenceInsert" or self._elements(loop.input[2 + index]) != []:
                continue
            appends = list(insert.input[:1]) == [state.name] and not any(insert.input[2:])
            alone = self._uses.get(state.name) == [insert] and end.name not in self._uses
            read = all(node.op_type in READERS for node in self._uses.get(result, []))
            if not (appends and alone and read) or self._ends[end.name] > 1 or self._ends[result]:
                continue
            kind = state.type.sequence_type.elem_type.tensor_type.elem_type
            element, whole = self._fresh(f"{end.name}_element"), self._fresh(f"{result or end.name}_stacked")
            self.stacked[result] = (whole, insert.input[1])
            same = helper.make_node("Identity", [insert.input[1]], [element], name=self._fresh(element))
            del loop.input[2 + index], body.input[2 + index], body.output[1 + index], loop.output[index]
            assign(body.node, [*(NodeProto.FromString(n.SerializeToString()) for n in body.node if n != insert), same])
            body.output.append(helper.make_tensor_value_info(element, kind, None))
            loop.output.append(whole)

    def read(self, node: NodeProto) -> list[NodeProto] | None:
        """The nodes that stand for a reader, the last with its output; None where it must stay."""
        if node.op_type not in READERS or node.domain:
            return None
        made = list[NodeProto]()
        step = _Steps(node, made, self._fresh)
        sequence = node.input[0]
        if sequence in self.stacked:
            done = self._of_stacked(node, step, *self.stacked[sequence])
        elif (elements := self._elements(sequence)) is not None:
            done = self._of_elements(node, step, elements)
        elif (split := self._split(sequence)) is not None:
            done = self._of_split(node, step, split)
        else:
            done = False
        return made if done else None

    def _of_stacked(self, node: NodeProto, step: _Steps, whole: str, element: str) -> bool:
        if node.op_type == "SequenceAt":
            return step.last("Gather", whole, node.input[1], axis=0)
        if node.op_type == "SequenceLength":
            return step.last("Gather", step("Shape", whole), step.ints(0, single=True), axis=0)
        new, axis = attribute(node, "new_axis", 0), attribute(node, "axis", 0)
        if axis == 0 and new:
            return step.last("Identity", whole)
        rank = self._rank(node, element)  # of an element
        if axis != 0:
            if rank is None:
                return False
            axis %= rank + new
            order = [*range(1, axis + 1), 0, *range(axis + 1, rank + 1)]
            if new:
                return step.last("Transpose", whole, perm=order)
            whole = step("Transpose", whole, perm=order)
        sizes = step("Shape", whole)
        front = step("Slice", sizes, step.ints(0), step.ints(axis))
        back = step("Slice", sizes, step.ints(axis + 2), step.ints(_FAR))
        return step.last("Reshape", whole, step("Concat", front, step.ints(-1), back, axis=0))

    def _of_elements(self, node: NodeProto, step: _Steps, elements: list[str]) -> bool:
        if node.op_type == "SequenceLength":
            return step.last("Identity", step.ints(len(elements), single=True))
        if node.op_type == "SequenceAt":
            position = self._value(node.input[1])
            if position is None or not -len(elements) <= position.item() < len(elements):
                return False
            return step.last("Identity", elements[int(position.item())])
        axis = attribute(node, "axis", 0)
        if attribute(node, "new_axis", 0):
            elements = [step("Unsqueeze", name, step.ints(axis)) for name in elements]
        return bool(elements) and step.last("Concat", *elements, axis=axis)

    def _of_split(self, node: NodeProto, step: _Steps, split: Split) -> bool:
        axis = step.ints(split.axis, single=True)
        if node.op_type == "SequenceLength":
            if split.sizes:
                return step.last("Identity", step.ints(len(split.sizes), single=True))
            length = step("Gather", step("Shape", split.tensor), axis, axis=0)
            up = step("Add", length, step.ints(split.size - 1, single=True))
            return step.last("Div", up, step.ints(split.size, single=True))
        if node.op_type == "ConcatFromSequence":
            if attribute(node, "axis", 0) == split.axis and not attribute(node, "new_axis", 0) and split.kept:
                return step.last("Identity", split.tensor)
            return self._of_elements(node, step, self._parts(step, split))
        position = self._value(node.input[1])
        if split.size == 1:
            if split.kept:
                one = step("Gather", split.tensor, node.input[1], axis=split.axis)
                return step.last("Unsqueeze", one, step.ints(split.axis))
            return step.last("Gather", split.tensor, node.input[1], axis=split.axis)
        if split.sizes and position is not None and -len(split.sizes) <= position.item() < len(split.sizes):
            index = int(position.item()) % len(split.sizes)
            begin = sum(split.sizes[:index])
            bounds = step.ints(begin), step.ints(begin + split.sizes[index])
            return step.last("Slice", split.tensor, *bounds, step.ints(split.axis))
        if split.sizes or not self._counts(node.input[1], position):
            return False
        start = step("Mul", step("Reshape", node.input[1], step.ints(1)), step.ints(split.size))
        return step.last("Slice", split.tensor, start, step("Add", start, step.ints(split.size)), step.ints(split.axis))

    def _parts(self, step: _Steps, split: Split) -> list[str]:
        """All parts of a split, a tensor each; none where their number is open or too large."""
        info, sizes = self._draft.info(split.tensor), split.sizes
        length = None if info is None or info.shape is None else info.shape[split.axis]
        if not sizes and isinstance(length, int):
            whole, left = divmod(length, split.size)
            sizes = (*[split.size] * min(whole, MOST_PARTS + 1), *[left] * bool(left))
        parts, begin = list[str](), 0
        for size in sizes if len(sizes) <= MOST_PARTS else ():
            bounds = step.ints(begin), step.ints(begin + size)
            part, begin = step("Slice", split.tensor, *bounds, step.ints(split.axis)), begin + size
            parts.append(part if split.kept else step("Squeeze", part, step.ints(split.axis)))
        return parts

    def _counts(self, name: str, value: np.ndarray | None) -> bool:
        """Whether an index is not negative: a constant, or the number of a turn."""
        loops = (body for node in all_nodes(self._draft.graph) if node.op_type == "Loop" for body in bodies(node))
        return value.item() >= 0 if value is not None else any(name == body.input[0].name for body in loops)

    def _elements(self, sequence: str) -> list[str] | None:
        """The names of a sequence's elements; None where they are not known."""
        node = self._makers.get(sequence)
        if node is None or node.domain:
            return None
        if node.op_type == "SequenceEmpty":
            return []
        if node.op_type == "SequenceConstruct":
            return list(node.input)
        if node.op_type not in ("Identity", "SequenceInsert", "SequenceErase"):
            return None
        before = self._elements(node.input[0])
        if before is None or node.op_type == "Identity":
            return before
        given = node.input[2:] if node.op_type == "SequenceInsert" else node.input[1:]
        value = self._value(given[0]) if given and given[0] else np.array(len(before) - (node.op_type[-1] == "e"))
        if value is None or not -len(before) <= value.item() <= len(before):
            return None
        index = int(value.item()) + (len(before) if value.item() < 0 else 0)
        if node.op_type == "SequenceInsert":
            return [*before[:index], node.input[1], *before[index:]]
        return [*before[:index], *before[index + 1 :]]

    def _split(self, sequence: str) -> Split | None:
        node = self._makers.get(sequence)
        if node is None or node.op_type != "SplitToSequence" or node.domain:
            return None
        axis = attribute(node, "axis", 0)
        if len(node.input) < 2 or not node.input[1]:
            kept = bool(attribute(node, "keepdims", 1))
            return Split(tensor=node.input[0], axis=axis, size=1, sizes=(), kept=kept)
        parts = self._value(node.input[1])
        if parts is None:
            return None
        sizes = tuple(int(size) for size in parts.reshape(-1))
        if parts.ndim == 0:
            kept = sizes[0] != 1 or bool(attribute(node, "keepdims", 1))  # as ONNX Runtime has it
            return Split(tensor=node.input[0], axis=axis, size=sizes[0], sizes=(), kept=kept) if sizes[0] > 0 else None
        return Split(tensor=node.input[0], axis=axis, size=0, sizes=sizes, kept=True)

    def _value(self, name: str) -> np.ndarray | None:
        """The values of a constant of any graph."""
        if name in self._draft.tensors:
            return self._draft.array(name)
        tensor, maker = self._held.get(name), self._makers.get(name)
        if tensor is None and maker is not None:
            tensor = constant_tensor(maker)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def _rank(self, node: NodeProto, element: str) -> int | None:
        """The axes of the elements that a ConcatFromSequence joins."""
        made, one = self._draft.info(node.output[0]), self._draft.info(element)
        if one is not None and one.shape is not None:
            return len(one.shape)
        return None if made is None or made.shape is None else len(made.shape) - attribute(node, "new_axis", 0)


class _Steps:
    """Nodes in place of one, each named after it."""

    def __init__(self, node: NodeProto, made: list[NodeProto], fresh: Callable[[str], str]) -> None:
        self._node, self._made, self._fresh = node, made, fresh

    def __call__(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node; returns what it makes."""
        name = self._fresh(f"{self._node.name}_{op_type}")
        self._made.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def last(self, op_type: str, *inputs: str, **attributes: Any) -> bool:
        """The node that makes the output; always True."""
        self(op_type, *inputs, **attributes)
        self._made[-1].output[0] = self._node.output[0]
        return True

    def ints(self, value: int, *, single: bool = False) -> str:
        """A constant of one number: a vector, or a scalar where it is `single`."""
        return self("Constant", value=numpy_helper.from_array(np.array(value if single else [value], np.int64)))
