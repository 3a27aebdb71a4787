"""Deploying for a compiler that needs a GPU which is not here: everything but the engine, and how that is built."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from click.testing import CliRunner, Result
from models import images, save_samples, segmenter

from engines.backends import rtx, trt
from engines.backends.doctor import InstalledGpu
from engines.backends.profile import profile_named
from engines.core.documents import replace
from engines.core.errors import BuildError
from engines.core.files import sha256_file
from qdq.build import engine, machine
from qdq.build.machine import builds_here, stand_in
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.plan.settings import Settings

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

A10 = InstalledGpu(name="NVIDIA A10", target="sm86", memory_bytes=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.onnx and samples in data/, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpus", list)
    onnx.save(wide(), "net.onnx")
    save_samples(tmp_path / "data", images(3, (1, 16, 8, 8)))
    return tmp_path


def wide() -> onnx.ModelProto:
    """Two convolutions of so many channels that TensorRT's INT8 kernels gain."""
    return segmenter(inputs=16, width=32, classes=16)


def deploy(*args: str, code: int = 0) -> Result:
    """`qdq deploy` of the folder's model into out/."""
    result = CliRunner().invoke(main, ["deploy", "net.onnx", "--data", "data", "--out", "out", *args])
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return result


def words(result: Result) -> str:
    """What was printed, without the line breaks of tables."""
    return " ".join(result.output.split())


