"""Errors of several outputs, each in its unit: of compare's mae, of check, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

from engines.verify.compare import OutputSums
from engines.verify.report import Unit
from qdq.build.keys.units import units_of
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import metric
from qdq.deploy.compare.result import SchemeRow, value_text
from qdq.deploy.compare.task import Task

UNITS = {"energy": "meV/atom,1000", "forces": "meV/A,1000"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of two outputs, one with half the error of the other: x -> MatMul -> forces -> mean -> energy."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["forces"], "product"),
        helper.make_node("ReduceMean", ["forces"], ["energy"], "mean", keepdims=0),
    ]
    weights = models.constant("w", rng.normal(size=(16, 3)).astype(np.float32))
    onnx.save(
        models.assemble(nodes, {"x": (5, 16)}, {"energy": (), "forces": (5, 3)}, [weights]), tmp_path / "net.onnx"
    )
    (tmp_path / "data").mkdir()
    for number in range(4):
        np.savez(tmp_path / "data" / f"{number}.npz", x=rng.normal(size=(5, 16)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("meV/atom,1000", Unit(name="meV/atom", scale=1000)),
        (" eV ", Unit(name="eV")),
        ("a,b,2", Unit(name="a,b", scale=2)),
    ],
)
def test_a_unit_and_its_scale(text: str, unit: Unit) -> None:
    assert units_of({"y": text}) == {"y": unit}
    assert Recipe.from_mapping({"units": {"y": text}}).units == {"y": unit}


@pytest.mark.parametrize("text", ["", ",1000", "eV,", "eV,no", "eV,0", "eV,-1", "eV,inf", "eV,nan"])
def test_what_is_no_unit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"The unit of output 'y' is .*UNIT,SCALE"):
        units_of({"y": text})


def test_an_error_is_relative_to_what_varies() -> None:
    steady, varied = metric("mae"), metric("mae")
    for sign in (-1.0, 1.0):
        steady.add(np.asarray([7.1]), np.asarray([7.0]), None)
        varied.add(np.asarray([7.0 + 2.0 * sign + 0.1]), np.asarray([7.0 + 2.0 * sign]), None)
    assert steady.relative == pytest.approx(0.1 / 7)  # it does not vary: a part of its size
    assert varied.relative == pytest.approx(0.1 / 2)
    exact = metric("mae")
    exact.add(np.zeros(2), np.zeros(2), None)
    assert exact.relative == 0


def test_the_worst_output_is_the_headline_and_each_has_its_unit() -> None:
    task = Task(metric="mae", units=units_of(UNITS))
    assert task.of_each and not Task(metric="mae", labels="y").of_each and not Task(metric="cosine").of_each
    row = SchemeRow(scheme="int8", value=3.0, values={"energy": 1.5, "forces": 3.0}, value_of="forces")
    assert value_text(row, task) == "forces 3.0000 meV/A, energy 1.5000 meV/atom"


def test_a_report_knows_the_mean_size_of_an_output() -> None:
    sums = OutputSums(None)
    sums.add({"x": np.zeros(1)}, {"y": np.asarray([-1.0, 3.0])}, {"y": np.asarray([-1.5, 3.0])})
    (found,) = sums.reports()
    assert (found.mean_abs, found.mean_abs_error) == (2.0, 0.25)


def test_check_and_compare_tell_each_output_in_its_unit(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    units = [word for name, text in UNITS.items() for word in ("--unit", f"{name}={text}")]
    run = CliRunner().invoke
    made = run(main, ["quantize", "net.onnx", "--data", "data", "-o", "q.onnx"])
    assert made.exit_code == 0, made.output
    checked = run(main, ["check", "net.onnx", "q.onnx", "--data", "data", "--json", *units])
    report = json.loads(checked.stdout)
    errors = {o["name"]: o["mean_abs_error"] * 1000 for o in report["outputs"]}
    assert report["units"]["forces"] == {"name": "meV/A", "scale": 1000.0}
    shown = run(main, ["check", "net.onnx", "q.onnx", "--data", "data", *units]).stdout
    assert f"{errors['forces']:.4g} meV/A, of a mean of" in " ".join(shown.split())
    args = ["--data", "data", "--metric", "mae", *units, "--schemes", "int8", "--json"]
    compared = json.loads(run(main, ["compare", "net.onnx", *args, "--rest", "fp32"]).stdout)
    row = compared["rows"][-1]
    assert row["values"].keys() == errors.keys() and row["value"] == row["values"][row["value_of"]]
    assert row["values"]["forces"] == pytest.approx(errors["forces"], rel=0.5)  # of the same codes


def test_a_unit_of_no_output_is_refused(folder: Path) -> None:
    for verb in (["check", "net.onnx", "net.onnx"], ["compare", "net.onnx", "--metric", "mae", "--schemes", "int8"]):
        said = CliRunner().invoke(main, [*verb, "--data", "data", "--unit", "force=meV/A,1000"])
        assert said.exit_code == 2 and "forces" in said.output
    said = CliRunner().invoke(main, ["check", "net.onnx", "net.onnx", "--data", "data", "--unit", "forces"])
    assert said.exit_code == 2 and "OUTPUT=UNIT,SCALE" in said.output


@pytest.mark.parametrize(
    ("units", "said"),
    [(("kcal", "meV"), "kcal and meV"), (("forces=a,2", "forces=b,3"), "says two things of forces: a,2 and b,3")],
)
def test_two_units_of_one_thing_are_refused(folder: Path, units: tuple[str, str], said: str) -> None:
    options = [word for unit in units for word in ("--unit", unit)]
    verb = ["compare", "net.onnx", "--data", "data", "--metric", "mae", "--schemes", "int8"]
    made = CliRunner().invoke(main, [*verb, *options])
    assert made.exit_code == 2 and said in " ".join(made.output.split())
