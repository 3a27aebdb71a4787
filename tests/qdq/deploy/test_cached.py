"""A second `deploy` takes what the first kept, and every file of it is the same, byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from models import assemble, constant, images, save_samples, segmenter

from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.core.disk.cache import caching
from qdq.measure.inference.inputs import as_samples
from qdq.model.storage import load
from qdq.passes.prepare import prepare

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

TOLD = ("provenance.json", "report.html", "SHA256SUMS")  # hold the command of their run
QUICK = ("--tune-compiles", "6")


def qdq(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return result


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in TOLD}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(segmenter(spatial=(16, 16), width=8), "net.onnx")
    save_samples(tmp_path / "data", images(4, (1, 1, 16, 16)))
    save_samples(tmp_path / "held", images(2, (1, 1, 16, 16), seed=5))
    return tmp_path


def never(*_: object, **__: object) -> object:
    pytest.fail("done again")


def test_a_second_run_does_nothing_again_and_is_equal_in_every_byte(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy = ("deploy", "net.onnx", "--data", "data", "--eval", "held", *QUICK)
    qdq(*deploy, "--out", "plain")
    qdq(*deploy, "--out", "first", "--cache", "kept")
    for stage in (
        "qdq.assemble.tables.collect",
        "qdq.deploy.steps.shipped.quantize",
        "qdq.tune.find_plan._found",
        "qdq.build.kept.compile_engine",
        "qdq.build.pricing.processes.compile_engine",
        "qdq.deploy.check._evaluated",
        "qdq.passes.prepare.prepare",
    ):
        monkeypatch.setattr(stage, never)
    monkeypatch.setenv("QDQ_CACHE", "kept")
    qdq(*deploy, "--out", "second")
    assert files(folder / "plain") == files(folder / "first") == files(folder / "second")


def test_other_data_and_other_weights_are_other_work(folder: Path) -> None:
    deploy = ("deploy", "--data", "data", "--tune", "off")
    qdq(*deploy, "net.onnx", "--out", "first", "--cache", "kept")
    onnx.save(segmenter(spatial=(16, 16), width=8, seed=3), "net.onnx")
    for words, out in (((), "w"), (("--scheme", "fp8", "--calibrator", "max"), "s")):
        qdq(*deploy, *words, "net.onnx", "--out", f"{out}1")
        qdq(*deploy, *words, "net.onnx", "--out", f"{out}2", "--cache", "kept")
        assert files(folder / f"{out}1") == files(folder / f"{out}2")
    save_samples(folder / "data", images(4, (1, 1, 16, 16), seed=8))
    qdq(*deploy, "net.onnx", "--out", "d1")
    qdq(*deploy, "net.onnx", "--out", "d2", "--cache", "kept")
    assert files(folder / "d1") == files(folder / "d2") != files(folder / "w1")


def test_no_sample_path_or_name_of_a_file_is_kept(folder: Path) -> None:
    (folder / "data").rename(folder / "DoeJane")
    for path in (folder / "DoeJane").iterdir():
        path.rename(path.with_name(f"born1942-{path.name}"))
    qdq("deploy", "net.onnx", "--data", "DoeJane", "--eval", "held", *QUICK, "--out", "out", "--cache", "kept")
    kept = [path.read_bytes() for path in folder.glob("kept/*/*")]
    values = np.load(next((folder / "DoeJane").iterdir()))["image"].tobytes()
    assert len(kept) > 5
    for content in kept:
        for secret in (b"DoeJane", b"born1942", b"net.onnx", str(folder).encode(), values[:64]):
            assert secret not in content, secret


def test_damage_anywhere_changes_nothing(folder: Path) -> None:
    deploy = ("deploy", "net.onnx", "--data", "data", *QUICK, "--cache", "kept")
    qdq(*deploy, "--out", "first")
    held = sorted(folder.glob("kept/*/*"))
    assert {path.parent.name for path in held} >= {
        "engines", "prepared", "quantized", "reports", "tables", "tuned", "works",
    }  # fmt: skip
    for number, path in enumerate(held):
        path.write_bytes((b"", path.read_bytes()[:-3], b"x" * 100)[number % 3])
    qdq(*deploy, "--out", "second")
    assert files(folder / "first") == files(folder / "second")


def test_a_plan_a_table_and_workers(folder: Path) -> None:
    common = ("net.onnx", "--data", "data")
    qdq("plan", "net.onnx", "-o", "plan.json")
    qdq("calibrate", *common, "--plan", "plan.json", "-o", "table.json")
    qdq("deploy", *common, "--out", "given", "--plan", "plan.json", "--table", "table.json")
    report = json.loads((folder / "given/report.json").read_text())
    assert report["tuning"] is None and report["quantized_nodes"] == 2
    assert [note for note in report["notes"] if note.startswith("not tuned")] == ["not tuned: the plan was given"]
    assert (folder / "given/table.json").read_bytes() == (folder / "table.json").read_bytes()
    qdq("deploy", *common, "--out", "workers", "--plan", "plan.json", "--workers", "2")
    assert files(folder / "workers") == files(folder / "given")
    refused = qdq("deploy", *common, "--out", "no", "--table", "table.json", code=2)
    assert "give that --plan too, or --tune off" in refused.stderr and not (folder / "no").exists()
    refused = qdq("deploy", *common, "--out", "no", "--plan", "plan.json", "--scheme", "fp8", code=2)
    assert "already says what is quantized" in refused.stderr
    onnx.save(segmenter(spatial=(16, 16), width=8, seed=4), "other.onnx")
    refused = qdq("deploy", "other.onnx", "--data", "data", "--out", "no", "--plan", "plan.json", code=2)
    assert "made from another model" in refused.stderr and not (folder / "no").exists()


@pytest.mark.parametrize("scheme", ["int8-smooth", "fptq", "nvfp4"])
def test_what_is_told_of_a_model_comes_back(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdq.deploy.steps import shipped

    model = prepare(load(two_products()))
    rng = np.random.default_rng(0)
    data = as_samples([{"x": rng.normal(size=(1, 4, 32)).astype(np.float32) * 40} for _ in range(4)], model)
    recipe = Recipe.from_mapping({"scheme": scheme, "tune": "off", "compiler": "rtx"})
    with caching(tmp_path / "kept"):
        first = shipped.written(model, data, recipe, pricer=None)
        monkeypatch.setattr(shipped, "quantize", never)
        second = shipped.written(model, data, recipe, pricer=None)
    ours, theirs = first.made.solution, second.made.solution
    assert ours.activations.keys() == theirs.activations.keys() and ours.divisors.keys() == theirs.divisors.keys()
    assert (ours.tokens, ours.notes, first.finished.notes) == (theirs.tokens, theirs.notes, second.finished.notes)
    for name, params in ours.activations.items():
        held = theirs.activations[name]
        assert np.array_equal(held.scale, params.scale) and held.scale.dtype == params.scale.dtype
        assert repr(replace(held, scale=np.float32(1))) == repr(replace(params, scale=np.float32(1)))
    for name, divisor in ours.divisors.items():
        assert np.array_equal(theirs.divisors[name], divisor)
    assert first.made.plan == second.made.plan
    assert first.finished.model.proto == second.finished.model.proto


def two_products() -> onnx.ModelProto:
    """x (1, 4, 32) -> MatMul -> Relu -> MatMul."""
    rng = np.random.default_rng(1)
    weights = [constant(name, rng.normal(size=(32, 32)).astype(np.float32)) for name in ("w", "v")]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        onnx.helper.make_node("Relu", ["a"], ["b"], name="relu"),
        onnx.helper.make_node("MatMul", ["b", "v"], ["y"], name="second"),
    ]
    return assemble(nodes, {"x": (1, 4, 32)}, {"y": (1, 4, 32)}, weights)
