"""What an output is: numbers, scores of classes, a segmentation or labels; and on which axis its classes lie.

graph + one sample's shapes and outputs -> the operator that ends the graph, behind what only moves or scales values
-> `Meaning` of each output, with the sentence that says why. Must not run a model, nor look at names.

| what ends the graph | the output is |
|---|---|
| Softmax, LogSoftmax (feeding no product: that is attention); values of [0, 1] that sum to 1 along one axis | classes |
| Gemm or MatMul with weights, Conv at one position or averaged: 2 scores or more, not as many as it reads | classes |
| the same of rank 3, where integers go in at its positions (tokens) | classes |
| ConvTranspose or Conv: 2 to 256 channels, not those of an image that goes in, at its positions | spatial classes |
| the same with a shortcut, as the last block of a residual network has it, but not from an input | spatial classes |
| Sigmoid, HardSigmoid behind a convolution: channels as above, or one | masks, one per channel |
| ArgMax, ArgMin, a comparison; integers behind no arithmetic, booleans, texts | labels, which are equal or not |
| anything else: boxes, images, features, energies | numbers |

Classes at positions of an image or volume (rank 4 and more) are a segmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from engines.core.nodes import attribute, ints
from engines.core.operators import ARITHMETIC, COMPARISONS, MOVERS, SOFTMAXES, family
from engines.core.shapes import propagated

Task = Literal["classification", "segmentation", "regression", "labels", "none"]
TASKS = ("auto", *get_args(Task)[:3])
MOST_CLASSES = 256  # of a segmentation: more channels than this are features, not classes
_PASSED = MOVERS - {"Expand", "Slice", "Tile"} | family("Cast Dropout Resize Upsample")
_SIGMOIDS = family("HardSigmoid Sigmoid")
_DECIDERS = family("And ArgMax ArgMin Not Or Xor") | COMPARISONS
_LABELLERS = _DECIDERS | family("NonMaxSuppression NonZero TopK Unique")
_INTEGERS = (TensorProto.INT32, TensorProto.INT64)
_FAR = 64  # operators between an output and what decides: more are no head


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What an output is taken for.

    Attributes:
        task: 'labels' are compared for equality, 'none' not at all, the others as numbers; classification and
            segmentation have classes.
        axis: of the classes, from 0; None without any.
        masks: whether the channels of a segmentation are independent; None where only the values tell.
        why: the evidence, a clause.
    """

    task: Task
    axis: int | None = None
    masks: bool | None = None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstSample:
    """Shapes of the inputs of one sample, and what the float model makes of it."""

    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, np.ndarray]


def meanings(
    model: onnx.ModelProto | Graph | None, seen: FirstSample, *, task: str = "auto", class_axis: int | None = None
) -> dict[str, Meaning]:
    """What each output is.

    Args:
        model: the float model, or what was read of it for these shapes; None where there is a runner only, whose
            values then are the evidence.
        seen: of the first sample.
        task: one of `TASKS`; other than 'auto' it holds for every output of numbers that has the axes for it.
        class_axis: axis of the classes, from the end if negative; outputs without that axis have no classes.
    """
    graph = model if isinstance(model, Graph) else Graph(model, seen) if model else None
    return {name: _meaning(graph, name, array, seen, task, class_axis) for name, array in seen.outputs.items()}


def _meaning(
    graph: Graph | None, name: str, array: np.ndarray, seen: FirstSample, task: str, class_axis: int | None
) -> Meaning:
    end = graph.end(name) if graph else None
    if end is not None and end.op_type in _DECIDERS:
        return Meaning(task="labels", why=f"{end.op_type} ends the graph")
    if array.dtype.kind not in "fV":
        return _whole(graph, name, array)
    found = _evidence(graph, name, array, seen) or Meaning(task="regression", why="nothing in the graph names classes")
    rank = array.ndim
    if class_axis is not None and (task != "auto" or found.axis is not None):
        fits = -rank <= class_axis < rank
        axis, said = (class_axis % rank, "as asked") if fits else (None, f"there is no axis {class_axis}")
    elif found.axis is not None or task == "regression":
        axis, said = found.axis, found.why
    else:
        axis, said = _guessed(array.shape, seen) if task != "auto" else (None, found.why)
    if task == "auto":
        if class_axis is None or found.axis is None:
            return found
        why = f"{found.why}; classes on axis {class_axis} {said}"
        return Meaning(task=found.task, axis=axis, masks=found.masks, why=why) if axis is not None else _numbers(said)
    enough = rank >= (3 if task == "segmentation" else 2) and array.size
    if task == "regression" or axis is None or not enough:
        return _numbers("as asked" if task == "regression" else "it has no axis of classes")
    size = array.shape[axis]
    if size > MOST_CLASSES and task == "segmentation":
        return _numbers(f"axis {axis} has {size} channels: features, not classes")
    kind: Task = "segmentation" if task == "segmentation" else "classification"
    return Meaning(task=kind, axis=axis, masks=found.masks, why=f"as asked; classes on axis {axis}: {said}")


