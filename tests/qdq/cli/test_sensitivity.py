"""`qdq sensitivity`: the table on the terminal, as JSON and as a picture; what is wrong is said before any work."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from models import images, save_samples, segmenter

from qdq.cli.main import main
from qdq.tune.sensitivity.table import Sensitivity


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(segmenter(), "net.onnx")
    save_samples(Path("data"), images(3))
    return tmp_path


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["sensitivity", "net.onnx", "-o", "s.json", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_table_is_printed_written_and_drawn(here: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'qdq[plot]'")
    shown = run("--data", "data", "--candidates", "int8,fp8", "--candidates", "int4", "--plot", "s.png")
    found = Sensitivity.load("s.json")
    assert found.candidates == ("int8", "fp8", "int4") and found.samples == 3
    assert [row.nodes for row in found.groups] == [("/encode/Conv",), ("/head/Conv",)]
    for row in found.groups:
        assert row.name in shown.stdout
        assert f"{row.trials[0].sqnr_db:.1f}" in shown.stdout
    assert Path("s.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(here.glob(".s.json*"))
    printed = json.loads(run("--data", "data", "--candidates", "int8,fp8,int4", "--json").stdout)
    assert printed == json.loads(Path("s.json").read_text())


def test_a_metric_is_told_beside_the_noise(here: Path) -> None:
    run("--data", "data", "--candidates", "int8,fp8", "--metric", "dice")
    found = Sensitivity.load("s.json")
    assert found.metric == "dice" and found.check is None
    assert all(t.value is not None and 0.8 < t.value <= 1 and not t.scaled for r in found.groups for t in r.trials)


def test_explain_shows_the_row_of_a_node(here: Path) -> None:
    run("--data", "data", "--candidates", "int8,int4")
    said = CliRunner().invoke(main, ["explain", "net.onnx", "/head/Conv", "--sensitivity", "s.json"])
    assert said.exit_code == 0 and "of 2 by its loudest candidate" in said.output
    assert "int4: int4 is for weights alone" in said.output
    onnx.save(segmenter(seed=1), "other.onnx")
    other = CliRunner().invoke(main, ["explain", "other.onnx", "/head/Conv", "--sensitivity", "s.json"])
    assert other.exit_code == 2 and "was made from another model" in other.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "data", "--candidates", "int88"], "Unknown scheme"),
        (["--data", "data", "--target", "sm86", "--candidates", "fp8"], "cannot compile fp8"),
        (["--data", "data", "--candidates", "float"], "No candidate quantizes"),
        (["--data", "data", "--metric", "perplexity"], "Unknown metric"),
        (["--data", "data", "--workers", "2", "--cluster", "tcp://127.0.0.1:9"], "choose one"),
        (["--candidates", "int8"], "No data"),
    ],
)
def test_what_is_wrong_is_said(here: Path, arguments: list[str], message: str) -> None:
    assert message in " ".join(run(*arguments, code=2).output.split())
    assert not Path("s.json").exists()
