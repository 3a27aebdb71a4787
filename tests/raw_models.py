"""Models as exporters write them, not prepared, and what preparing must keep: the results in ONNX Runtime.

`raw(nodes, inputs, tensors)` -> Model -> `prepared_alike` -> the prepared Model, compared on random samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from engines.core import onnx_runtime as ort
from qdq.model import storage
from qdq.model.model import Model
from qdq.passes.prepare import prepare

Shape = Sequence[int | str]


def raw(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Shape | tuple[Shape, str]],
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
    domains: Sequence[str] = (),
) -> Model:
    """A model of float32 inputs, or of (shape, dtype); onnx infers the types of its outputs."""
    starts = []
    for name, said in inputs.items():
        shape, dtype = (
            said if len(said) == 2 and isinstance(said[1], str) and said[1][-1].isdigit() else (said, "float32")
        )
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        starts.append(helper.make_tensor_value_info(name, kind, list(shape)))  # type: ignore[arg-type]
    stored = [numpy_helper.from_array(np.ascontiguousarray(v).reshape(v.shape), k) for k, v in (tensors or {}).items()]
    graph = helper.make_graph(list(nodes), "raw", starts, [onnx.ValueInfoProto(name=n) for n in outputs], stored)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    proto = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports, ir_version=8))
    del proto.graph.value_info[:]
    storage.check(proto)
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    return Model(proto=proto, directory=Path(), sha256=digest)


def feeds(model: Model, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal values for the inputs of a model, integers from 0 to 3; `sizes` are those of its dynamic axes."""
    rng, found = np.random.default_rng(seed), {}
    for info in model.inputs:
        shape = [d if isinstance(d, int) else (sizes or {}).get(str(d), 2) for d in info.shape or ()]
        values = rng.normal(size=shape) if "float" in info.dtype else rng.integers(0, 4, shape)
        found[info.name] = values.astype(info.dtype)
    return found


def prepared_alike(
    model: Model, *sizes: Mapping[str, int], given: Mapping[str, np.ndarray] | None = None, floor_db: float = 100
) -> Model:
    """The prepared model, after ONNX Runtime computed the same outputs, types and names with both.

    100 dB is a relative error of 1e-5; float32 rounds to 6e-8, and sums of some hundred terms lose up to 1e-6.
    """
    done = prepare(model)
    storage.check(done.proto)
    assert [v.name for v in done.graph.output] == [v.name for v in model.graph.output]
    before, after = ort.session(model.proto), ort.session(done.proto)
    for each in sizes or ({},):
        values = feeds(model, each) | dict(given or {})
        for a, b in zip(before.run(None, values), after.run(None, values), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            wide = a.astype(np.float64)
            noise = float(((wide - b.astype(np.float64)) ** 2).sum())
            assert noise <= float((wide**2).sum()) * 10 ** (-floor_db / 10), f"{a} {b}"
    return done


def operators(model: Model) -> list[str]:
    """Operator types in the order of the graph."""
    return [n.op_type for n in model.graph.node]