def _numbers(why: str) -> Meaning:
    return Meaning(task="regression", why=why)


def _whole(graph: Graph | None, name: str, array: np.ndarray) -> Meaning:
    """Of an output that is no float: codes of a computation, such as pixels, are numbers; what an index is, is not."""
    if array.dtype.kind in "iu":
        end = graph.end(name) if graph else None
        if end is not None and end.op_type in _LABELLERS:
            return Meaning(task="labels", why=f"{end.op_type} ends the graph")
        if graph.cast(name) if graph else array.dtype.itemsize < 4:
            return _numbers(f"{array.dtype.name} made from numbers")
    return Meaning(task="labels", why=f"it is of type {'text' if array.dtype.kind in 'OUS' else array.dtype.name}")


def _evidence(graph: Graph | None, name: str, array: np.ndarray, seen: FirstSample) -> Meaning | None:
    """What the end of the graph says, else what the values say; None where neither says anything."""
    if not array.size or array.ndim < 2:
        return None
    found = graph.head(name, array.shape) if graph else None
    if found is not None or (graph and graph.attention(name)):
        return found
    values = array.astype(np.float64)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        return None
    axes = [a for a in range(1, array.ndim) if array.shape[a] > 1 and np.abs(values.sum(a) - 1).max() < 1e-3]
    if len(axes) != 1:
        return None
    return _classes(array.shape, axes[0], f"its values sum to 1 along axis {axes[0]}")


def _classes(shape: Sequence[int], axis: int, why: str) -> Meaning:
    """Classes on an axis: at positions of an image or volume a segmentation."""
    positions = [n for i, n in enumerate(shape) if i not in (0, axis)]
    spatial = len(shape) >= 4 and math.prod(positions) > 1 and shape[axis] <= MOST_CLASSES
    return Meaning(task="segmentation" if spatial else "classification", axis=axis, masks=False, why=why)


def _guessed(shape: Sequence[int], seen: FirstSample) -> tuple[int | None, str]:
    """The axis of the classes where the graph does not say."""
    rank = len(shape)
    for given in seen.inputs.values():
        other = [i for i in range(1, rank) if i >= len(given) or given[i] != shape[i]]
        if len(given) == rank and rank > 2 and len(other) == 1:
            return other[0], "a guess, the only axis that is not as in the input: --class-axis tells"
    if rank < 2:
        return None, ""
    return (2, "a guess, the last of three: --class-axis tells") if rank == 3 else (1, "a guess: --class-axis tells")


