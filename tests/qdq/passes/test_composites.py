"""Composite operators: written out where nothing runs them as they are, with the same outputs, and kept elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.backends import rtx
from engines.core import onnx_runtime as ort
from qdq.assemble.precision.convert import convert
from qdq.model.model import Model
from qdq.passes.composites import written_out
from qdq.passes.prepare import prepare

LENGTH = 5
LONG: dict[str, tuple[int, ...]] = {"past_k": (2, 2, 3, 16), "past_v": (2, 2, 3, 16)}


def attention(
    *, size: int = 16, flat: bool = False, groups: int = 2, mask: bool = False, past: bool = False, **attributes: Any
) -> onnx.ModelProto:
    """Attention of two heads over five tokens, opset 23."""
    shapes: dict[str, tuple[int, ...]] = {"q": (2, 2, LENGTH, size)}
    shapes |= dict.fromkeys("kv", (2, groups, LENGTH, size))
    if flat:
        shapes = {"q": (2, LENGTH, 2 * size)} | dict.fromkeys("kv", (2, LENGTH, groups * size))
        attributes |= {"q_num_heads": 2, "kv_num_heads": groups}
    names = ["q", "k", "v", "mask" if mask else ""]
    if mask:
        shapes["mask"] = (2, 1, LENGTH, LENGTH + 3 * past)
    if past:
        shapes |= LONG
        names += list(LONG)
    outputs = ["y", "present_k", "present_v"] if past else ["y"]
    node = helper.make_node("Attention", names, outputs, name="attention", **attributes)
    starts = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    graph = helper.make_graph([node], "g", starts, ends)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def prepared(proto: onnx.ModelProto) -> Model:
    return prepare(Model(proto=proto, directory=Path(), sha256="0" * 64))


def values(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    sizes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}


def differs(before: onnx.ModelProto, after: onnx.ModelProto) -> float:
    data = [values(before)]
    old, new = (next(iter(ort.run(model, data))) for model in (before, after))
    return max(float(np.abs(old[name] - new[name]).max()) for name in old)


KEPT = {
    "plain": {},
    "flat": {"flat": True},
    "masked": {"mask": True},
    "grouped": {"groups": 1},
    "causal": {"is_causal": 1},
}
WRITTEN = {
    "small heads": {"size": 8},
    "capped": {"softcap": 5.0},
    "cache": {"past": True, "mask": True},
    "softmax in FP32": {"softmax_precision": 1},
}


@pytest.mark.parametrize("form", KEPT)
def test_attention_with_a_kernel_stays_but_for_fp32(form: str) -> None:
    proto = attention(**KEPT[form])  # type: ignore[arg-type]
    model = prepared(proto)
    assert [n.op_type for n in model.graph.node] == ["Attention"]
    low = convert(model).model
    assert sum(n.op_type == "Attention" for n in low.graph.node) == 1 and written_out(low) is low
    full = convert(model, unquantized_type="fp32").model
    assert not any(n.op_type == "Attention" for n in full.graph.node) and differs(proto, full.proto) < 1e-5
    if form == "plain":
        pytest.importorskip("tensorrt_rtx")
        assert any("mha" in layer.name for layer in rtx.build(low.proto).table.layers)
        assert rtx.build(full.proto).table.layers


@pytest.mark.parametrize("form", WRITTEN)
def test_attention_without_a_kernel_is_written_out(form: str) -> None:
    proto = attention(**WRITTEN[form])  # type: ignore[arg-type]
    model = prepared(proto)
    names = [n.name for n in model.graph.node]
    assert "Attention" not in {n.op_type for n in model.graph.node} and len(names) == len(set(names))
    assert all(name.startswith("attention") for name in names) and differs(proto, model.proto) < 1e-5
    pytest.importorskip("tensorrt_rtx")
    assert rtx.build(convert(model).model.proto).table.layers


def test_a_model_with_attention_written_out_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    monkeypatch.setattr("qdq.passes.prepare.pad_explicitly", lambda draft: passes.append("padding"))
    assert len(prepared(attention(size=8)).graph.node) > 1 and passes == ["padding"]


def test_attention_that_gives_its_scores_stays() -> None:
    """The definition has -infinity where a key is masked, ONNX Runtime the lowest number: they cannot be compared."""
    proto = attention(mask=True)
    proto.graph.node[0].output.extend(["", "", "scores"])
    proto.graph.output.append(helper.make_tensor_value_info("scores", TensorProto.FLOAT, None))
    assert [n.op_type for n in prepared(proto).graph.node] == ["Attention"]


def test_rotary_positions_are_written_out() -> None:
    shapes = {"x": (2, 3, LENGTH, 16), "cos": (2, LENGTH, 8), "sin": (2, LENGTH, 8)}
    node = helper.make_node("RotaryEmbedding", list(shapes), ["y"], name="rotary")
    starts = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
    graph = helper.make_graph([node], "g", starts, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    model = prepared(proto)
    assert "RotaryEmbedding" not in {n.op_type for n in model.graph.node} and differs(proto, model.proto) < 1e-6