class TestWithoutTheGpu:
    def test_all_but_the_engine_is_written(self, folder: Path) -> None:
        said = words(deploy("--gpu", "a10", "--tune", "off"))
        assert {p.name for p in (folder / "out").iterdir()} >= {
            "net.int8.onnx",
            "plan.json",
            "table.json",
            "report.json",
            "build_engine.sh",
        }
        assert not list((folder / "out").glob("*.engine*"))
        assert "net.onnx for sm86 by TensorRT 11 (a10 is a GPU of the data centre)" in said
        assert "no engine was built, which takes TensorRT 11 and a GPU of sm86" in said
        assert "there: sh build_engine.sh" in said
        script = folder / "out/build_engine.sh"
        built = "qdq build ./net.int8.onnx -o ./net.engine --compiler tensorrt:11 --target sm86 --recipe"
        assert os.access(script, os.X_OK) and built in script.read_text()
        assert f"expect {sha256_file(folder / 'out/net.int8.onnx')} ./net.int8.onnx" in script.read_text()
        assert '"shape"' not in script.read_text()  # the model's are fixed
        assert "compiles the model, which checks its syntax and types for TensorRT 11, not its kernels or times" in said
        assert "as compiled" not in said and "kernels |" not in said

    def test_what_an_earlier_run_left_is_not_taken_for_this_one_s(self, folder: Path) -> None:
        deploy("--target", "sm86", "--tune", "off")
        (folder / "out/notes.txt").write_text("mine")
        assert len(list((folder / "out").glob("net.engine*"))) == 3
        deploy("--gpu", "a10", "--tune", "off")
        assert not list((folder / "out").glob("net.engine*")) and (folder / "out/build_engine.sh").exists()
        deploy("--target", "sm86", "--tune", "off")
        assert (folder / "out/net.engine").exists() and not (folder / "out/build_engine.sh").exists()
        assert (folder / "out/notes.txt").read_text() == "mine"

    def test_the_report_says_what_was_not_built(self, folder: Path) -> None:
        deploy("--compiler", "tensorrt:10.16", "--target", "sm80", "--target", "sm90", "--tune", "off")
        report = json.loads((folder / "out/report.json").read_text())
        assert report["audit"] is report["as_compiled"] is report["float_engine"] is report["tuning"] is None
        assert report["targets"] == ["sm80", "sm90"] and report["compiler"] == "TensorRT 10.16"
        assert report["chosen_because"] == "" and report["not_built"].startswith("no engine was built")
        assert report["not_built"].endswith("once for each: an engine is for the GPU that it is built on")
        assert report["quantized_nodes"] == 2 and report["check"]["outputs"][0]["sqnr_db"] > 20

    def test_the_model_has_the_documented_form(self, folder: Path) -> None:
        deploy("--gpu", "l4", "--tune", "off")
        ops = Counter(n.op_type for n in onnx.load("out/net.int8.onnx").graph.node)
        assert ops["QuantizeLinear"] == 2 and ops["Conv"] == 2 and not ops["Pad"] + ops["Sub"]
        plan = json.loads((folder / "out/plan.json").read_text())
        assert plan["settings"]["compiler"] == "tensorrt:11" and plan["rewrites"] == []

    def test_times_are_predicted_of_what_no_search_chose(self, folder: Path) -> None:
        said = words(deploy("--gpu", "a10", "--gpu", "h100", "--tune", "off"))
        found = json.loads((folder / "out/report.json").read_text())["details"]
        assert found["gpus"] == ["a10", "h100"] and len(found["each_us"]) == 2 and min(found["each_us"]) > 0
        mean = sum(found["each_us"]) / 2
        assert sum(kernel["us"] for kernel in found["kernels"]) == pytest.approx(mean)
        assert f"predicted on a10, h100, the mean {mean:.1f} us; error" in said
        assert all(f"{us:.1f} us on {gpu}" in said for us, gpu in zip(found["each_us"], found["gpus"], strict=True))
        assert "times of TensorRT 11 are derived from what TensorRT-RTX makes of the float model" in said
        assert "with TensorRT-RTX: not predicted, for nothing was tuned: --compiler rtx" in said
        copy = folder / "out/plan.json"
        of_plan = words(deploy("--gpu", "a10", "--plan", str(copy.rename(folder / "plan.json"))))
        assert "for sm86 by TensorRT 11 (the plan is for it)" in of_plan
        assert f"predicted on a10 {found['each_us'][0]:.1f} us" in of_plan

    def test_the_other_compiler_always_has_a_line(self, folder: Path) -> None:
        fp8 = words(deploy("--gpu", "l4", "--scheme", "fp8"))
        assert "with TensorRT-RTX: not predicted" in fp8 and "predicted on" not in fp8
        assert "with TensorRT-RTX: it has no such target as sm90" in words(deploy("--gpu", "h100", "--tune", "off"))
        assert "with TensorRT 11: not predicted" in words(deploy("--target", "sm89", "--tune", "off"))
        rtx = words(deploy("--gpu", "rtx4090", "--scheme", "fp8", "--time-limit", "1"))
        assert "with TensorRT 11: not predicted, which it is of INT8 only" in rtx

    def test_limits_decide_the_exit_code_as_ever(self, folder: Path) -> None:
        deploy("--gpu", "a10", "--min-sqnr-db", "1")
        deploy("--gpu", "a10", "--min-sqnr-db", "200", "--tune", "off", code=1)
        assert "cannot be checked: no engine was built" in words(
            deploy("--gpu", "a10", "--min-int8-share", ".5", code=1)
        )

    def test_a_refusal_of_the_stand_in_is_said_and_no_end(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refusing(*args: object, **more: object) -> None:
            raise BuildError("no kernel for that")

        deploy("--gpu", "a10")  # imports the modules that have a compiler of their own
        with monkeypatch.context() as patched:
            patched.setattr(engine, "compile_engine", refusing)
            said = words(deploy("--gpu", "a10", "--cache", "kept"))
        assert "refuses it, and TensorRT 11 may too: no kernel for that" in said
        assert "refuses it" not in words(deploy("--gpu", "a10", "--cache", "kept"))  # it may have been of the machine

    def test_a_model_newer_than_the_version_is_said(self, folder: Path) -> None:
        onnx.save(onnx.version_converter.convert_version(wide(), 21), "net.onnx")
        assert "opset 21; TensorRT 10.3 documents opsets up to 20" in words(deploy("--compiler", "tensorrt:10.3"))
        assert "documents opsets" not in words(deploy("--compiler", "tensorrt"))

    def test_a_bare_target_says_how_to_ask_for_the_other(self, folder: Path) -> None:
        first = words(deploy("--target", "sm86", "--tune", "off"))
        assert "net.onnx for sm86 by TensorRT-RTX (--target sm86 alone says of no GPU" in first
        assert "for TensorRT 11 give --compiler tensorrt" in first and (folder / "out/net.engine").is_file()

    def test_what_only_the_other_has_is_refused_with_a_hint(self, folder: Path) -> None:
        said = words(deploy("--compiler", "rtx", "--target", "sm90", code=2))
        assert "TensorRT-RTX has no target 'sm90'" in said and "--compiler tensorrt" in said


def test_kernels_are_priced_as_the_compiler_that_is_here_makes_them(folder: Path) -> None:
    def audit(gpu: str) -> Result:
        return CliRunner().invoke(main, ["audit", "out/net.int8.onnx", "--compiler", "tensorrt", "--gpu", gpu])

    deploy("--gpu", "a10")
    there, lacking = audit("a10"), audit("h100")
    assert there.exit_code == 0 and "was quantized for TensorRT 11, and TensorRT-RTX" in words(there)
    assert lacking.exit_code == 2 and "which has no target sm90 (h100)" in words(lacking)


def test_schemes_are_compared_without_kernels(folder: Path) -> None:
    arguments = ["compare", "net.onnx", "--data", "data", "--schemes", "int8", "--gpu", "h100", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout)
    assert compared["targets"] == ["sm90"] and compared["gpus"] == ["h100"]
    assert any("no engine was built, which takes TensorRT 11" in note for note in compared["notes"])
    (row,) = (row for row in compared["rows"] if row["scheme"] == "int8")
    assert row["problem"] == "" and row["sqnr_db"] > 20 and row["quantized_nodes"] == 2
    assert row["kernels"] is row["weight_bytes"] is row["shares"] is None
    times = [row["predicted_us"] for row in compared["rows"]]
    assert len(times) == 3 and all(us > 0 for us in times)  # FP32, FP16, INT8: derived


class TestWithTheGpu:
    """TensorRT is what TensorRT-RTX compiles, under its name: the flow is the same whoever compiles."""

    @pytest.fixture(autouse=True)
    def _machine(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def build(model: object, **more: object) -> object:
            made = rtx.build(model, **{**more, "targets": ("sm86",)})  # type: ignore[arg-type]
            table = replace(made.table, backend="trt", version="11.4.0.106", targets=("sm86",))
            return dataclasses.replace(made, table=table)

        monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
        monkeypatch.setattr(machine, "gpus", lambda: [A10])
        monkeypatch.setattr(trt, "BACKEND", dataclasses.replace(trt.BACKEND, build=build))
        monkeypatch.setattr("qdq.deploy.deploy.runs_here", lambda targets: False)  # the engine itself cannot run here

    def test_it_is_built_and_audited(self, folder: Path) -> None:
        said = words(deploy("--gpu", "a10", "--tune", "off"))
        assert "no engine was built" not in said and "multiply-adds, as compiled" in said
        report = json.loads((folder / "out/report.json").read_text())
        assert (
            report["audit"]["backend"] == "trt" and report["audit"]["int8_share"] == 1.0 and report["not_built"] == ""
        )
        manifest = json.loads((folder / "out/net.engine.manifest.json").read_text())
        assert (manifest["options"]["compiler"], manifest["options"]["backend"]) == ("tensorrt:11", "trt")

    def test_another_version_is_said(self, folder: Path) -> None:
        said = words(deploy("--compiler", "tensorrt:10.16", "--target", "sm86"))
        assert "quantized for TensorRT 10.16, and TensorRT 11.4.0.106 compiled it" in said
        assert "again with --compiler tensorrt:11, or build it by TensorRT 10.16" in said

    def test_another_gpu_than_that_of_the_target_does_not_build(self, folder: Path) -> None:
        assert "a GPU of sm80" in words(deploy("--gpu", "a100"))
        assert not (folder / "out/net.engine").exists()


def test_what_stands_in_has_the_types_of_the_model_and_is_no_turing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", list)
    plain = segmenter()
    given = {"t4": "sm89", "a100": "sm80", "h100": "sm89", "a10": "sm86"}
    for gpu, target in given.items():
        found = stand_in(Recipe.from_mapping({"gpu": gpu}), plain)
        assert (found.backend, found.targets) == ("rtx", (target,))
    fp8 = onnx.ModelProto()
    fp8.CopyFrom(plain)
    fp8.graph.initializer.add(name="codes", data_type=onnx.TensorProto.FLOAT8E4M3FN, dims=[1], raw_data=b"\0")
    assert stand_in(Recipe.from_mapping({"compiler": "tensorrt", "target": "sm86"}), fp8).targets == ("sm89",)
    own = Recipe(settings=Settings(compiler="rtx"), targets=("sm75",))
    assert stand_in(own, plain) is own and builds_here(own)
    assert profile_named("tensorrt").backend == "trt" and not builds_here(Recipe.from_mapping({"gpu": "a10"}))
