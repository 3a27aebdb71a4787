"""`build` on what the compiler refuses: an engine of the prepared model, which lies beside it and can be audited."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from graphs import node, normal
from raw_models import raw

from engines.core.errors import BuildError
from qdq.build.any_model import audit_model, compile_any, price
from qdq.build.engine import audit_engine, save_engine
from qdq.build.pricing.pricer import Pricer, gpus_of
from qdq.build.recipe import Recipe
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import prepare

pytest.importorskip("tensorrt_rtx")


def gradient(reduction: str = "add") -> Model:
    """x (16, 8) times a weight, its rows summed over the indices i."""
    nodes = [node("MatMul", "x w", "u"), node("ScatterND", "z i u", "y", "sum", reduction=reduction)]
    inputs = {"x": (16, 8), "i": ((16, 1), "int64"), "z": (4, 8)}
    return raw(nodes, inputs, {"w": normal(8, 8)})  # type: ignore[arg-type]


def test_a_refused_model_is_compiled_as_prepare_writes_it(tmp_path: Path) -> None:
    path, prepared = tmp_path / "m.onnx", tmp_path / "a.prepared.onnx"
    onnx.save(gradient().proto, path)
    before = path.read_bytes()
    for _ in range(2):  # a second time replaces it
        engine, form = compile_any(load(path), prepared, recipe=Recipe(), shapes={})
    assert form is not None and form.proto == load(prepared).proto and path.read_bytes() == before
    save_engine(engine, tmp_path / "a.engine", prepared, recipe=Recipe(), shapes={})
    assert [n.node for n in audit_engine(tmp_path / "a.engine").nodes] == ["matmul", "sum"]


def test_a_refused_model_is_audited_and_priced_so_too(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(gradient().proto, path)
    assert [n.node for n in audit_model(path, Recipe()).nodes] == ["matmul", "sum"]
    assert price(path, Recipe(), "rtx4090").total_us > 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_model_that_compiles_is_compiled_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(raw([node("Relu", "x", "y")], {"x": (4, 4)}).proto, path)
    assert compile_any(load(path), tmp_path / "p.onnx", recipe=Recipe(), shapes={})[1] is None
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_what_stays_refused_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(gradient("mul").proto, path)
    with pytest.raises(BuildError, match="ScatterND"):
        compile_any(load(path), tmp_path / "p.onnx", recipe=Recipe(), shapes={})
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_price_that_nothing_has_names_the_node() -> None:
    nodes = [node("Relu", "x", "a"), node("ConvTranspose", "a w", "y", "up", strides=[2, 2], dilations=[2, 2])]
    model = prepare(raw(nodes, {"x": (1, 8, 6, 6), "w": (8, 8, 3, 3)}))  # no constant: it cannot be rewritten
    pricer = Pricer(recipe=Recipe(), shapes={}, gpus=gpus_of(Recipe()))
    assert pricer(model).us == float("inf")
    assert pricer.refusal(model).nodes == ("up",)
