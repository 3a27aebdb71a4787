"""plan.json comes back as it was written; a damaged, edited or foreign one is refused with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import pytest

from engines.core.documents import replace
from qdq.assemble import insert
from qdq.core.errors import InputError, StaleFileError
from qdq.measure import collect
from qdq.measure.table import CalibrationTable
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.solve import solve


@pytest.mark.parametrize("make", [graphs.conv, graphs.branches, graphs.conditional, graphs.attention])
def test_a_plan_survives_its_file(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    made = placement.plan(model, Settings(calibrator="entropy", percentile=99, exclude=("*",)))
    for plan in (made, placement.plan(model)):
        plan.save(tmp_path / "plan.json")
        back = Plan.load(tmp_path / "plan.json")
        assert back == plan
        assert (back.to_json(), back.sha256) == (plan.to_json(), plan.sha256)
        back.check(model)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def damaged(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The plan of `graphs.conv` with its parsed JSON changed; points[0] is the data, points[1] the weight."""
    content = json.loads(placement.plan(graphs.conv()).to_json())
    change(content)
    path.write_text(json.dumps(content))
    return path


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no points": lambda c: c.pop("points"),
    "no skips": lambda c: c.pop("skips"),
    "no model": lambda c: c.pop("model_sha256"),
    "no settings": lambda c: c.pop("settings"),
    "settings no mapping": lambda c: c.update(settings=3),
    "unknown setting": lambda c: c["settings"].update(calibratr="mse"),
    "point no mapping": lambda c: c["points"].append(3),
    "points no list": lambda c: c.update(points=3),
    "skip without reason": lambda c: c["skips"][0].pop("reason"),
    "skip no mapping": lambda c: c["skips"].append("relu"),
    "unknown format": lambda c: c["points"][0]["spec"].update(format="int88"),
    "unknown role": lambda c: c["points"][0].update(role="weigth"),
    "unknown key": lambda c: c["points"][0].update(scael=1),
    "no tensor": lambda c: c["points"][0].pop("tensor"),
    "consumers no list": lambda c: c["points"][0].update(consumers=3),
    "no consumers": lambda c: c["points"][0].update(consumers=[]),
    "consumer without index": lambda c: c["points"][0].update(consumers=["conv"]),
    "negative index": lambda c: c["points"][1].update(consumers=["conv:-2"]),
    "other format version": lambda c: c.update(format="qdq.plan/99"),
    "axis is text": lambda c: c["points"][1]["spec"].update(axis="0"),
    "shift is text": lambda c: c["points"][0]["spec"].update(shift="no"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_plan_is_refused(name: str, tmp_path: Path) -> None:
    path = damaged(tmp_path / "plan.json", DAMAGE[name])
    with pytest.raises(InputError) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\udcff", '{"format": "qdq.table/1"}', "[" * 50])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"Cannot (read|use) .*plan\.json"):
        Plan.load(path)
    with pytest.raises(InputError, match="Cannot read"):
        Plan.load(tmp_path)
    with pytest.raises(InputError, match="qdq plan"):
        Plan.load(tmp_path / "none.json")


def test_files_of_an_older_version_are_refused_with_the_command_that_makes_them_again(tmp_path: Path) -> None:
    for form, load, command in (("plan/1", Plan.load, "qdq plan"), ("table/1", CalibrationTable.load, "qdq calibrate")):
        (tmp_path / "old.json").write_text(json.dumps({"format": f"qdq.{form}"}), encoding="utf-8")
        with pytest.raises(InputError, match=f"another version of qdq.*Make it again with `{command} MODEL"):
            load(tmp_path / "old.json")


def test_a_plan_is_never_half_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot write"):
        placement.plan(graphs.conv()).save(tmp_path / "none" / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="Cannot write"):
        placement.plan(graphs.conv()).save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_plan_of_another_model_is_stale_in_every_stage() -> None:
    model, other = graphs.conv(), graphs.conv(bias=False)
    data = graphs.samples(model)
    plan = placement.plan(other)
    table = collect.collect(model, placement.plan(model), data)
    with pytest.raises(StaleFileError, match="made from another model"):
        plan.check(model)
    with pytest.raises(StaleFileError, match="made from another model"):
        collect.collect(model, plan, data)
    with pytest.raises(StaleFileError, match="made from another model"):
        solve.solve(model, plan, table, samples=data)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "node": (lambda c: c["points"][0].update(consumers=["conw:0"]), "Did you mean node 'conv'"),
    "operand": (lambda c: c["points"][0].update(consumers=["conv:3"]), "no such operand"),
    "tensor": (lambda c: c["points"][0].update(tensor="z"), "no such operand"),
    "role": (lambda c: c["points"][1].update(role="activation"), "in the model it is constant"),
    "weight alone": (lambda c: c["points"].pop(0), "needs both"),
    "activation axis": (lambda c: c["points"][0]["spec"].update(axis=1), "activations have one scale"),
    "bias": (lambda c: c["points"][1].update(tensor="b", consumers=["conv:2"]), "weights are operand 1"),
    "wrong axis": (lambda c: c["points"][1]["spec"].update(axis=1), "Set the axis to 0"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_makes_no_sense_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    change, message = EDITS[name]
    model = graphs.conv()
    data = graphs.samples(model)
    table = collect.collect(model, placement.plan(model), data)
    with pytest.raises(InputError, match=message):
        solve.solve(model, Plan.load(damaged(tmp_path / "plan.json", change)), table, samples=data)


def test_a_sensible_edit_is_obeyed(tmp_path: Path) -> None:
    """Without its points the Conv stays float; with the weight's point gone only the data is quantized."""
    model = graphs.conv()
    data = graphs.samples(model)
    ops = {}
    for keep in (0, 1):
        plan = Plan.load(damaged(tmp_path / "plan.json", lambda c, k=keep: c.update(points=c["points"][:k])))
        solution = solve.solve(model, plan, collect.collect(model, plan, data), samples=data)
        ops[keep] = [n.op_type for n in insert.insert(model, plan, solution).graph.node]
    assert ops == {0: ["Conv", "Relu"], 1: ["QuantizeLinear", "DequantizeLinear", "Conv", "Relu"]}


def test_explain_says_what_happens_to_a_node_and_why() -> None:
    model = graphs.branches()
    plan = placement.plan(model)
    said = "\n".join(plan.explain("left_conv"))
    for part in ("left_conv: quantized", "per tensor", "per channel on axis 0", "'weighted'", "tied with the group"):
        assert part in said
    assert "shared with 1 other operands" in said
    assert "moves or picks values" in plan.explain("concat")[0]
    with pytest.raises(InputError, match="Near names: left_conv"):
        plan.explain("lef_conv")
    with pytest.raises(InputError, match="no node"):
        replace(plan, points=(), skips=()).explain("x")


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (graphs.conv, Settings(exclude=("*",)), "Nothing is quantized. 1 Conv: excluded by the pattern '*'; 1 Relu: "),
        (graphs.conv, Settings(), ""),
        (
            lambda: graphs.build([graphs.node("MatMul", "x z", "y")], {"x": (4, 4), "z": (4, 4)}),
            Settings(),
            "Nothing is quantized. 1 MatMul: a product of two computed tensors",
        ),
        (
            lambda: graphs.build([graphs.node("Relu", "x", "y")], {"x": (4, 4)}),
            Settings(),
            "Nothing is quantized: none of the 1 nodes is a Conv, ConvTranspose, Gemm, MatMul.",
        ),
    ],
)
def test_a_plan_without_points_says_why(make: Callable[[], Any], settings: Settings, said: str) -> None:
    why = placement.plan(make(), settings).why_nothing
    assert why.startswith(said) and bool(why) is bool(said)
