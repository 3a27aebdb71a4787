"""Where a compiled engine rounds: only what a kernel writes for another, in the type in which it writes it.

model + layer table -> `roundings`: each float tensor stays inside a kernel, leaves one in a type, or is not found ->
`Written` for `engines.core.arithmetic`. A node belongs to the kernels whose ONNX nodes name it; one that no kernel
names and that only moves or casts, to those of what it reads. A tensor leaves where a kernel that does not have its
node reads it; its type is that of what the one writes and the other reads. Codes of weights are exact.

Kernels are taken to compute in FP32: their own casts, and the TF32 or FP16 sums of some, stand in no table. Must not
guess: a tensor that no kernel accounts for is rounded as the file says, and named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto

from engines.backends.layers import BITS, SYNCHRONIZATION, KernelTensor, Layer, LayerTable
from engines.core.arithmetic import LOW, Written, float_types
from engines.core.nodes import label, reads
from engines.core.operators import CONTRACTIONS, PICKERS
from engines.core.shapes import inferred

FLOATS = {"float32", *LOW}
_UNNAMED = PICKERS | {"Cast"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roundings:
    """Where an engine rounds a model's tensors, how many float tensors that accounts for, and which it does not."""

    written: Written
    mapped: int
    unmapped: tuple[str, ...]

    @property
    def note(self) -> str:
        """What was found, in a sentence."""
        count = len(self.unmapped)
        rounded = sum(kind in LOW for kind in self.written.types.values())
        lost = f"; {count} are rounded as the file says, the first {self.unmapped[0]!r}" if count else ""
        return f"{self.mapped} of {self.mapped + count} float tensors are found in the kernels, {rounded} rounded{lost}"


def roundings(model: ModelProto, table: LayerTable) -> Roundings:
    """Where the engine of a layer table rounds the tensors of the model that it was compiled from.

    Args:
        model: external data is not read. Nodes inside its bodies and functions are not looked up.
        table: of an engine of this model.
    """
    return _Map(model, table).found()


class _Map:
    """The kernels of each node, and what passes between kernels."""

    def __init__(self, model: ModelProto, table: LayerTable) -> None:
        self._graph: GraphProto = model.graph
        self._kernels: list[Layer] = [layer for layer in table.layers if layer.kind not in SYNCHRONIZATION]
        self._types = float_types(model)
        self._sizes = _sizes(inferred(model))
        self._fixed = {t.name for t in model.graph.initializer}
        self._outputs = {o.name for o in model.graph.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(reads(node)):
                self._readers.setdefault(name, []).append(node)
        self._homes = self._find_homes()

    def _find_homes(self) -> dict[str, list[int]]:
        """Label of a node -> its kernels, in their order."""
        named: dict[str, list[int]] = {}
        for index, kernel in enumerate(self._kernels):
            for name in dict.fromkeys(kernel.onnx_nodes):
                named.setdefault(name, []).append(index)
        makers: dict[str, NodeProto] = {}
        homes: dict[str, list[int]] = {}
        for node in self._graph.node:
            if all(name in self._fixed for name in reads(node)):
                self._fixed.update(node.output)
            where = set(named.get(label(node), ()))
            if not where and node.op_type in _UNNAMED:
                sources = [makers[name] for name in node.input if name in makers]
                where = {kernel for source in sources for kernel in homes[label(source)]}
            homes[label(node)] = sorted(where)
            makers |= dict.fromkeys(node.output, node)
        return homes

    def found(self) -> Roundings:
        """All float tensors that depend on the model's inputs, and the weights that kernels hold as codes."""
        types: dict[str, str] = {}
        inside: dict[str, frozenset[str]] = {}
        lost: list[str] = []
        for node in self._graph.node:
            for name in node.output:
                home = self._homes[label(node)]
                if name not in self._types:
                    continue
                if name in self._fixed:
                    if self._multiplies_codes(node):
                        types[name] = "float32"
                    continue
                outside = [r for r in self._readers.get(name, ()) if self._leaves(node, r)]
                leaves = bool(outside) or name in self._outputs
                kind = self._written_type(name, home, outside) if home and leaves else "float32"
                if not home or not kind:
                    lost.append(name)
                    continue
                types[name] = kind
                apart = {label(reader) for reader in outside}
                inside[name] = frozenset(label(r) for r in self._readers.get(name, ()) if label(r) not in apart)
        return Roundings(written=Written(types=types, inside=inside), mapped=len(inside), unmapped=tuple(lost))

    def _multiplies_codes(self, node: NodeProto) -> bool:
        """Whether the kernels of a weight's DequantizeLinear hold its codes, and so never its rounded values."""
        held = (tensor for kernel in self._homes[label(node)] for tensor in self._kernels[kernel].constants)
        return node.op_type == "DequantizeLinear" and any(t.dtype not in FLOATS and BITS[t.dtype] <= 8 for t in held)

    def _leaves(self, node: NodeProto, reader: NodeProto) -> bool:
        """Whether a reader takes a tensor of a node from another kernel.

        A product is summed in its first kernel; others that name it go on from what that wrote.
        """
        home, other = self._homes[label(node)], self._homes[label(reader)]
        if node.op_type in CONTRACTIONS:
            home = home[:1]
        return bool(other) and not set(home) & set(other)

    def _written_type(self, name: str, home: list[int], outside: Iterable[NodeProto]) -> str:
        """The type in which a tensor is written by its kernels for readers in others; "" where none is found."""
        made = [tensor for kernel in home for tensor in self._kernels[kernel].outputs]
        passed: list[KernelTensor] = []
        if name in self._outputs:
            passed = [tensor for tensor in made if tensor.name == name]
        for reader in outside:
            names = {t.name for kernel in self._homes[label(reader)] for t in self._kernels[kernel].inputs}
            through = names | self._behind_copies(names)
            passed += [tensor for tensor in made if tensor.name in through]
        return self._one_type(name, passed) or self._one_type(name, made)

    def _behind_copies(self, names: set[str]) -> set[str]:
        """What kernels without ONNX nodes, which copy or reformat, read to write some tensors."""
        copies = [k for k in self._kernels if not k.onnx_nodes and names & {t.name for t in k.outputs}]
        return {tensor.name for kernel in copies for tensor in kernel.inputs}

    def _one_type(self, name: str, tensors: list[KernelTensor]) -> str:
        """The one float type of the tensors that can be this one; 'float32' where all are codes, "" if in doubt."""
        same = [t for t in tensors if t.name == name]
        sized = [t for t in tensors if math.prod(t.shape) == self._sizes.get(name)]
        for some in (same, sized, tensors):
            if some and not any(t.dtype in FLOATS for t in some):
                return "float32"
            kinds = {t.dtype for t in some if t.dtype in FLOATS}
            if len(kinds) == 1:
                return kinds.pop()
        return ""


def _sizes(graph: GraphProto) -> Mapping[str, int]:
    """Elements of each tensor whose shape is known."""
    found = {}
    for value in (*graph.value_info, *graph.output):
        shape = value.type.tensor_type.shape
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in shape.dim):
            found[value.name] = math.prod(d.dim_value for d in shape.dim)
    return found
