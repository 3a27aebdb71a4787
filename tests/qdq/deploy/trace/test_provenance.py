"""provenance.json and SHA256SUMS: complete, of a schema, the same but for the date, and free of names and places."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from clinic import image, thresholds
from image_files import write_nifti
from models import images, save_samples, segmenter

from calib_data import open_samples
from engines.core.files import sha256_file
from qdq.cli.main import main
from qdq.deploy.report.schemas import schema
from qdq.deploy.trace.host import moment
from qdq.deploy.trace.provenance import Provenance
from qdq.measure.inference.inputs import input_specs
from qdq.model.storage import load

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")


def qdq(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(segmenter(), "net.onnx")
    save_samples(tmp_path / "data", images(4))
    save_samples(tmp_path / "held", images(2, seed=9))
    return tmp_path


def deploy(*words: object, code: int = 0) -> dict[str, Any]:
    """`qdq deploy` into out/; its provenance."""
    qdq("deploy", "net.onnx", "--data", "data", "--tune", "off", "--out", "out", *words, code=code)
    found: dict[str, Any] = json.loads(Path("out/provenance.json").read_text())
    return found


def test_it_says_where_a_result_comes_from(folder: Path) -> None:
    made = deploy("--eval", "held", "--min-sqnr-db", 200, "--exclude", "/head/*", "--target", "sm86", code=1)
    held = json.loads(qdq("schema", "provenance").stdout)
    assert held == json.loads(json.dumps(schema("provenance"))) and made["schema"] == Provenance.FORMAT
    jsonschema.Draft202012Validator(held).validate(made)
    report, manifest = (json.loads(Path(f"out/{n}.json").read_text()) for n in ("report", "net.engine.manifest"))
    assert made["model"] == {"name": "net.onnx", "sha256": sha256_file("net.onnx")}
    assert made["calibration"] == {"samples": 4, "sha256": manifest["samples"]}
    evaluated = open_samples("held", input_specs(load("net.onnx"))).sha256()
    assert made["evaluation"] == {"samples": 2, "sha256": evaluated} and made["overlap"] == 0
    assert made["limits"] == {"min_sqnr_db": 200} and not made["passed"] and made["failures"] == report["failures"]
    assert made["options"]["exclude"] == ["/head/*"] and made["options"]["tune"] == "off"
    assert made["results"]["sqnr_db"] == report["check"]["outputs"][0]["sqnr_db"]
    assert made["results"]["int8_share"] == report["audit"]["int8_share"]
    assert made["compiler"]["version"] == metadata.version("tensorrt_rtx_cu13") and made["compiler"]["targets"] == [
        "sm86"
    ]
    for name in ("numpy", "onnx", "onnxruntime", "msgspec", "tensorrt-rtx-cu13"):
        assert made["packages"][name] == metadata.version(name)
    assert made["host"]["cpus"] > 0 and made["host"]["python"].startswith("3.")
    words = "qdq deploy net.onnx --data DATA --out OUT --eval EVALUATION --exclude /head/* --tune off"
    assert set(words.split()) < set(made["command"]) and "held" not in made["command"]
    wanted = {"net.int8.onnx", "net.engine", "net.engine.json", "net.engine.manifest.json", "plan.json", "report.json"}
    assert {f["name"]: f["sha256"] for f in made["files"]}.items() >= {
        n: sha256_file(f"out/{n}") for n in wanted
    }.items()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(made["created"])).total_seconds()) < 600
    assert Provenance.from_json(Path("out/provenance.json").read_bytes()).to_mapping() == made


def test_sha256sum_checks_the_folder_and_a_second_run_replaces_both(folder: Path) -> None:
    first = deploy()
    for _ in range(2):
        done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd="out", capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count(": OK") == len(list(Path("out").iterdir())) - 1
        second = deploy("--scheme", "int8", "--exclude", "/head/*")
    assert second["options"]["exclude"] != first["options"]["exclude"] and second["files"] != first["files"]
    path = Path("out/report.json")
    path.write_bytes(path.read_bytes()[:-2])
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd="out", capture_output=True, text=True)
    assert done.returncode == 1 and "report.json: FAILED" in done.stdout


def test_with_source_date_epoch_two_runs_give_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    kept = []
    for _ in range(2):
        assert deploy()["created"] == "2023-11-14T22:13:20Z"
        kept.append({path.name: path.read_bytes() for path in Path("out").iterdir()})
    assert kept[0] == kept[1]


@pytest.mark.parametrize("text", ["soon", "1.5", "9" * 30])
def test_a_wrong_source_date_epoch_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    monkeypatch.setattr("qdq.deploy.deploy.written", lambda *_, **__: pytest.fail("it calibrated"))
    done = qdq("deploy", "net.onnx", "--data", "data", "--out", "out", code=2)
    assert "SOURCE_DATE_EPOCH" in done.stderr and not Path("out").exists()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert moment().endswith("Z")


def test_no_file_names_a_patient_or_a_place(tmp_path: Path) -> None:
    """Whatever the folders and files of the images are called."""
    place = tmp_path / "ROENTGEN_WILHELM" / "study_1895"
    for n in range(2):
        write_nifti(place / f"MRN00{n}.nii.gz", image(n), np.diag([-1.0, 1, 1, 1]))
    onnx.save(thresholds(1, 2), tmp_path / "net.onnx")
    (tmp_path / "r.yaml").write_text("volume: {orientation: RAS, patch: [8, 8, 8]}\nwindow: {patch: [8, 8, 8]}\n")
    (tmp_path / "hospital.key").write_bytes(b"k" * 32)
    out, words = tmp_path / "out", ("--recipe", tmp_path / "r.yaml", "--case-key", tmp_path / "hospital.key")
    qdq("deploy", tmp_path / "net.onnx", "--data", place, *words, "--tune", "off", "--out", out)
    assert {"provenance.json", "SHA256SUMS", "inference.json"} <= {path.name for path in out.iterdir()}
    for path in out.iterdir():
        content = path.read_bytes().lower()
        for word in ("roentgen", "wilhelm", "1895", "mrn00", "study", str(tmp_path).lower(), "hospital"):
            assert word.encode() not in content, (path.name, word)
    assert "RAS" in (out / "inference.json").read_text()
