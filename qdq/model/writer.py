"""A graph under construction: the nodes and constants of a float model, and new ones under names that are free.

Model -> `GraphWriter` (nodes in order, constants by name) -> ModelProto. It must not know quantization.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdq.model.model import Model
from qdq.model.nodes import TRT_DOMAIN, Names, reads
from qdq.model.weight_store import WeightStore


class GraphWriter:
    """Builds the new node and initializer lists in the order of the old ones."""

    def __init__(self, model: Model, store: WeightStore | None) -> None:
        """Start without nodes; large constants go to the store, if there is one."""
        self._model, self._store = model, store
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._typed: list[tuple[str, int, str]] = []  # tensors of no standard operator: name, type, of whose rank
        self._name = Names(model.names()).fresh

    def finish(self, opset: int) -> ModelProto:
        """The new model, of that opset at least: unused float weights are dropped, everything else is kept."""
        proto = ModelProto()
        proto.CopyFrom(self._model.proto)
        graph = proto.graph
        del graph.node[:]
        graph.node.extend(self._nodes)
        read = {name for n in self._nodes for name in reads(n)} | {o.name for o in graph.output}
        kept = [t for t in graph.initializer if t.name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        graph.initializer.extend(self._constants[name] for name in sorted(self._constants))
        self._import(proto, opset)
        proto.producer_name = "qdq"
        return proto

    def _import(self, proto: ModelProto, needed: int) -> None:
        """Import what is needed: from 21 to 23 the standard operators gained types only."""
        for entry in proto.opset_import:
            if entry.domain in ("", "ai.onnx") and entry.version < needed:
                entry.version = needed
                proto.ir_version = max(proto.ir_version, helper.find_min_ir_version_for(proto.opset_import, True))
        if self._typed and all(entry.domain != TRT_DOMAIN for entry in proto.opset_import):
            proto.opset_import.append(helper.make_opsetid(TRT_DOMAIN, 1))
        for name, kind, tensor in self._typed:
            rank = self._model.rank(tensor) or 0
            proto.graph.value_info.append(helper.make_tensor_value_info(name, kind, [None] * rank))

    def _constant(self, wanted: str, values: npt.NDArray[np.generic], dtype: str | None = None) -> str:
        name = self._name(wanted)
        if dtype is not None and values.dtype.name != dtype:
            values = values.astype(helper.tensor_dtype_to_np_dtype(helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))
        self._constants[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def _codes(self, wanted: str, values: npt.NDArray[np.generic]) -> str:
        """A constant that may be large: those of a large model lie in the store."""
        if self._store is None:
            return self._constant(wanted, values)
        name = self._name(wanted)
        self._constants[name] = self._store.tensor(name, values)
        return name

    def _append(self, op_type: str, inputs: Iterable[str], wanted: str, **attributes: Any) -> str:
        output = self._name(wanted)
        self._nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def _stored(self, name: str) -> npt.NDArray[np.float64] | None:
        """The values of a constant of the float model, or a new small one; None of a computed tensor."""
        if name in self._constants:
            return numpy_helper.to_array(self._constants[name]).astype(np.float64)
        return self._model.array(name).astype(np.float64) if self._model.is_constant(name) else None