class Graph:
    """The float model with the shapes of one sample: of large models the slow part, good for all of these shapes."""

    def __init__(self, model: onnx.ModelProto, seen: FirstSample) -> None:
        """Read the model; of the sample only shapes are kept."""
        self._inputs = dict(seen.inputs)
        self._producers = {name: node for node in model.graph.node for name in node.output if name}
        self._stored = {t.name: tuple(t.dims) for t in model.graph.initializer}
        self._stored |= {n.output[0]: () for n in model.graph.node if n.op_type == "Constant"}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._tokens = {v.name for v in model.graph.input if v.type.tensor_type.elem_type in _INTEGERS}
        self._opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
        self._shapes: dict[str, tuple[int, ...]] = {**_inferred(model, seen), **self._stored}
        self._shapes |= {name: array.shape for name, array in seen.outputs.items()}

    def path(self, name: str) -> Iterator[NodeProto]:
        """The nodes from an output back to the first that is more than a movement, a cast or a constant factor."""
        for _ in range(_FAR):
            node = self._producers.get(name)
            if node is None:
                return
            yield node
            if node.op_type in _PASSED:
                name = node.input[0]
            elif node.op_type in ARITHMETIC and (free := [i for i in node.input if not self._constant(i)]):
                if len(free) != 1:
                    return
                name = free[0]
            else:
                return

    def end(self, name: str) -> NodeProto | None:
        """The node that decides what an output is."""
        *_, last = [None, *self.path(name)]
        return last

    def cast(self, name: str) -> bool:
        """Whether an integer output is a cast or a code of numbers that are no integers."""
        for node in self.path(name):
            if node.op_type == "QuantizeLinear":
                return True
            if node.op_type == "Cast":
                before = self._producers.get(node.input[0])
                return before is not None and before.op_type not in _LABELLERS
        return False

    def attention(self, name: str) -> bool:
        """Whether an output is a softmax that is multiplied with values."""
        end = self.end(name)
        if end is None or end.op_type not in SOFTMAXES:
            return False
        names = {end.output[0], *(n.output[0] for n in self.path(name))}
        return any(reader.op_type in ("MatMul", "Einsum") for n in names for reader in self._readers.get(n, ()))

    def head(self, name: str, shape: Sequence[int]) -> Meaning | None:
        """The evidence of the graph's end; of joined parts, all must be of one kind."""
        nodes = list(self.path(name))
        if not nodes:
            return None
        end = nodes[-1]
        before = nodes[:-1]
        if end.op_type == "Concat":
            return self._joined(end, before, shape)
        made = end.output[0]
        if end.op_type in SOFTMAXES:
            axis = self._softmax_axis(end)
            where = self._forward(axis, made, before)
            if where is None or shape[where] < 2 or self.attention(name):
                return None
            return _classes(shape, where, f"{end.op_type} along axis {where} ends the graph")
        if end.op_type in _SIGMOIDS:
            return self._masks(end, before, shape)
        if end.op_type in ("Gemm", "MatMul"):
            return self._scores(end, before, shape)
        conv = self._producers.get(end.input[0]) if end.op_type == "GlobalAveragePool" else self._added(end)
        if conv is None or conv.op_type not in ("Conv", "ConvTranspose"):
            return None
        return self._channels(end, conv, before, shape)

    def _added(self, end: NodeProto) -> NodeProto:
        """The convolution that a residual block adds to what it reads; a sum with an input is another image."""
        made = [self._producers.get(name) for name in end.input] if end.op_type == "Add" else []
        convolutions = [node for node in made if node is not None and node.op_type in ("Conv", "ConvTranspose")]
        return convolutions[0] if convolutions and None not in made else end

    def _joined(self, end: NodeProto, before: list[NodeProto], shape: Sequence[int]) -> Meaning | None:
        parts = [self.head(i, self._shapes[i]) if i in self._shapes else None for i in end.input]
        first = parts[0]
        if first is None or first.axis is None or any(p is None or p.axis != first.axis for p in parts):
            return None
        rank = len(self._shapes[end.input[0]])
        where = self._forward(first.axis, end.output[0], before)
        if where is None or attribute(end, "axis", 0) % rank == first.axis or {p.masks for p in parts if p} != {False}:
            return None
        return _classes(shape, where, f"{first.why}, in each of {len(parts)} joined parts")

    def _softmax_axis(self, node: NodeProto) -> int | None:
        """Its axis; before opset 13 it flattened all axes from that one on, which is along it if the others are 1."""
        shape = self._shapes.get(node.output[0])
        if shape is None:
            return None
        axis = attribute(node, "axis", -1 if self._opset >= 13 else 1)
        if not -len(shape) <= axis < len(shape):
            return None
        axis %= len(shape)
        return axis if self._opset >= 13 or math.prod(shape[axis + 1 :]) == 1 else None

    def _scores(self, end: NodeProto, before: list[NodeProto], shape: Sequence[int]) -> Meaning | None:
        """A product with weights: its columns are scores, unless it only turns features or gives boxes."""
        weight, made = self._weight(end.input[1]), self._shapes.get(end.output[0])
        if weight is None or made is None or len(weight) != 2:
            return None
        turned = end.op_type == "Gemm" and attribute(end, "transB", 0)
        reads, gives = weight[::-1] if turned else weight
        where = self._forward(len(made) - 1, end.output[0], before)
        tokens = any(given == tuple(shape[:2]) for name, given in self._inputs.items() if name in self._tokens)
        if where is None or not (len(shape) == 2 or (len(shape) == 3 and tokens)):
            return None
        if not 2 <= gives != reads or shape[where] != gives:
            return None
        return _classes(shape, where, f"{end.op_type} to {gives} scores ends the graph")

    def _channels(
        self, end: NodeProto, conv: NodeProto, before: list[NodeProto], shape: Sequence[int]
    ) -> Meaning | None:
        """The channels of a convolution are classes: at one position or their means as scores are, or at positions."""
        where, made = self._forward(1, end.output[0], before), self._shapes.get(end.output[0])
        if where is None or made is None or shape[where] != made[1] or made[1] < 2:
            return None
        if math.prod(made[2:]) == 1:
            weight = self._weight(conv.input[1])
            if weight is None or len(weight) < 2 or weight[1] == made[1]:
                return None
            return _classes(shape, where, f"{conv.op_type} to {made[1]} scores ends the graph")
        if not (self._at_positions(shape, where) or self._at_positions(made, 1)) or made[1] > MOST_CLASSES:
            return None
        return _classes(shape, where, f"{conv.op_type} to {made[1]} channels at the input's positions ends the graph")

    def _masks(self, end: NodeProto, before: list[NodeProto], shape: Sequence[int]) -> Meaning | None:
        """Sigmoid channels at the positions of an input, behind a convolution."""
        inside = list(self.path(end.input[0]))
        if not inside or self._added(inside[-1]).op_type not in ("Conv", "ConvTranspose"):
            return None
        where = self._forward(1, inside[-1].output[0], [*before, end, *inside[:-1]])
        if where is None or len(shape) < 4 or not self._at_positions(shape, where) or shape[where] > MOST_CLASSES:
            return None
        why = f"{end.op_type} of {shape[where]} channels at the input's positions ends the graph"
        return Meaning(task="segmentation", axis=where, masks=True, why=why)

    def _at_positions(self, shape: Sequence[int], axis: int) -> bool:
        """Whether the other axes are those of an input.

        An image with as many channels as an image that goes in is another image; volumes of four modalities are often
        cut into four classes.
        """
        positions = sorted(n for i, n in enumerate(shape) if i not in (0, axis))
        if math.prod(positions) <= 1:
            return False
        for given in self._inputs.values():
            for at in (1, len(given) - 1) if len(given) == len(shape) else ():
                if sorted(n for i, n in enumerate(given) if i not in (0, at)) == positions:
                    return given[at] == 1 or given[at] != shape[axis] or len(shape) > 4
        return False

    def _constant(self, name: str) -> bool:
        """Whether a tensor is stored, perhaps moved or dequantized."""
        for _ in range(_FAR):
            if not name or name in self._stored:
                return True
            node = self._producers.get(name)
            if node is None or node.op_type not in MOVERS | {"Cast", "DequantizeLinear"}:
                return False
            name = node.input[0]
        return False

    def _weight(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name) if self._constant(name) else None

    def _forward(self, axis: int | None, tensor: str, nodes: Sequence[NodeProto]) -> int | None:
        """Where an axis of a tensor is behind these nodes, the last of which reads it; None if it is lost."""
        for node in reversed(nodes):
            if axis is None:
                return None
            given, made = self._shapes.get(tensor), self._shapes.get(node.output[0])
            tensor = node.output[0]
            if node.op_type == "Transpose":
                order = ints(node, "perm", list(range(len(given or ())))[::-1])
                axis = order.index(axis) if axis in order else None
            elif given is None or made is None:
                axis = axis if node.op_type not in MOVERS else None
            elif node.op_type in MOVERS:
                axis = _moved(axis, given, made)
            elif len(given) != len(made) or given[axis] != made[axis]:
                axis = None
        return axis


def _moved(axis: int, given: Sequence[int], made: Sequence[int]) -> int | None:
    """The axis of the same size with as many elements before it; None where there is none, or it is one of several."""
    size, before = given[axis], math.prod(given[:axis])
    found = [b for b, n in enumerate(made) if n == size and math.prod(made[:b]) == before]
    return found[0] if len(found) == 1 else None


def _inferred(model: onnx.ModelProto, seen: FirstSample) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors for the shapes of the sample, as far as onnx can infer them."""
    shaped = onnx.ModelProto()
    shaped.CopyFrom(model)
    del shaped.graph.value_info[:]
    for info in shaped.graph.input:
        if (sizes := seen.inputs.get(info.name)) is not None:
            dims: Any = info.type.tensor_type.shape.dim
            del dims[:]
            for size in sizes:
                dims.add().dim_value = size
    try:
        inferred = propagated(shaped).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    found = {}
    for info in (*inferred.value_info, *inferred.input):
        tensor = info.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            found[info.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return found
