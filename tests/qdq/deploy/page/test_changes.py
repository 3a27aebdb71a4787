"""Two runs beside each other; and schemes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from made_run import made_run

from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.deploy.compare.result import Comparison, SchemeRow
from qdq.deploy.compare.task import Task
from qdq.deploy.page.changes import changes
from qdq.deploy.page.render import html, page
from qdq.plan.settings import Settings

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")


def test_what_changed_between_two_runs(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    made_run(a, settings=Settings(calibrator="mse"), limits={"min_sqnr_db": 20.0})
    made_run(b, settings=Settings(exclude=("/head/*",), calibrator="max"))
    found = changes(a, b)
    assert found["models"] is True and [v["state"] for v in found["verdicts"]] == ["passed", "open"]
    assert [(n["node"], n["before"], n["after"]) for n in found["nodes"]] == [
        ("/head/Conv", "INT8, as planned", "float")
    ]
    assert found["same_nodes"] == 2 and found["only"] == [[], []]
    options = {row["key"]: (row["before"], row["after"]) for row in found["options"]}
    assert options == {"calibrator": ("mse", "max"), "exclude": ("none", "/head/*")}
    (limit,) = found["limits"]
    assert limit["before"]["kept"] and limit["after"] is None
    figures = {row["what"]: row for row in found["figures"]}
    assert figures["Model file"]["sense"] == "same" and figures["Nodes quantized"]["change"] == "-50.0 %"
    assert figures["SQNR of logits"]["sense"] == "better"  # less is quantized
    done = CliRunner().invoke(main, ["report", str(a), str(b), "-o", str(tmp_path / "c.html")])
    assert done.exit_code == 0 and "a → b" in (tmp_path / "c.html").read_text(encoding="utf-8")


def comparison(**of_row: object) -> Comparison:
    rows = (
        SchemeRow(scheme="FP32", sqnr_db=float("inf"), value=1.0, predicted_us=100.0, model_bytes=4_000_000),
        SchemeRow(scheme="FP16", sqnr_db=60.0, value=1.0, predicted_us=60.0, model_bytes=2_000_000),
        SchemeRow(scheme="int8", sqnr_db=30.0, value=0.99, predicted_us=40.0, model_bytes=1_000_000),
        SchemeRow(scheme="<b>fp8</b>", problem="does not compile: <script>"),
    )
    return Comparison(
        model="net.onnx",
        model_sha256="0" * 64,
        task=Task(metric="cosine"),
        samples=2,
        evaluated_on="evaluation samples",
        targets=("sm89",),
        gpus=("rtx4090",),
        shapes={"image": (1, 1, 8, 8)},
        rows=rows,
        outputs=1,
    )


def test_schemes_are_drawn_against_time_and_size(tmp_path: Path) -> None:
    text = html(comparison())
    assert "SQNR against predicted time" in text and "SQNR against size" in text
    assert text.count('class="dot low"') == 2 and text.count('class="dot float"') == 2  # FP32 is no error to draw
    assert "<b>fp8" not in text and "does not compile: &lt;script&gt;" in text
    (tmp_path / "c.json").write_text(comparison().to_json())
    assert page(tmp_path / "c.json") == text
    with pytest.raises(InputError, match="is a comparison of schemes"):
        changes(tmp_path / "c.json", tmp_path / "c.json")
    with pytest.raises(InputError, match="keeps none"):
        page(tmp_path / "c.json", with_images=True)
