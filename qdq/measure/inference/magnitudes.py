"""The largest magnitude of every float tensor of a model, measured in the run that computes the tensors.

Model -> the same model with reductions to scalars behind every float tensor, in the bodies of If, Loop and Scan too ->
`WatchedSession` -> for each sample the wanted tensors and the `Magnitude` of all others, none of which is copied out.
Of a tensor with infinities or NaN the finite values count, and it is said that it has others: where the sum of squares
tells so, the run is repeated with reductions that look at each value. This module must not judge a magnitude.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engines.core.nodes import all_graphs
from engines.core.operators import family
from engines.core.shapes import inferred
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.model.nodes import Names, all_nodes, bodies
from qdq.passes.rewrites.edit import altered

# The output holds the magnitudes of the first input, each at least once, and no others.
SAME = family("Abs DepthToSpace Expand Flatten Identity Neg Reshape SpaceToDepth Squeeze Tile Transpose Unsqueeze")
_UNSEEN = {"high": -math.inf, "low": math.inf, "squares": 0.0}  # of no values at all


class Magnitude(NamedTuple):
    """The largest magnitude of the finite values, and whether all values were finite."""

    amax: float
    finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Scalars of one tensor, or one for each run of the body that it is in: names of outputs."""

    tensor: str
    elem: int
    high: str
    low: str
    squares: str

    @property
    def outputs(self) -> tuple[str, str, str]:
        """All three."""
        return self.high, self.low, self.squares


class WatchedSession:
    """A `Session` that measures every float tensor beside the wanted ones; may be called from several threads."""

    def __init__(self, model: Model, tensors: Sequence[str], **options: Any) -> None:
        """Take a prepared model and the tensors whose values are wanted; `options` are those of `Session`."""
        self._model, self._tensors, self._options = model, tuple(tensors), options
        self._fed = [i.name for i in model.inputs if _elem(i.dtype)]
        self._lock = threading.Lock()
        self._current = self._opened(frozenset())

    def __call__(self, sample: Sample) -> tuple[dict[str, npt.NDArray[np.floating]], dict[str, Magnitude]]:
        """Run one sample: the wanted tensors, and the magnitude of each tensor that held a value.

        Raises:
            InputError: onnxruntime cannot run the model on the sample.
        """
        while True:
            current = self._current
            found = current.session(sample)
            read = {p: [np.asarray(found[name], np.float64) for name in p.outputs] for p in current.probes}
            odd = {p.tensor for p, (_, _, squares) in read.items() if not np.isfinite(squares).all()}
            if odd <= current.careful:
                break
            with self._lock:
                if not odd <= self._current.careful:
                    self._current = self._opened(self._current.careful | odd)
        seen: dict[str, Magnitude] = {}
        for name in self._fed:
            _widen(seen, name, _of(np.asarray(sample[name])))
        for probe, (high, low, squares) in read.items():
            amax = max(float(np.max(high, initial=-np.inf)), -float(np.min(low, initial=np.inf)))
            if amax >= 0:  # else the tensor was empty, or its branch not taken
                _widen(seen, probe.tensor, Magnitude(amax=amax, finite=bool(np.isfinite(squares).all())))
        for name, source in current.same.items():
            if source in seen:
                seen[name] = seen[source]
        return {name: found[name] for name in self._tensors if name in found}, seen

    def _opened(self, careful: frozenset[str]) -> _Watched:
        draft = _Draft(self._model, careful)
        outputs = [name for probe in draft.probes for name in probe.outputs]
        session = Session(draft.model, [*self._tensors, *outputs], in_order=True, **self._options)
        return _Watched(session=session, probes=tuple(draft.probes), same=draft.same, careful=careful)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watched:
    """An open session, its probes, the tensors that have the magnitude of another, and those looked at value by value.

    Of the latter `squares` is the sum of what the tensor times zero is: NaN where a value is not finite, else 0.
    """

    session: Session
    probes: tuple[Probe, ...]
    same: Mapping[str, str]
    careful: frozenset[str]


