"""A model that was quantized for one compiler and is built by another is said so by `build`, `audit` and `check`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from models import images, save_samples, segmenter

from engines.backends.profile import profiles
from qdq.build import machine
from qdq.build.compiler import of_another
from qdq.cli.main import main
from qdq.model.made_for import KEY, made_for, mark

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

SAID = "was quantized for TensorRT 11, and TensorRT-RTX"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.onnx, samples in data/, and net quantized for each compiler; no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpus", list)
    onnx.save(segmenter(), "net.onnx")
    save_samples(tmp_path / "data", images(2))
    for name in ("rtx", "tensorrt"):
        run("quantize", "net.onnx", "--data", "data", "--compiler", name, "--rest", "fp16", "-o", f"{name}.onnx")
    return tmp_path


def run(*args: str) -> Result:
    """The command line in this process; it must succeed."""
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    return result


def test_a_model_says_what_it_is_for(folder: Path) -> None:
    assert made_for(onnx.load("tensorrt.onnx")) == "tensorrt:11" and made_for(onnx.load("rtx.onnx")) == "rtx"
    assert made_for(onnx.load("net.onnx")) == ""
    model = onnx.load("rtx.onnx")
    model.metadata_props.add(key="author", value="me")
    mark(model, "tensorrt:10.3")
    assert {e.key: e.value for e in model.metadata_props} == {"author": "me", KEY: "tensorrt:10.3"}


def test_build_audit_and_check_warn(folder: Path) -> None:
    said = run("build", "tensorrt.onnx", "-o", "t.engine", "--compiler", "rtx").stderr
    assert said.count("Warning: ") == 1 and SAID in said and "--compiler rtx, or build it by TensorRT 11" in said
    manifest = json.loads(Path("t.engine.manifest.json").read_text())
    assert (manifest["options"]["compiler"], manifest["options"]["quantized_for"]) == ("rtx", "tensorrt:11")
    assert SAID in run("audit", "t.engine").stderr and SAID in run("audit", "tensorrt.onnx").stderr
    assert SAID in run("check", "net.onnx", "tensorrt.onnx", "--data", "data", "--as-compiled").stderr
    assert "Warning" not in run("check", "net.onnx", "tensorrt.onnx", "--data", "data").stderr  # nothing was compiled


def test_what_is_built_by_its_own_compiler_is_no_matter(folder: Path) -> None:
    assert "Warning" not in run("build", "rtx.onnx", "-o", "r.engine").stderr
    assert "Warning" not in run("audit", "r.engine").stderr + run("audit", "net.onnx").stderr


def test_a_plan_of_one_compiler_is_not_bent_to_another(folder: Path) -> None:
    run("plan", "net.onnx", "-o", "plan.json", "--compiler", "tensorrt")
    made = ("quantize", "net.onnx", "--data", "data", "--plan", "plan.json", "-o", "made.onnx")
    run(*made)
    assert made_for(onnx.load("made.onnx")) == "tensorrt:11"
    refused = CliRunner().invoke(main, [*made, "--compiler", "rtx"])
    assert refused.exit_code == 2 and "--compiler" in refused.stderr


@pytest.mark.parametrize("key", profiles())
def test_versions_count(key: str) -> None:
    profile = profiles()[key]
    own = f"{profile.version or '1.7'}.1"
    assert of_another(key, profile.backend, own) == of_another("", profile.backend, own) == ""
    assert of_another("unheard:1", profile.backend, own) == ""
    if profile.version:
        assert f"quantized for {profile.title}, and TensorRT 9.1 compiled it" in of_another(key, "trt", "9.1")


def test_bytes_stay_the_same(folder: Path) -> None:
    again = ("quantize", "net.onnx", "--data", "data", "--compiler", "rtx", "--rest", "fp16", "-o", "again.onnx")
    run(*again)
    assert np.array_equal(np.fromfile("again.onnx", np.uint8), np.fromfile("rtx.onnx", np.uint8))
