"""A session computes Q and DQ as the standard says: what its optimizers do changes nothing."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.core import onnx_runtime as ort

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
node = helper.make_node
PAIR = [node("QuantizeLinear", ["a", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
TWICE = [
    node("QuantizeLinear", ["x", "s", "z"], ["p"]),
    node("DequantizeLinear", ["p", "s", "z"], ["a"]),
    node("QuantizeLinear", ["a", "t", "z"], ["q"]),
    node("DequantizeLinear", ["q", "t", "z"], ["y"]),
]
LIMITS = {"low": np.float32(0), "high": np.float32(6)}
CASES: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "Relu before Q to FP8": ([node("Relu", ["x"], ["a"]), *PAIR], {"s": np.float32(0.05), "z": np.zeros((), FP8)}),
    "Clip before Q to FP8": (
        [node("Clip", ["x", "low", "high"], ["a"]), *PAIR],
        {"s": np.float32(0.02), "z": np.zeros((), FP8), **LIMITS},
    ),
    "Clip before Q to INT8": (
        [node("Clip", ["x", "low", "high"], ["a"]), *PAIR],
        {"s": np.float32(0.02), "z": np.int8(-128), **LIMITS},
    ),
    "quantized twice": (TWICE, {"s": np.float32(0.05), "t": np.float32(0.03), "z": np.int8(0)}),
    "quantized twice to FP8": (TWICE, {"s": np.float32(0.05), "t": np.float32(0.03), "z": np.zeros((), FP8)}),
    "reciprocal times": (
        [node("Div", ["one", "x"], ["d"]), node("Mul", ["d", "k"], ["a"]), *PAIR],
        {"s": np.float32(1e-4), "z": np.int8(0), "one": np.float32(1), "k": np.float32(0.0123)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_optimizers_change_no_value(case: str) -> None:
    nodes, tensors = CASES[case]
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 64])]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    graph = helper.make_graph(nodes, "qdq", ends, outs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.session_options(threads=1, severity=4)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = (np.random.default_rng(0).normal(size=(64, 64)) * 5).astype(np.float32)
    plain = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]
    assert np.array_equal(next(ort.run(model, [{"x": x}]))["y"], plain)


def test_messages_call_a_model_what_they_are_told(tmp_path: Any) -> None:
    with pytest.raises(ort.EngineError, match="cannot load the Q/DQ model"):
        ort.session(b"no model", where="the Q/DQ model")


def test_inputs_are_looked_up_at_once_and_a_missing_one_is_refused() -> None:
    names = [f"x{i}" for i in range(50)]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in names]
    graph = helper.make_graph(
        [node("Concat", names, ["y"], axis=0)],
        "many",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [50])],
    )
    opened = ort.session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    fed = {name: np.full(1, i, np.float32) for i, name in enumerate(names)}
    seen: list[object] = []
    base = onnxruntime.InferenceSession._validate_input

    def look(self: object, given: object) -> None:
        seen.append(given)
        base(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime.InferenceSession, "_validate_input", look)
        assert np.array_equal(opened.run(None, fed)[0], np.arange(50, dtype=np.float32))
    assert [type(each) for each in seen] == [dict]  # a list is searched anew for each input
    del fed["x7"]
    with pytest.raises(ValueError, match="x7"):
        opened.run(None, fed)