def _widen(seen: dict[str, Magnitude], name: str, found: Magnitude | None) -> None:
    if found is not None:
        old = seen.get(name, found)
        seen[name] = Magnitude(amax=abs(max(old.amax, found.amax)), finite=old.finite and found.finite)


def _of(values: npt.NDArray[Any]) -> Magnitude | None:
    """The magnitude of an array, None where it is empty."""
    if not values.size:
        return None
    amax = max(float(values.max()), -float(values.min()))
    if math.isfinite(amax):
        return Magnitude(amax=amax, finite=True)
    finite = values[np.isfinite(values)]
    return Magnitude(amax=float(np.abs(finite).max(initial=0)), finite=False)


_ELEM = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


def _elem(dtype: str) -> int:
    """The element type of a float tensor, 0 for what is no float."""
    return int(_ELEM.get(dtype, 0))


@dataclass(slots=True)
class _Draft:
    """The model with probes, in the making."""

    source: Model
    careful: Collection[str]
    model: Model = field(init=False)
    probes: list[Probe] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)
    _names: Names = field(init=False)
    _inner: dict[str, int] = field(init=False)
    _constants: dict[tuple[float, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source = self.source
        nested = [inner for node in source.graph.node for body in bodies(node) for inner in all_nodes(body)]
        held = {name for node in nested for name in (*node.input, *node.output)}
        self._names = Names(source.names() | held)
        self._inner = _inner_types(source.proto) if nested else {}
        proto = ModelProto()
        proto.CopyFrom(source.proto)
        del proto.graph.node[:]
        for node in source.graph.node:
            copy = altered(node)
            reductions, probes = self._in_bodies(copy)
            proto.graph.node.extend([copy, *reductions])
            self.probes.extend(probes)
            for name in filter(None, node.output):
                elem = self._elem(name)
                if elem and self._repeats(node):
                    self.same[name] = self.same.get(node.input[0], node.input[0])
                elif elem:
                    probe, added = self._probe(name, elem)
                    proto.graph.node.extend(added)
                    self.probes.append(probe)
        for (value, kind), name in self._constants.items():
            array = np.array(value, helper.tensor_dtype_to_np_dtype(kind))
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        self.model = source.replace(proto)

    def _elem(self, name: str) -> int:
        info = self.source.info(name)
        return 0 if info is None else _elem(info.dtype)

    def _repeats(self, node: NodeProto) -> bool:
        """Whether a node's output has the magnitudes of a tensor that is measured."""
        measured = node.op_type in SAME and not node.domain and self._elem(node.input[0])
        return bool(measured) and not self.source.is_constant(node.input[0])

    def _in_bodies(self, node: NodeProto) -> tuple[list[NodeProto], list[Probe]]:
        """Put probes into the bodies of a node that is a copy, as further outputs of it."""
        held = list(bodies(node))
        if not held or node.op_type not in ("If", "Loop", "Scan"):
            return [], []
        found = [self._body(body) for body in held]
        probes = []
        for index, inside in enumerate(found):
            for probe in inside:
                for place, body in enumerate(held):
                    if place == index:
                        _end(body, probe)
                    else:  # the branch that is not taken has seen nothing
                        absent = [self._constant(_UNSEEN[what], probe.elem) for what in _UNSEEN]
                        here = self._fresh(probe.tensor, probe.elem)
                        body.node.extend(map(self._same_as, absent, here.outputs))
                        _end(body, here)
                probes.append(self._fresh(probe.tensor, probe.elem))
        carried = len(held[0].output) - 3 * len(probes) - (node.op_type == "Loop")
        node.output.extend(self._name("unread") for _ in range(carried - len(node.output)))
        node.output.extend(name for probe in probes for name in probe.outputs)
        for entry in node.attribute:
            if entry.name in ("scan_output_axes", "scan_output_directions"):
                entry.ints.extend([0] * (3 * len(probes)))
        return [], probes

    def _body(self, body: GraphProto) -> list[Probe]:
        """Put probes behind the tensors of a body; they are to become outputs of it."""
        nodes, probes = [], []
        for name in (v.name for v in body.input):
            if elem := self._inner.get(name, 0):
                probe, added = self._probe(name, elem)
                nodes += added
                probes.append(probe)
        for node in list(body.node):
            copy = altered(node)
            _, inside = self._in_bodies(copy)
            nodes.append(copy)
            for probe in inside:  # one value for each run of the inner body
                joined = self._fresh(probe.tensor, probe.elem)
                nodes += map(self._reduce, ("ReduceMax", "ReduceMin", "ReduceSum"), probe.outputs, joined.outputs)
                probes.append(joined)
            for name in filter(None, node.output):
                if elem := self._inner.get(name, 0):
                    probe, added = self._probe(name, elem)
                    nodes += added
                    probes.append(probe)
        del body.node[:]
        body.node.extend(nodes)
        return probes

    def _probe(self, tensor: str, elem: int) -> tuple[Probe, list[NodeProto]]:
        """The reductions behind a tensor; in double precision unless it is float32."""
        kind = TensorProto.FLOAT if elem == TensorProto.FLOAT else TensorProto.DOUBLE
        probe, read, nodes = self._fresh(tensor, kind), tensor, list[NodeProto]()
        if elem != kind:
            read = self._name("wide")
            nodes.append(helper.make_node("Cast", [tensor], [read], name=read, to=kind))
        last = "ReduceSumSquare", read
        if tensor in self.careful:
            largest, zero = self._constant(_LARGEST[kind], kind), self._constant(0.0, kind)
            size, fits, finite, lost = map(self._name, ("size", "fits", "finite", "lost"))
            nodes += [
                helper.make_node("Abs", [read], [size], name=size),
                helper.make_node("LessOrEqual", [size, largest], [fits], name=fits),
                helper.make_node("Where", [fits, read, zero], [finite], name=finite),
                helper.make_node("Mul", [read, zero], [lost], name=lost),
            ]
            read, last = finite, ("ReduceSum", lost)
        pairs = (("ReduceMax", read), ("ReduceMin", read), last)
        nodes += [self._reduce(op, name, end) for (op, name), end in zip(pairs, probe.outputs, strict=True)]
        return probe, nodes

    def _fresh(self, tensor: str, elem: int) -> Probe:
        high, low, squares = (self._name(what) for what in _UNSEEN)
        return Probe(tensor=tensor, elem=elem, high=high, low=low, squares=squares)

    def _name(self, what: str) -> str:
        return self._names.fresh(f"magnitude_{what}")

    def _reduce(self, op: str, read: str, end: str) -> NodeProto:
        return helper.make_node(op, [read], [end], name=end, keepdims=0)

    def _same_as(self, read: str, end: str) -> NodeProto:
        return helper.make_node("Identity", [read], [end], name=end)

    def _constant(self, value: float, elem: int) -> str:
        if (value, elem) not in self._constants:
            self._constants[value, elem] = self._name("constant")
        return self._constants[value, elem]


_LARGEST = {TensorProto.FLOAT: float(np.finfo(np.float32).max), TensorProto.DOUBLE: float(np.finfo(np.float64).max)}


def _end(body: GraphProto, probe: Probe) -> None:
    body.output.extend(helper.make_tensor_value_info(name, probe.elem, []) for name in probe.outputs)


def _inner_types(proto: ModelProto) -> dict[str, int]:
    """Name -> element type of the float tensors in all bodies, where that is known and the same in each."""
    found: dict[str, set[int]] = {}
    for body in list(all_graphs(inferred(proto)))[1:]:
        for value in (*body.input, *body.output, *body.value_info):
            found.setdefault(value.name, set()).add(value.type.tensor_type.elem_type)
    return {name: kinds.pop() for name, kinds in found.items() if len(kinds) == 1 and kinds <= set(_ELEM.values())}
