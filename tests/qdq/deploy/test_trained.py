"""A model with quantizers of its own through the whole job: kept, completed, compiled, judged against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from qat_models import FORMS, images, qat

from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.deploy.deploy import deploy
from qdq.plan.plan import Plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, form in (("kept", "model optimizer"), ("part", "part of it"), ("moved", "torch.ao")):
        onnx.save(qat(FORMS[form]), tmp_path / f"{name}.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([s["x"] for s in images(8)]))
    return tmp_path


def test_deploy_keeps_the_quantizers_and_compiles_them(folder: Path) -> None:
    recipe = Recipe.from_mapping({"target": ["sm89"], "gpu": ["rtx4090"]})
    report = deploy(
        folder / "kept.onnx", images(8), out=folder / "out", evaluation=images(5, seed=8), recipe=recipe
    ).report
    assert report.audit is not None and report.audit.int8_share == 1.0 and not report.audit.missed
    assert report.quantized_nodes == 3
    assert any(note.startswith("not tuned: the model's own quantizers are kept") for note in report.notes)
    assert any("the scales of 3 and the codes of 3 are kept" in note for note in report.notes)
    (output,) = report.check.outputs
    assert output.sqnr_db > 45  # FP16 between the codes; against the file itself, quantizers and all
    plan = Plan.load(folder / "out" / "plan.json")
    assert all(point.trained for point in plan.points)
    assert "as the model came with" in "\n".join(plan.explain("/c1/Conv"))


def test_deploy_calibrates_what_has_none(folder: Path) -> None:
    recipe = Recipe.from_mapping({"target": ["sm86"]})
    report = deploy(folder / "part.onnx", images(8), out=folder / "out", recipe=recipe).report
    assert report.audit is not None and report.audit.int8_share == 1.0
    assert any("2 operands that had none" in note for note in report.notes)
    assert report.check.outputs[0].sqnr_db > 35


def test_the_verbs_take_such_a_model(folder: Path) -> None:
    run = CliRunner().invoke
    data = str(folder / "data.npz")
    for name in ("kept", "moved"):
        made = str(folder / f"{name}.int8.onnx")
        result = run(main, ["quantize", str(folder / f"{name}.onnx"), "--data", data, "-o", made])
        assert result.exit_code == 0, result.output
        checked = run(main, ["check", str(folder / f"{name}.onnx"), made, "--data", data, "--min-sqnr-db", "40"])
        assert checked.exit_code == 0, checked.output
        again = run(main, ["quantize", made, "--data", data, "-o", str(folder / "again.onnx")])
        assert again.exit_code == 2 and "quantized already, by qdq" in " ".join(again.output.split())
    planned = run(main, ["plan", str(folder / "kept.onnx"), "-o", str(folder / "plan.json")])
    assert planned.exit_code == 0, planned.output
    tuned = run(main, ["tune", str(folder / "kept.onnx"), "-o", str(folder / "tuned.json")])
    assert tuned.exit_code == 2 and "nothing to tune" in " ".join(tuned.output.split())
