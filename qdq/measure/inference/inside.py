"""Values of tensors in the bodies of If, Loop and Scan, given out as those of other tensors are.

Model + tensors -> the same model, in which a sequence of each goes through all nodes that hold it: through both
branches of an If, as one more carried value of a Loop; each run of a body adds the value that it sees. A Scan carries
no sequences, so a Loop beside it does the same once more. -> `joined`: one array for all runs.
It must not change what the model computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from qdq.model.model import Model
from qdq.model.nodes import Names, all_graphs, attribute, bodies, controls, ints, made
from qdq.passes.rewrites.edit import altered

Sequences = dict[str, str]  # tensor -> the sequence that holds what was seen of it so far


def gathered(model: Model, tensors: Collection[str]) -> tuple[Model, Sequences]:
    """The model with a sequence of the values of each tensor, and tensor -> its name; `tensors` are in bodies."""
    if not tensors:
        return model, {}
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    draft = _Draft(model, tensors)
    nodes, current = draft.start()
    nodes += draft.through(model.graph.node, current)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(draft.constants)
    return model.replace(proto), current


def joined(values: Sequence[npt.NDArray[np.floating]]) -> npt.NDArray[np.floating] | None:
    """All values as one array whose channels lie where each value has them; None where there are none.

    They are joined along the first axis in which they differ, else along the first; those that differ in other axes
    too are padded with the values at their ends, which leaves the range what it is.
    """
    arrays = [value if value.ndim > 1 else value.reshape(1, -1) for value in values if value.size]
    if not arrays:
        return None
    arrays = [array for array in arrays if array.ndim == arrays[0].ndim]
    shapes = np.array([array.shape for array in arrays])
    differ = [axis for axis in range(shapes.shape[1]) if len(set(shapes[:, axis])) > 1]
    along = differ[0] if differ else 0
    most = shapes.max(axis=0)
    most[along] = 0
    pads = [[(0, max(n - size, 0)) for n, size in zip(most, a.shape, strict=True)] for a in arrays]
    return np.concatenate([np.pad(a, pad, mode="edge") for a, pad in zip(arrays, pads, strict=True)], axis=along)


class _Draft:
    """The graphs of a model while sequences are put through them."""

    def __init__(self, model: Model, tensors: Collection[str]) -> None:
        self._elem = {t: helper.np_dtype_to_tensor_dtype(np.dtype(model.dtype(t))) for t in sorted(tensors)}
        self._names = Names(model.names())
        self.constants: list[TensorProto] = []

    def start(self) -> tuple[list[NodeProto], Sequences]:
        """Empty sequences."""
        nodes = [self._node("SequenceEmpty", [], dtype=elem) for elem in self._elem.values()]
        return nodes, {tensor: node.output[0] for tensor, node in zip(self._elem, nodes, strict=True)}

    def through(self, nodes: Iterable[NodeProto], current: Sequences) -> list[NodeProto]:
        """The nodes of a graph, with what adds to sequences; `current` becomes those at its end."""
        found = list[NodeProto]()
        for node in nodes:
            copy = altered(node)
            held = [body for body in bodies(copy) if controls(copy)]
            inner = {name for body in held for graph in all_graphs(body) for name in _defined(graph)}
            inside = [tensor for tensor in self._elem if tensor in inner]
            found.append(copy)
            if inside and copy.op_type == "Scan":
                before, copy = self._as_loop(copy)
                found += [*before, copy]
            if inside and copy.op_type == "If":
                self._branches(copy, inside, current)
            elif inside:
                self._loop(copy, inside, current)
            found += self._added(node.output, current)
        return found

    def _added(self, names: Iterable[str], current: Sequences) -> list[NodeProto]:
        """What adds tensors that are wanted to their sequences."""
        found = []
        for name in names:
            if name in self._elem:
                found.append(self._node("SequenceInsert", [current[name], name]))
                current[name] = found[-1].output[0]
        return found

    def _branches(self, node: NodeProto, inside: list[str], current: Sequences) -> None:
        for body in bodies(node):
            here = dict(current)
            nodes = self.through(body.node, here)
            ends = [self._node("Identity", [here[tensor]]) for tensor in inside]
            self._rebuild(body, [*nodes, *ends], body.input, [*body.output, *map(self._typed, _first(ends), inside)])
        self._give(node, inside, current, len(node.output))

    def _loop(self, node: NodeProto, inside: list[str], current: Sequences) -> None:
        (body,) = bodies(node)
        carried = len(body.input) - 2
        node.input.extend(current[tensor] for tensor in inside)
        here = dict(current)
        starts = [self._names.fresh(f"{tensor}_sequence") for tensor in inside]
        here.update(zip(inside, starts, strict=True))
        nodes = self._added([v.name for v in body.input], here)
        nodes += self.through(body.node, here)
        inputs = [*body.input, *map(self._typed, starts, inside)]
        ends = [self._typed(here[tensor], tensor) for tensor in inside]
        self._rebuild(body, nodes, inputs, [*body.output[: carried + 1], *ends, *body.output[carried + 1 :]])
        self._give(node, inside, current, carried)

    def _as_loop(self, scan: NodeProto) -> tuple[list[NodeProto], NodeProto]:
        """A Loop that runs the body of a Scan and gives out nothing, and the nodes that count its turns."""
        (body,) = bodies(scan := altered(scan))
        count = attribute(scan, "num_scan_inputs", 1)
        states = len(scan.input) - count
        axes, back = (ints(scan, f"scan_input_{what}", [0] * count) for what in ("axes", "directions"))
        size = self._node("Shape", [scan.input[states]])
        turns = self._node("Gather", [size.output[0], self._constant([axes[0]])])
        last = self._node("Sub", [turns.output[0], self._constant([1])])
        turn, going = self._names.fresh("turn"), self._names.fresh("going")
        nodes = []
        for index in range(count):
            at = [turn]
            if back[index]:
                nodes.append(self._node("Sub", [last.output[0], turn]))
                nodes.append(self._node("Squeeze", [nodes[-1].output[0]]))
                at = list(nodes[-1].output)
            name = body.input[states + index].name
            nodes.append(self._node("Gather", [scan.input[states + index], *at], name, axis=axes[index]))
        on = self._node("Identity", [going])
        inputs = [
            helper.make_tensor_value_info(turn, TensorProto.INT64, []),
            helper.make_tensor_value_info(going, TensorProto.BOOL, []),
            *body.input[:states],
        ]
        ends = [helper.make_tensor_value_info(on.output[0], TensorProto.BOOL, []), *body.output[:states]]
        self._rebuild(body, [*nodes, *body.node, on], inputs, ends)
        loop = self._node("Loop", [turns.output[0], "", *scan.input[:states]], body=body)
        loop.output[:] = [self._names.fresh(f"{name}_again") for name in scan.output[:states]]
        return [size, turns, last], loop

    def _rebuild(
        self,
        body: GraphProto,
        nodes: Iterable[NodeProto],
        inputs: Iterable[ValueInfoProto],
        outputs: Iterable[ValueInfoProto],
    ) -> None:
        """Give a body other nodes and ends; those that it has may be among them."""
        new = GraphProto(name=body.name, node=nodes, input=inputs, output=outputs, initializer=body.initializer)
        body.CopyFrom(new)

    def _give(self, node: NodeProto, inside: list[str], current: Sequences, place: int) -> None:
        """Let a node give the sequences out, as its outputs from `place` on."""
        made = [self._names.fresh(f"{tensor}_sequence") for tensor in inside]
        outputs = [*node.output, *(self._names.fresh("unread") for _ in range(place - len(node.output)))]
        node.output[:] = [*outputs[:place], *made, *outputs[place:]]
        current.update(zip(inside, made, strict=True))

    def _typed(self, name: str, tensor: str) -> ValueInfoProto:
        return helper.make_tensor_sequence_value_info(name, self._elem[tensor], None)

    def _constant(self, values: Sequence[int]) -> str:
        name = self._names.fresh("sequence_constant")
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _node(self, op_type: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> NodeProto:
        name = self._names.fresh(f"sequence_{op_type}")
        return helper.make_node(op_type, list(inputs), [output or name], name=name, **attributes)


def _defined(graph: GraphProto) -> set[str]:
    return {*(v.name for v in graph.input), *made(graph.node)}


def _first(nodes: Iterable[NodeProto]) -> list[str]:
    return [node.output[0] for node in nodes]
