"""Odd models, each built in code: loading repairs them exactly, and the compiler takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import node, normal
from odd_models import (
    FLOAT,
    KINDS,
    SAMPLE,
    SPARSE,
    functions,
    net,
    odd_bodies,
    repeated_names,
    results,
    scalar_input,
    value,
)
from onnx import ModelProto, TensorProto, helper, numpy_helper

from engines.core import onnx_runtime as ort
from qdq.build.engine import compile_engine, shape_ranges
from qdq.build.recipe import Recipe
from qdq.deploy.check import float_session
from qdq.deploy.steps.shipped import file_bytes
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import prepare


@pytest.mark.parametrize("make", KINDS)
def test_an_odd_model_computes_the_same_repaired_prepared_and_compiled(make: Callable[[ModelProto], None]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    proto = net()
    make(proto)
    before = proto.SerializeToString()
    model = load(proto)
    done = prepare(model)
    assert proto.SerializeToString() == before
    wanted = results(net())["y"] * (0.5 if make is scalar_input else 1)
    if make is odd_bodies:
        wanted = results(model.proto)["y"]
    for made in (model.proto, done.proto):
        onnx.checker.check_model(made, full_check=True)
        onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
        assert [v.name for v in made.graph.output] == [v.name for v in proto.graph.output]
        assert not made.functions and not made.graph.sparse_initializer
        found = results(made)
        assert np.allclose(found["y"], wanted, rtol=1e-5, atol=1e-5)
        for name, stored in {"w": SPARSE, "x": SAMPLE["x"]}.items():
            assert name not in found or np.array_equal(found[name], stored)
    assert [i.name for i in done.inputs] == [v.name for v in proto.graph.input if v.name in SAMPLE]
    assert sum(n.op_type == "Conv" for n in done.graph.node) == 2 and done.is_constant(done.graph.node[0].input[1])
    for each in (model, done):
        assert compile_engine(each, recipe=Recipe(), shapes=shape_ranges(each, (), None)).table.kernels


def test_an_ordinary_file_is_taken_as_it_is(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    assert model.file == tmp_path / "m.onnx" and model.proto == net() and model.replace(net()).file is None
    proto = net()
    repeated_names(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    assert load(tmp_path / "m.onnx").file is None
    assert [n.name for n in load(proto).graph.node] == ["same", "same_2", "same_3", "same_4"]


def test_nodes_of_functions_have_the_names_of_tensorrts_parser() -> None:
    proto = net()
    functions(proto)
    names = [n.name for n in load(proto).graph.node]
    assert names == ["conv | inner (Inner) | outer (Outer)", "relu | inner (Inner) | outer (Outer)", "pool", "last"]


def test_a_batch_normalization_that_trains_keeps_its_outputs() -> None:
    """ONNX Runtime computes statistics of the batch where it has five outputs, read or not."""
    proto = net(9)
    proto.graph.node[1].CopyFrom(node("BatchNormalization", "c s b n q", "r i j k l", "norm"))
    proto.graph.initializer.extend(numpy_helper.from_array(np.ones(8, np.float32), name) for name in "sbnq")
    assert len(load(proto).graph.node[1].output) == 5


def test_weights_beside_the_file_may_belong_to_a_body(tmp_path: Path) -> None:
    proto, weight = net(), numpy_helper.from_array(normal(8, 8, 1, 1), "inner")
    proto.graph.input.append(value("flag", TensorProto.BOOL, []))
    branches = {
        "then_branch": helper.make_graph(
            [node("Conv", "m inner", "a")], "then", [], [value("a", FLOAT, None)], [weight]
        ),
        "else_branch": helper.make_graph([node("Relu", "m", "b")], "else", [], [value("b", FLOAT, None)]),
    }
    proto.graph.node.insert(3, node("If", "flag", "k", "if", **branches))
    proto.graph.node[4].input[0] = "k"
    fed = {"x": SAMPLE["x"], "flag": np.array(True)}
    wanted = next(ort.run(proto, [fed]))["y"]
    plain = file_bytes(load(proto))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64)
    model = load(tmp_path / "m.onnx")
    assert abs(file_bytes(model) - plain) < 1000
    (found,) = float_session(prepare(model), "the model").run(None, fed)
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_in_memory_has_no_file() -> None:
    assert load(net()).file is None and isinstance(load(net()), Model)


def test_an_output_without_a_type_gets_the_inferred_one() -> None:
    proto = net()
    proto.graph.output[0].type.tensor_type.elem_type = 0
    assert load(proto).proto.graph.output[0].type.tensor_type.elem_type == FLOAT
