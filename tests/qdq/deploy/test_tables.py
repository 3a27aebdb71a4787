"""Tables of words through the whole job: what deploy says of them, and what the report, the page and explain show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from decoder_graphs import ROWS, lookup

from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.deploy.deploy import deploy
from qdq.deploy.report.report import DeployReport
from qdq.model.storage import save


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(lookup(head="turned"), tmp_path / "words.onnx")
    return tmp_path / "words.onnx"


def ids(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    return [{"ids": rng.integers(0, ROWS, 4)} for _ in range(count)]


def deployed(model: Path, out: Path, **recipe: object) -> DeployReport:
    asked = {
        "target": ["sm89"],
        "tune": "off",
        "rounding": "nearest",
        "equalize": "none",
        "calibrator": "max",
        **recipe,
    }
    return deploy(model, ids(), out=out, recipe=Recipe.from_mapping(asked)).report


def test_deploy_says_what_codes_would_save_and_saves_it(model: Path, tmp_path: Path) -> None:
    plain = deployed(model, tmp_path / "plain")
    hint = next(note for note in plain.notes if "--embeddings int8" in note)
    assert hint.startswith("table: 150.0 KiB of tables") and "75.0 KiB" in hint
    small = deployed(model, tmp_path / "small", embeddings="int8")
    assert not any("--embeddings" in note for note in small.notes)
    assert small.audit is not None and plain.audit is not None
    assert [(t.node, t.stored) for t in small.audit.tables] == [("read", "int8")]
    assert small.audit.weight_bytes < plain.audit.weight_bytes - 70 * 1024
    assert small.check.outputs[0].cosine > 0.999
    assert small.details is not None
    row = next(t for t in small.details.tensors if t.tensor == "table")
    assert row.format == "int8" and row.sqnr_db is not None and row.sqnr_db > 35
    assert "table_quantized" not in plain.to_json() and (tmp_path / "small" / "report.html").exists()


def test_only_a_table_is_quantized_where_nothing_else_may_be(model: Path, tmp_path: Path) -> None:
    report = deployed(model, tmp_path / "only", embeddings="int4", exclude=["layer", "head"])
    assert report.audit is not None and report.audit.tables[0].stored == "int4"
    assert any(note.startswith("Nothing but tables is quantized") for note in report.notes)
    assert (tmp_path / "only" / "words.int8.onnx").exists()


def test_tuning_keeps_the_table_whatever_it_leaves_in_float(model: Path, tmp_path: Path) -> None:
    report = deployed(model, tmp_path / "tuned", embeddings="int8", tune="placement", gpu=["rtx4090"])
    assert report.audit is not None and [t.stored for t in report.audit.tables] == ["int8"]


def test_tensorrt_gets_the_same_form_and_a_doubt(model: Path, tmp_path: Path) -> None:
    report = deployed(model, tmp_path / "trt", embeddings="int8", compiler="tensorrt", target=["sm80"])
    assert any(note.startswith("embeddings: whether TensorRT keeps") for note in report.notes)


def test_explain_and_audit_tell_of_the_table(model: Path, tmp_path: Path) -> None:
    deployed(model, tmp_path / "out", embeddings="int8")
    engine, plan = str(tmp_path / "out" / "words.engine"), str(tmp_path / "out" / "plan.json")
    said = CliRunner().invoke(main, ["explain", plan, "read", "--engine", engine])
    assert "reads a table of codes" in said.output and "its table lies in the engine as int8" in said.output
    shown = CliRunner().invoke(main, ["audit", engine])
    assert "table of read" in shown.output and "int8, 75.0 KiB" in shown.output
    answer = CliRunner().invoke(main, ["audit", engine, "--json"])
    assert json.loads(answer.output)["tables"][0]["stored"] == "int8"
    asked = CliRunner().invoke(main, ["explain", str(model), "read", "--embeddings", "int4"])
    assert "int4 in blocks of" in asked.output
