"""`--override`: a choice for some nodes, from the command line to the engine's report."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from models import images, save_samples, segmenter

from qdq.cli.main import main
from qdq.plan.plan import Plan


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(segmenter(), "net.onnx")
    save_samples(Path("data"), images(3))
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_overrides_are_written_to_the_plan_and_explained(here: Path) -> None:
    names = [n.name for n in onnx.load("net.onnx").graph.node if n.op_type == "Conv"]
    first, last = names[0], names[-1]
    run("plan", "net.onnx", "--override", f"{first}=fp8", "--override", f"{last}=fp32", "-o", "plan.json")
    plan = Plan.load("plan.json")
    assert plan.settings.overrides == {first: "fp8", last: "fp32"} and plan.settings.label == "mixed"
    assert {p.spec.format for p in plan.points for n, _ in p.uses if n == first} == {"fp8"}
    assert "an override leaves it in FP32" in run("explain", "plan.json", last)
    run("quantize", "net.onnx", "--data", "data", "--plan", "plan.json", "-o", "q.onnx")
    assert onnx.load("q.onnx").graph.node


def test_what_is_no_override_is_refused(here: Path) -> None:
    said = run("plan", "net.onnx", "--override", "conv", code=2)
    assert "it must be PATTERN=CHOICE" in " ".join(said.split())
    assert "matches none" in run("plan", "net.onnx", "--override", "nothing*=fp8", code=2)
    assert "Unknown scheme" in run("plan", "net.onnx", "--override", "*=fp88", code=2)


def test_an_override_that_quantizes_nothing_is_refused_with_the_reason(here: Path) -> None:
    relu = next(n.name for n in onnx.load("net.onnx").graph.node if n.op_type == "Relu")
    for verb in (("plan",), ("tune", "--data", "data")):
        said = " ".join(
            run(verb[0], "net.onnx", *verb[1:], "--override", f"{relu}=fp8", "-o", "p.json", code=2).split()
        )
        assert f"--override {relu}=fp8 quantizes nothing" in said and "stays in float, for" in said
    assert not Path("p.json").exists()


def test_deploy_names_a_mixed_model_so(here: Path) -> None:
    first = next(n.name for n in onnx.load("net.onnx").graph.node if n.op_type == "Conv")
    run("deploy", "net.onnx", "--data", "data", "--override", f"{first}=fp8", "--tune", "off", "--out", "build")
    assert (here / "build/net.mixed.onnx").exists()
    report = json.loads((here / "build/report.json").read_text())
    assert report["audit"]["missed"] == []
    assert "INT8, FP8" in (here / "build/report.html").read_text()
