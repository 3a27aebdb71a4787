"""`qdq calibrate` at the command line: merging, memory, workers, custom operators, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from models import constant, images, save_samples, segmenter
from onnx import TensorProto, helper

from qdq.assemble.quantize import quantize
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.core.resources import parse_bytes
from qdq.measure.checkpoint import Checkpoint
from qdq.measure.collect import collect, key
from qdq.model.storage import save
from qdq.passes.prepare import load_float
from qdq.plan import placement
from qdq.plan.settings import Settings


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(segmenter(), tmp_path / "m.onnx")
    save_samples(tmp_path / "all", images(5))
    save_samples(tmp_path / "a", images(5)[:2])
    save_samples(tmp_path / "b", images(5)[2:])
    return tmp_path


def test_merging_workers_and_memory_give_the_same_table(folder: Path) -> None:
    for name, *options in (
        ("all",),
        ("a",),
        ("b",),
        ("budget", "--memory", "32M"),
        ("workers", "--workers", "2"),
    ):
        data = name if (folder / name).is_dir() else "all"
        done = run(folder / "m.onnx", "--data", folder / data, "-o", folder / f"{name}.json", *options)
        assert done.exit_code == 0, done.output
    merged = run("--merge", folder / "b.json", folder / "a.json", "-o", folder / "merged.json")
    assert merged.exit_code == 0 and "2 tensors measured on 5 samples" in merged.output
    whole = (folder / "all.json").read_bytes()
    assert all((folder / f"{n}.json").read_bytes() == whole for n in ("budget", "workers", "merged"))
    twice = run("--merge", folder / "a.json", folder / "a.json", "-o", folder / "twice.json")
    assert "2 samples are equal to others" in twice.stderr
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (["--merge"], "needs two tables or more", 2),
        ([], "0 files are given", 2),
        (["m.onnx", "--data", "all", "--workers", "2", "--cluster", "tcp://x:1"], "Both --workers and --cluster", 2),
        (["m.onnx", "--data", "all", "--memory", "1k"], "--memory gives 0.001 MB, but one sample needs", 2),
        (["m.onnx", "--data", "all", "--memory", "lots"], "--memory is 'lots'", 2),
        (["m.onnx", "--data", "all", "--provider", "gpu"], "Unknown provider 'gpu': it must be one of cpu, cuda", 2),
        (["m.onnx", "--data", "all", "--custom-ops", "none.so"], "cannot load the custom operators of", 2),
    ],
)
def test_what_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str, code: int
) -> None:
    monkeypatch.chdir(folder)
    done = run(*options, "-o", "t.json")
    assert done.exit_code == code and said in done.stderr
    assert not (folder / "t.json").exists()


@pytest.mark.parametrize("option", [("--calibrator", "max"), ("--rounding", "nearest"), ("--no-shift",)])
def test_options_that_change_no_table_are_none_of_calibrate(folder: Path, option: tuple[str, ...]) -> None:
    done = run(folder / "m.onnx", "--data", folder / "all", "-o", folder / "t.json", *option)
    assert done.exit_code == 2 and f"No such option '{option[0]}'" in done.stderr


def test_a_missing_cuda_provider_is_named(folder: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    done = run(folder / "m.onnx", "--data", folder / "all", "--provider", "cuda", "-o", folder / "t.json")
    assert done.exit_code == 3 and "has no CUDAExecutionProvider; it has" in done.stderr


def test_an_unfinished_calibration_is_continued_and_said(folder: Path) -> None:
    model = load_float(folder / "m.onnx")
    plan = placement.plan(model)
    left = Checkpoint.beside(folder / "t.json", key(model, plan))
    left.write([collect(model, plan, images(5)[:2])])
    done = run(folder / "m.onnx", "--data", folder / "all", "-o", folder / "t.json")
    assert f"Going on with the unfinished calibration in {left.path}" in done.stderr
    assert (folder / "t.json").read_text() == collect(model, plan, images(5)).to_json()
    assert not left.path.exists()
    left.write([collect(model, plan, images(5)[:3])])
    refused = run(folder / "m.onnx", "--data", folder / "a", "-o", folder / "t.json")
    assert refused.exit_code == 2 and "holds 1 samples that are not among those given" in refused.stderr


@pytest.fixture
def custom(tmp_path: Path) -> tuple[Path, str]:
    """A model whose operator NegPos, of onnxruntime-extensions, splits a tensor by sign; and the library."""
    extensions = pytest.importorskip("onnxruntime_extensions", reason="pip install onnxruntime-extensions")
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("NegPos", ["a"], ["n", "p"], name="split", domain="ai.onnx.contrib"),
        helper.make_node("MatMul", ["p", "v"], ["y"], name="second"),
    ]
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, k])] for n, k in (("x", 16), ("y", 8))]
    weights = [constant(n, rng.normal(size=(16, k)).astype(np.float32)) for n, k in (("w", 16), ("v", 8))]
    graph = helper.make_graph(nodes, "g", *ends, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    samples = [{"x": rng.normal(size=(4, 16)).astype(np.float32)} for _ in range(8)]
    save_samples(tmp_path / "data", samples)
    return tmp_path, extensions.get_library_path()


def test_custom_operators_run_and_stay_in_float(custom: tuple[Path, str]) -> None:
    folder, library = custom
    command = [folder / "m.onnx", "--data", folder / "data", "-o", folder / "t.json"]
    assert "ai.onnx.contrib" in run(*command).stderr
    done = run(*command, "--custom-ops", library)
    assert done.exit_code == 0, done.output
    assert '"tensor": "p"' in (folder / "t.json").read_text()
    plan = CliRunner().invoke(main, ["explain", str(folder / "m.onnx"), "split"])
    assert "a custom operator (domain 'ai.onnx.contrib')" in plan.output


@pytest.mark.parametrize("calibrator", ["mse", "auto"])
def test_every_stage_of_quantize_registers_the_library(custom: tuple[Path, str], calibrator: str) -> None:
    """Ranges, second moments, channel scales, the choice of calibrators and the biases all run the float model."""
    folder, library = custom
    model = load_float(folder / "m.onnx")
    samples = [dict(np.load(path)) for path in sorted((folder / "data").iterdir())]
    settings = Settings(calibrator=calibrator, bias_correction="on")
    made = quantize(model, samples, settings=settings, custom_ops=[library])
    assert made.plan.quantized_nodes == ("first", "second")
    assert made.solution.notes[-1].startswith("biases are")
    save(made.model, folder / "q.onnx")
    with pytest.raises(InputError, match=r"ai\.onnx\.contrib"):  # outside, no session knows the operator
        quantize(model, samples, settings=settings)


def test_check_compares_models_with_custom_operators(custom: tuple[Path, str]) -> None:
    folder, library = custom
    samples = [dict(np.load(path)) for path in sorted((folder / "data").iterdir())]
    save(quantize(folder / "m.onnx", samples, custom_ops=[library]).model, folder / "q.onnx")
    command = ["check", *map(str, (folder / "m.onnx", folder / "q.onnx")), "--data", str(folder / "data")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "ai.onnx.contrib" in refused.stderr
    done = CliRunner().invoke(main, [*command, "--custom-ops", library, "--min-sqnr-db", "30", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["samples"] == 8


def test_sizes() -> None:
    assert [parse_bytes(t) for t in ("1024", "2G", "1.5 GiB", "800MB")] == [1024, 2 * 10**9, 3 << 29, 800 * 10**6]
    for wrong in ("", "G", "-1G", "0", "1T", "nan", "inf"):
        with pytest.raises(InputError, match="must be a size"):
            parse_bytes(wrong)
