"""FP4 models run in ONNX Runtime by what stands for them, which computes the same numbers."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.core import fp4, onnx_runtime as ort
from engines.core.errors import EngineError
from engines.core.macs import macs
from engines.core.quantizers import code_name, read_graph

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


def model(*, dynamic: bool = False, second: float = 0.25) -> onnx.ModelProto:
    """x (n, 32) [-> TRT_FP4DynamicQuantize -> DQ -> DQ] -> MatMul with FP4 codes behind two DQ -> y (n, 16)."""
    rng = np.random.default_rng(0)
    codes = (rng.choice(GRID, size=(32, 16)) * rng.choice([-1, 1], size=(32, 16))).astype(ml_dtypes.float4_e2m1fn)
    scales = rng.choice([0.5, 1, 1.75], size=(2, 16)).astype(ml_dtypes.float8_e4m3fn)
    tensors = {"w": codes, "c": scales, "s": np.float32(0.125), "d": np.float32(second)}
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "s"], ["e"]),
        helper.make_node("DequantizeLinear", ["w", "e"], ["f"], axis=0, block_size=16),
    ]
    data, domains = "x", [helper.make_opsetid("", 23)]
    if dynamic:
        attributes = {"axis": -1, "block_size": 16, "scale_type": TensorProto.FLOAT8E4M3FN}
        nodes += [
            helper.make_node(fp4.QUANTIZE, ["x", "d"], ["q", "k"], domain=fp4.DOMAIN, **attributes),
            helper.make_node("DequantizeLinear", ["k", "d"], ["l"]),
            helper.make_node("DequantizeLinear", ["q", "l"], ["m"], axis=-1, block_size=16),
        ]
        data = "m"
        domains.append(helper.make_opsetid(fp4.DOMAIN, 1))
    nodes.append(helper.make_node("MatMul", [data, "f"], ["y"], name="product"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", ["n", 32]), ("y", None))
    ]
    stored = [numpy_helper.from_array(np.asarray(t), name) for name, t in tensors.items()]
    graph = helper.make_graph(nodes, "fp4", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=domains, ir_version=11)


def weight(made: onnx.ModelProto) -> np.ndarray:
    """The product's weight, float64."""
    found = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in made.graph.initializer}
    return np.asarray(found["w"] * np.repeat(found["c"] * found["s"], 16, axis=0))


def test_constants_are_the_same_numbers_from_memory_and_from_a_file(tmp_path: Path) -> None:
    made = model()
    onnx.save(made, tmp_path / "m.onnx")
    onnx.save(model(), tmp_path / "side.onnx", save_as_external_data=True, location="side.data", size_threshold=0)
    assert (tmp_path / "side.data").stat().st_size > 0
    x = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    files = [tmp_path / "m.onnx", str(tmp_path / "m.onnx"), tmp_path / "side.onnx"]
    for source in (made, made.SerializeToString(), *files):
        (found,) = ort.run(ort.session(source), [{"x": x}])
        np.testing.assert_allclose(found["y"], x @ weight(made), rtol=1e-5, atol=1e-5)
    assert {t.data_type for t in made.graph.initializer} >= {TensorProto.FLOAT4E2M1}  # the model itself is unchanged


def test_data_are_rounded_to_the_grid_half_to_even_with_scales_of_their_block() -> None:
    made, d = model(dynamic=True), 0.25
    ties = np.array([6, 0.25, -0.75, 1.25, 1.75, 2.5, 3.5, -5, 5.01, 0, -0.24, 3, 4, 6, -6, 0.5], dtype=np.float32)
    x = np.stack([np.concatenate([ties * d, np.zeros(16)]), np.concatenate([ties * 7 * d, ties * 1e6])])
    x = x.astype(np.float32)
    read = np.array([6, 0, -1, 1, 2, 2, 4, -4, 6, 0, 0, 3, 4, 6, -6, 0.5])  # the even one of two codes
    beyond = np.sign(ties) * 6 * 448 * d  # what scales do not reach ends at the largest code
    wanted = np.stack([np.concatenate([read * d, np.zeros(16)]), np.concatenate([read * 7 * d, beyond])])
    (found,) = ort.run(made, [{"x": x}])
    np.testing.assert_allclose(found["y"], wanted @ weight(made), rtol=1e-5)


def test_a_model_without_fp4_comes_back_itself_and_a_bad_one_is_refused_as_before(tmp_path: Path) -> None:
    made = model()
    del made.graph.node[:-1]
    made.graph.node[0].input[1] = "g"
    del made.graph.initializer[:]
    made.graph.initializer.append(numpy_helper.from_array(np.ones((32, 16), np.float32), "g"))
    assert fp4.runnable(made) is made
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for path in (tmp_path / "bad.onnx", tmp_path / "none.onnx"):
        with pytest.raises(EngineError, match="cannot load"):
            ort.session(path)


def test_shapes_and_types_are_known_behind_the_custom_operator() -> None:
    graph = read_graph(model(dynamic=True), {"x": (5, 32)})
    ((_, product),) = graph.all_products()
    assert macs(graph, product.node) == 5 * 32 * 16
    data, constant = (o.dq for o in product.operands)
    assert data is not None and constant is not None
    assert (code_name(data.dtype), code_name(constant.dtype)) == ("fp4", "fp4")
    assert not data.stored
    assert not data.dynamic
    assert constant.stored
    assert constant.blocked
