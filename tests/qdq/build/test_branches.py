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
from qdq.passes.steered import held, noted, steering, value_noted

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


def run(*args: object) -> Result:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    return CliRunner().invoke(main, list(map(str, args)))


def deploy(folder: Path, model: onnx.ModelProto, *more: str) -> Result:
    onnx.save(model, folder / "m.onnx")
    return run("deploy", folder / "m.onnx", "--data", folder / "data", "--out", folder / "out", "--tune", "off", *more)


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
    alone = held(model, {"rate": rate})
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


def quantized(folder: Path, *more: object) -> Path:
    """What `quantize` makes of `two_rates`, and of samples of 16 values unless others are there."""
    if not (folder / "data").exists():
        saved(folder / "data", 16)
    onnx.save(two_rates(8), folder / "m.onnx")
    done = run("quantize", folder / "m.onnx", "--data", folder / "data", "-o", folder / "q.onnx", *more)
    assert done.exit_code == 0, done.output
    return folder / "q.onnx"


def shares(engine: Path) -> dict[str, str]:
    """Node -> what it consumes, as compiled."""
    audited = run("audit", engine, "--json")
    assert audited.exit_code == 0, audited.output
    return {each["node"]: each["consumed"] for each in json.loads(audited.stdout)["nodes"]}


def test_a_quantized_file_is_built_for_the_value_of_its_samples(tmp_path: Path) -> None:
    path, engine = quantized(tmp_path), tmp_path / "q.engine"
    assert "If" in {n.op_type for n in load(path).graph.node}  # it runs at any rate
    result = run("build", path, "-o", engine, "--shape", "x:4x16")
    assert result.exit_code == 0, result.output
    assert "which computes the same where 'rate' is 16" in " ".join(result.stderr.split())
    assert shares(engine) == {"fast_one_matmul": "int8", "last": "int8"}
    sample = {"x": normal(4, 16), "rate": np.array(16)}
    want, got = (ort.session(p).run(None, sample)[0] for p in (path, tmp_path / "q.prepared.onnx"))
    assert np.array_equal(got, want)
    audited = json.loads(run("audit", path, "--shape", "x:4x16", "--json").stdout)
    assert audited["int8_share"] == 1.0


def test_a_value_can_be_chosen_where_no_sample_tells_it(tmp_path: Path) -> None:
    onnx.save(two_rates(8), tmp_path / "m.onnx")
    build_it = ("build", tmp_path / "m.onnx", "-o", tmp_path / "m.engine", "--shape", "x:4x8")
    refused = run(*build_it)
    assert refused.exit_code == 2 and not (tmp_path / "m.engine").exists()
    assert "If 'by_rate' is steered by input 'rate'" in refused.stderr and "--hold rate=VALUE" in refused.stderr
    done = run(*build_it, "--hold", "rate=8")
    assert done.exit_code == 0, done.output
    assert "'rate' is 8" in done.stderr and shares(tmp_path / "m.engine").keys() == {"slow_one_matmul", "last"}


def test_a_file_quantized_at_several_values_is_refused_until_one_is_chosen(tmp_path: Path) -> None:
    saved(tmp_path / "data", 16, 8)
    path = quantized(tmp_path)
    build_it = ("build", path, "-o", tmp_path / "q.engine", "--shape", "x:4x8")
    assert "--hold rate=VALUE" in run(*build_it).stderr
    done = run(*build_it, "--hold", "rate=8")
    assert done.exit_code == 0, done.output
    assert shares(tmp_path / "q.engine") == {"slow_one_matmul": "int8", "last": "int8"}


def test_a_tuned_plan_carries_the_value(tmp_path: Path) -> None:
    saved(tmp_path / "data", 16)
    onnx.save(two_rates(8), tmp_path / "m.onnx")
    plan, data = tmp_path / "plan.json", ("--data", tmp_path / "data")
    done = run("tune", tmp_path / "m.onnx", *data, "-o", plan, "--tune", "rewrites", "--tune-compiles", "2")
    assert done.exit_code == 0, done.output
    assert json.loads(plan.read_text())["held_inputs"] == {"rate": 16}
    measured = run("calibrate", tmp_path / "m.onnx", *data, "--plan", plan, "-o", tmp_path / "table.json")
    assert measured.exit_code == 0, measured.output
    path = quantized(tmp_path, "--plan", plan, "--table", tmp_path / "table.json")
    assert "If" not in {n.op_type for n in load(path).graph.node}
    built = run("build", path, "-o", tmp_path / "q.engine", "--shape", "x:4x16")
    assert built.exit_code == 0 and "itself does not compile" not in built.stderr
    saved(tmp_path / "other", 8)
    wrong = run(
        "quantize", tmp_path / "m.onnx", "--data", tmp_path / "other", "--plan", plan, "-o", tmp_path / "no.onnx"
    )
    assert wrong.exit_code == 2 and "has 8 as input 'rate'" in wrong.stderr and not (tmp_path / "no.onnx").exists()


def test_tuning_without_samples_needs_the_value(tmp_path: Path) -> None:
    onnx.save(two_rates(8), tmp_path / "m.onnx")
    tune_it = ("tune", tmp_path / "m.onnx", "-o", tmp_path / "plan.json", "--shape", "x:4x16", "--tune-compiles", "2")
    refused = run(*tune_it)
    assert refused.exit_code == 2 and "--hold rate=VALUE" in refused.stderr
    done = run(*tune_it, "--hold", "rate=16")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "plan.json").read_text())["held_inputs"] == {"rate": 16}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("rate", "must be NAME=VALUE"),
        ("rate=fast", "must be NAME=VALUE"),
        ("rat=16", "Unknown input 'rat'"),
        ("x=16", "only an input of one bool or integer"),
        (f"rate={10**19 - 1}", "Choose a value of that type"),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path: Path, asked: str, words: str) -> None:
    onnx.save(two_rates(8), tmp_path / "m.onnx")
    done = run("build", tmp_path / "m.onnx", "-o", tmp_path / "m.engine", "--shape", "x:4x8", "--hold", asked)
    assert done.exit_code == 2 and words in " ".join(done.stderr.split()), done.output


@pytest.mark.parametrize("text", ['{"rate": 16', "[16]", '{"rate": "16"}', '{"speed": 16}', "[" * 100_000])
def test_a_note_of_something_else_is_no_value(tmp_path: Path, text: str) -> None:
    model = noted(prepared(tmp_path, two_rates(8)), {"rate": 16})
    assert value_noted(model) == {"rate": 16}
    model.proto.metadata_props[0].value = text
    assert value_noted(model) == {}


def test_a_refusal_names_a_node_with_an_apostrophe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = two_rates(8)
    next(n for n in proto.graph.node if n.op_type == "If").name = "which'rate"
    monkeypatch.setattr(branches, "_refusal", lambda *_: BuildError("no which'rate."))
    data = [{"x": normal(4, rate), "rate": np.array(rate)} for rate in RATES]
    with pytest.raises(BuildError, match="which'rate") as caught:
        branches.with_possible_branches(prepared(tmp_path, proto), data, recipe=Recipe(), shapes={})
    assert caught.value.nodes == ("which'rate",)
