"""A model as a path, a ModelProto or an onnx_graphsurgeon.Graph: the same result; back as a graph; nodes in order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graphs import build, node, normal, residual, run, samples
from onnx import ModelProto, TensorProto, helper

from qdq import Settings, evaluate, load, load_float, quantize
from qdq.core.errors import InputError, ModelError
from qdq.measure.inference.inputs import as_samples
from qdq.model import graphsurgeon
from qdq.model.accept import sort_nodes
from qdq.model.graphsurgeon import ModelSource

FORMS: dict[str, Callable[[Path], ModelSource]] = {
    "path": lambda path: path,
    "text": str,
    "proto": onnx.load,
    "graph": lambda path: gs.import_onnx(onnx.load(path)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model as onnx-graphsurgeon writes it."""
    file = tmp_path / "m.onnx"
    file.write_bytes(gs.export_onnx(gs.import_onnx(residual().proto)).SerializeToString(deterministic=True))
    return file


def written(proto: ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model_and_stays_as_it_is(path: Path, form: str) -> None:
    wanted = load(path)
    source = FORMS[form](path)
    for _ in range(2):
        model = load(source)
        assert model.sha256 == wanted.sha256 and written(model.proto) == written(wanted.proto)
        assert written(load_float(source).proto) == written(load_float(path).proto)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_quantized_model_and_is_checked_alike(path: Path, form: str) -> None:
    data = samples(load(path))
    wanted = quantize(path, data, settings=Settings())
    made = quantize(FORMS[form](path), data, settings=Settings())
    assert written(made.model.proto) == written(wanted.model.proto)
    assert made.plan.to_json() == wanted.plan.to_json() and made.table.to_json() == wanted.table.to_json()
    reports = [
        evaluate(float_model, candidate, as_samples(data, load(path)), limits={"min_sqnr_db": 10.0})
        for float_model, candidate in ((path, wanted.model.proto), (FORMS[form](path), made.model.to_graphsurgeon()))
    ]
    assert reports[0].outputs == reports[1].outputs and not reports[0].failures


@pytest.mark.parametrize("source", [b"bytes", None, 3, load], ids=["bytes", "None", "number", "function"])
def test_anything_else_is_refused(source: object) -> None:
    with pytest.raises(InputError, match=rf"Cannot use a {type(source).__name__} as a model: give the path"):
        load(source)  # type: ignore[arg-type]


def test_a_model_in_memory_must_hold_its_values(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.load(path)
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(InputError, match="this ModelProto: the values of tensor 'w' lie in a side file"):
        load(proto)
    monkeypatch.setattr(graphsurgeon, "IN_FILE_LIMIT", 1000)
    with pytest.raises(InputError, match=r"this ModelProto: its tensors hold [0-9]+ bytes, and 1000 go"):
        load(onnx.load(path))


def test_a_graph_that_cannot_be_exported_is_refused() -> None:
    with pytest.raises(ModelError, match="this ModelProto: it holds no nodes"):
        load(ModelProto(ir_version=10))
    out = gs.Variable("y")  # without a type
    graph = gs.Graph(nodes=[gs.Node("Relu", inputs=[gs.Variable("x", np.float32, (1,))], outputs=[out])], outputs=[out])
    with pytest.raises(ModelError, match=r"this onnx_graphsurgeon.Graph: its export says: .* dtype"):
        load(graph)
    quantized = build(
        [node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z", "y")], {"x": (1,)}
    )
    with pytest.raises(ModelError, match="this ModelProto is quantized already"):
        load_float(quantized.proto)


def test_a_model_comes_back_as_a_graph_of_its_own(tmp_path: Path) -> None:
    """With the values of side files; what is done to the graph does not reach the model."""
    weight = normal(16, 8, 3, 3)
    source = build([node("Conv", "x w", "y", "conv")], {"x": (1, 8, 6, 6)}, {"w": weight}).proto
    onnx.save(source, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = load(tmp_path / "m.onnx")
    before = written(model.proto)
    graph = model.to_graphsurgeon()
    (made,) = graph.nodes
    assert np.array_equal(made.inputs[1].values, weight)
    made.inputs[1].name, made.inputs[1].values = "v", weight * 2
    changed = load(graph)
    assert np.array_equal(changed.array("v"), weight * 2) and changed.sha256 != model.sha256
    assert written(model.proto) == before and np.array_equal(model.array("w"), weight)


@pytest.mark.parametrize("scheme", ["int8", "int4", "w4a8", "fp8"])
def test_a_quantized_model_comes_back_as_a_graph(path: Path, scheme: str) -> None:
    """Codes of 4 bits too, as long as nobody reads their values."""
    data = samples(load(path))
    made = quantize(path, data, settings=Settings(scheme=scheme)).model
    again = load(made.to_graphsurgeon())
    assert {t.name: t.SerializeToString() for t in again.initializers.values()} == {
        t.name: t.SerializeToString() for t in made.initializers.values()
    }
    for old, new in zip(run(made, data), run(again, data), strict=True):
        assert all(np.array_equal(old[name], new[name]) for name in old)


def backwards(model: ModelProto) -> ModelProto:
    """The same with its nodes from the last to the first."""
    copy = ModelProto.FromString(model.SerializeToString())
    nodes = list(copy.graph.node)[::-1]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def body() -> ModelProto:
    """x -> Neg -> h, read inside an If only; its result -> Relu."""
    out = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
    branches = {
        key: helper.make_graph([helper.make_node("Abs", ["h"], ["o"])], key, [], out)
        for key in ("then_branch", "else_branch")
    }
    nodes = [node("Neg", "x", "h"), node("If", "yes", "z", **branches), node("Relu", "z", "y")]
    return build(nodes, {"x": (3,)}, {"yes": np.array(True)}).proto


@pytest.mark.parametrize("make", [lambda: residual().proto, body], ids=["residual", "body"])
def test_nodes_in_any_order_are_sorted(make: Callable[[], ModelProto], tmp_path: Path) -> None:
    model = make()
    with pytest.raises(onnx.checker.ValidationError, match="topological"):
        onnx.checker.check_model(backwards(model))
    (tmp_path / "m.onnx").write_bytes(backwards(model).SerializeToString())
    for source in (tmp_path / "m.onnx", backwards(model), gs.import_onnx(backwards(model))):
        loaded = load(source)
        onnx.checker.check_model(loaded.proto)
        for old, new in zip(run(model, samples(load(model))), run(loaded, samples(load(model))), strict=True):
            assert all(np.array_equal(old[name], new[name]) for name in old)


def test_nodes_in_order_stay_and_what_cannot_be_sorted_is_refused() -> None:
    model = residual().proto
    before = model.SerializeToString()
    sort_nodes(model.graph)
    assert model.SerializeToString() == before
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]  # a circle
    with pytest.raises(ModelError, match="topological"):
        load(model)
    names = ["x", *(f"t{i}" for i in range(3000)), "y"]  # deeper than Python's stack
    chain = build([node("Neg", *pair, name=pair[1]) for pair in pairwise(names)], {"x": (1,)}, {})
    assert load(backwards(chain.proto)).graph.node[0].input[0] == "x"


def test_onnx_graphsurgeon_is_not_imported_before_it_is_needed(path: Path) -> None:
    code = f"import sys, qdq; qdq.load_float({str(path)!r}); sys.exit('onnx_graphsurgeon' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
