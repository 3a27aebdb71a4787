"""What `check` and `deploy` compute: the file's arithmetic, or the compiled engine's; never ONNX Runtime's own."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from places import SHARED

from engines.backends import backend
from engines.core import onnx_runtime as ort
from engines.core.arithmetic import stand_in
from engines.core.errors import EngineError
from engines.verify.compare import compare
from qdq import Settings, evaluate, load, load_float, quantize, save
from qdq.assemble.finish import finish
from qdq.build import engine as build_engine, machine
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.measure.inference.inputs import as_samples
from qdq.passes.rewrites import QUANTIZED_REWRITES

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")


def overflowing() -> onnx.ModelProto:
    """x (1, 4, 8, 8) -> Conv 300 x -> square, up to 1e6 -> Conv / 1e5 -> y: FP16 cannot hold the squares."""
    rng = np.random.default_rng(0)
    weights = {"v": rng.normal(size=(4, 4, 1, 1)) * 300, "w": rng.normal(size=(3, 4, 1, 1)) * 1e-5}
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], "first"),
        helper.make_node("Mul", ["a", "a"], ["b"], "square"),
        helper.make_node("Conv", ["b", "w"], ["y"], "second"),
    ]
    tensors = [models.constant(name, array.astype(np.float32)) for name, array in weights.items()]
    return models.assemble(nodes, {"x": (1, 4, 8, 8)}, {"y": (1, 3, 8, 8)}, tensors)


def halved(proto: onnx.ModelProto) -> onnx.ModelProto:
    """All between the ends in FP16, without a look at ranges."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for tensor in made.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    first, last = made.graph.node[0], made.graph.node[-1]
    first.input[0], last.output[0] = "h", "r"
    ends = [
        helper.make_node("Cast", ["x"], ["h"], "start", to=onnx.TensorProto.FLOAT16),
        helper.make_node("Cast", ["r"], ["y"], "end", to=onnx.TensorProto.FLOAT),
    ]
    inner = list(made.graph.node)
    del made.graph.node[:]
    made.graph.node.extend([ends[0], *inner, ends[1]])
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """x.onnx, its FP16 form h.onnx, samples in data/."""
    monkeypatch.chdir(tmp_path)
    onnx.save(overflowing(), "x.onnx")
    onnx.save(halved(overflowing()), "h.onnx")
    rng = np.random.default_rng(1)
    models.save_samples(Path("data"), [{"x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(2)])
    return tmp_path


def run(*args: str) -> Any:
    result = CliRunner().invoke(main, [*args])
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def test_check_sees_an_overflow_of_fp16(folder: Path) -> None:
    report = run("check", "x.onnx", "h.onnx", "--data", "data", "--json")
    assert report["outputs"][0]["non_finite"] > 0 and not report["passed"]
    own = compare("x.onnx", "h.onnx", [dict(np.load(p)) for p in sorted(Path("data").iterdir())])
    assert own.sqnr_db > 40  # ONNX Runtime's own run of the same file sees nothing


def test_as_compiled_takes_an_engine_a_model_beside_one_or_compiles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("check", "x.onnx", "h.onnx", "--data", "data", "--as-compiled", "--json")
    compiled = run(*args)
    assert compiled["candidate"] == "Q/DQ model as compiled" and "rounded as compiled by rtx" in compiled["note"]
    assert CliRunner().invoke(main, ["build", "h.onnx", "-o", "h.engine"]).exit_code == 0
    monkeypatch.setattr(build_engine, "compile_engine", None)  # the layers beside the model are enough
    beside = run(*args)
    engine = run("check", "x.onnx", "h.engine", "--data", "data", "--as-compiled", "--json")
    assert compiled == beside == engine


def test_layers_of_another_engine_beside_a_model_are_not_taken(folder: Path) -> None:
    onnx.save(models.segmenter(), "other.onnx")
    assert CliRunner().invoke(main, ["build", "other.onnx", "-o", "other.engine"]).exit_code == 0
    found = build_engine.layers_of(Path("h.onnx"), Recipe(), None)
    assert found.model == Path("h.onnx") and not found.predicted


def test_layers_of_the_compiler_that_predicts_are_called_predicted(folder: Path) -> None:
    if not backend.backend_named("trt").needs_gpu or machine.gpus():
        pytest.skip("a GPU here compiles for itself")
    found = build_engine.layers_of(
        Path("h.onnx"), Recipe(settings=Settings(compiler="tensorrt"), targets=("sm90",)), None
    )
    assert found.predicted and found.table.backend == "rtx"
    samples = as_samples([dict(np.load(p)) for p in sorted(Path("data").iterdir())], load(Path("h.onnx")))
    report = evaluate("x.onnx", "h.onnx", samples, limits={}, as_compiled=found.table, predicted=True)
    assert report.candidate == "Q/DQ model as predicted" and "rounded as predicted by rtx" in report.note


def test_deploy_reports_both_figures(folder: Path) -> None:
    onnx.save(models.segmenter(), "net.onnx")
    models.save_samples(Path("images"), models.images(4))
    out = CliRunner().invoke(main, ["deploy", "net.onnx", "--data", "images", "--tune", "off", "--out", "out"])
    assert out.exit_code == 0 and "SQNR, rounded as compiled" in out.output
    report = json.loads(Path("out/report.json").read_text())
    checked = run("check", "net.onnx", "out/net.int8.onnx", "--data", "images", "--json")
    compiled = run("check", "net.onnx", "out/net.engine", "--data", "images", "--as-compiled", "--json")
    assert report["check"]["sqnr_db"] == checked["sqnr_db"]
    assert report["as_compiled"]["sqnr_db"] == compiled["sqnr_db"]
    assert any("float tensors are found in the kernels" in note for note in report["notes"])


def test_an_error_of_the_quantized_model_names_it(folder: Path) -> None:
    proto = halved(overflowing())
    proto.graph.node[2].domain = "nobody.knows"
    proto.opset_import.append(helper.make_opsetid("nobody.knows", 1))
    samples = as_samples([dict(np.load(p)) for p in sorted(Path("data").iterdir())], load(Path("x.onnx")))
    onnx.save(proto, "bad.onnx")
    with pytest.raises(EngineError, match=r"bad\.onnx"):
        evaluate("x.onnx", "bad.onnx", samples, limits={})


ZOO = ("resnet20", "magika")


def test_check_equals_the_run_without_optimizers_on_the_zoo(tmp_path: Path) -> None:
    """Within 0.1 dB, with FP16 for the rest and hoisted scales where they fit."""
    if not (SHARED / "tools/zoo.py").is_file():
        pytest.skip(f"no zoo in {SHARED}: set QDQ_SHARED to the folder of the models")
    for module in ("nibabel", "PIL"):
        pytest.importorskip(module, reason=f"{module} is not installed: the zoo reads its samples with it")
    sys.path.append(str(SHARED / "tools"))
    zoo = importlib.import_module("zoo")
    sys.path.remove(str(SHARED / "tools"))
    cases = [zoo.named(case) for case in zoo.zoo(SHARED / "models") if case.name in ZOO]
    assert len(cases) == len(ZOO)
    for case in cases:
        model = load_float(case.path)
        for scheme in ("int8", "fp8"):
            settings = Settings(scheme=scheme, calibrator="max", bias_correction="off")
            made = quantize(model, as_samples(case.calibration[:4], model), settings=settings)
            done = finish(made.model, made.plan, unquantized_type="fp16", table=made.table)
            save(QUANTIZED_REWRITES["hoist"](done.model).model, tmp_path / "q.onnx")
            found = evaluate(case.path, tmp_path / "q.onnx", as_samples(case.evaluation, model), limits={}).sqnr_db
            options = ort.session_options(threads=0, severity=4)
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            made_plain = stand_in(onnx.load(tmp_path / "q.onnx")).SerializeToString()
            plain = onnxruntime.InferenceSession(made_plain, options)
            unoptimised = compare(str(case.path), plain, case.evaluation).sqnr_db
            assert found == pytest.approx(unoptimised, abs=0.1), (case.name, scheme)
