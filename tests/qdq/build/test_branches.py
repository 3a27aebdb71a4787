"""Ifs that an input steers: both branches where the compiler takes them, else the one that all samples take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from graphs import build, node, normal
from onnx import TensorProto, helper, numpy_helper

from engines.core import onnx_runtime as ort
from engines.core.errors import BuildError
from qdq.build import branches
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import load_float
from qdq.passes.steered import held, steering

value = helper.make_tensor_value_info
RATES = (16, 8)


def branch(name: str, width: int) -> onnx.GraphProto:
    """x times a weight of some rows, so that x must be that wide; the rate itself too."""
    nodes = [
        node("MatMul", f"x {name}_w", f"{name}_h", f"{name}_matmul"),
        node("Relu", f"{name}_h", f"{name}_y", f"{name}_relu"),
    ]
    weight = numpy_helper.from_array(normal(width, 16, seed=width), f"{name}_w")
    return helper.make_graph(nodes, name, [], [value(f"{name}_y", TensorProto.FLOAT, None)], [weight])


def two_rates(other: int) -> onnx.ModelProto:
    """A detector that takes 16 values at a rate of 16, and at any other `other` values."""
    nodes = [
        node("Equal", "rate sixteen", "fast"),
        node("If", "fast", "h", "by_rate", then_branch=branch("fast_one", 16), else_branch=branch("slow_one", other)),
        node("MatMul", "h w", "y", "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "rates",
        [value("x", TensorProto.FLOAT, [4, "width"]), value("rate", TensorProto.INT64, [])],
        [value("y", TensorProto.FLOAT, [4, 16])],
        [numpy_helper.from_array(np.array(16), "sixteen"), numpy_helper.from_array(normal(16, 16), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def saved(folder: Path, *rates: int) -> None:
    """Three samples for each rate, as wide as it is."""
    folder.mkdir()
    for index, rate in enumerate([rate for rate in rates for _ in range(3)]):
        np.savez(folder / f"{index}.npz", x=normal(4, rate, seed=index), rate=np.array(rate))


def deploy(folder: Path, model: onnx.ModelProto, *more: str) -> Result:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    onnx.save(model, folder / "m.onnx")
    args = ["deploy", folder / "m.onnx", "--data", folder / "data", "--out", folder / "out", "--tune", "off", *more]
    return CliRunner().invoke(main, list(map(str, args)))


def prepared(folder: Path, proto: onnx.ModelProto) -> Model:
    onnx.save(proto, folder / "m.onnx")
    return load_float(folder / "m.onnx")


def test_an_input_that_chooses_a_branch_is_found(tmp_path: Path) -> None:
    assert steering(prepared(tmp_path, two_rates(8))) == {"rate": "If 'by_rate'"}


def test_a_condition_of_data_is_not_steered() -> None:
    bodies = {"then_branch": branch("a", 16), "else_branch": branch("b", 16)}
    nodes = [node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "c", to=9), node("If", "c", "y", **bodies)]
    model = build(nodes, {"x": [4, 16]})
    assert "If" in {n.op_type for n in model.graph.node} and not steering(model)


@pytest.mark.parametrize("rate", RATES)
def test_a_held_input_leaves_one_branch_and_stays_an_input(tmp_path: Path, rate: int) -> None:
    model = prepared(tmp_path, two_rates(8))
    alone = held(model, {"rate": np.array(rate)})
    assert [i.name for i in alone.inputs] == ["x", "rate"] and "If" not in {n.op_type for n in alone.graph.node}
    sample = {"x": normal(4, rate), "rate": np.array(rate)}
    want, got = (ort.session(m.proto).run(None, sample)[0] for m in (model, alone))
    assert np.array_equal(got, want)


@pytest.mark.parametrize("rate", RATES)
def test_the_branch_of_the_samples_is_deployed_where_both_do_not_compile(tmp_path: Path, rate: int) -> None:
    saved(tmp_path / "data", rate)
    result = deploy(tmp_path, two_rates(8))
    assert result.exit_code == 0, result.output
    assert f"'rate' is {rate} in all samples" in result.stderr and "'by_rate'" in result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["audit"]["int8_share"] == 1.0 and report["check"]["outputs"][0]["sqnr_db"] > 25
    audited = CliRunner().invoke(main, ["audit", str(tmp_path / "out" / "m.engine"), "--json"])
    assert json.loads(audited.stdout)["nodes"] == report["audit"]["nodes"]  # from the shapes of a scalar input too
    written = load(tmp_path / "out" / "m.int8.onnx")
    assert [i.name for i in written.inputs] == ["x", "rate"]


def test_both_branches_stay_where_both_compile(tmp_path: Path) -> None:
    saved(tmp_path / "data", 16)
    result = deploy(tmp_path, two_rates(16))
    assert result.exit_code == 0, result.output
    assert "in all samples" not in result.stderr
    assert "If" in {n.op_type for n in load(tmp_path / "out" / "m.int8.onnx").graph.node}


def test_samples_of_both_branches_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "data", 16, 8)
    result = deploy(tmp_path, two_rates(8))
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    error = result.stderr.strip().splitlines()[-1]
    assert "If 'by_rate' is steered by input 'rate'" in error and "one engine for each value" in error


def turning() -> onnx.ModelProto:
    """`count` turns, each of which gives a row more: the size of y depends on the value of an input."""
    inputs = [value("turn", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("h", 1, [4, 16])]
    nodes = [node("MatMul", "h w", "p"), node("Tanh", "p", "h2"), node("Identity", "h2", "row")]
    nodes.append(node("Identity", "go", "on", "goes_on"))
    ends = [value("on", TensorProto.BOOL, []), value("h2", 1, [4, 16]), value("row", 1, [4, 16])]
    body = helper.make_graph(nodes, "body", inputs, ends)
    graph = helper.make_graph(
        [node("Loop", "count - x", "last y", "turns", body=body)],
        "turning",
        [value("x", TensorProto.FLOAT, [4, 16]), value("count", TensorProto.INT64, [])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(normal(16, 16) / 4, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("counts", [(3,), (2, 3)])
def test_a_number_of_turns_that_sizes_depend_on_is_that_of_the_samples(tmp_path: Path, counts: tuple[int, ...]) -> None:
    (tmp_path / "data").mkdir()
    for index in range(4):
        sample = {"x": normal(4, 16, seed=index), "count": np.array(counts[index % len(counts)])}
        np.savez(tmp_path / "data" / f"{index}.npz", **sample)
    result = deploy(tmp_path, turning())
    if len(counts) > 1:
        assert result.exit_code == 2 and "Loop 'turns' is steered by input 'count'" in result.stderr
        return
    assert result.exit_code == 0, result.output
    assert "'count' is 3 in all samples, and steers Loop 'turns'" in result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (product,) = report["audit"]["nodes"]
    assert (product["consumed"], product["turns"], product["macs"]) == ("int8", 3, 3 * 4 * 16 * 16)


def test_a_refusal_names_a_node_with_an_apostrophe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = two_rates(8)
    next(n for n in proto.graph.node if n.op_type == "If").name = "which'rate"
    monkeypatch.setattr(branches, "_refusal", lambda *_: BuildError("no."))
    data = [{"x": normal(4, rate), "rate": np.array(rate)} for rate in RATES]
    with pytest.raises(BuildError, match="which'rate") as caught:
        branches.with_possible_branches(prepared(tmp_path, proto), data, recipe=Recipe(), shapes={})
    assert caught.value.nodes == ("which'rate",)
