"""`--judge measured` from the command line to the files, on a fake GPU behind the real names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from fake_gpu import FakeCuda, install
from graphs import build, node, normal, samples
from loadable_engines import rtx_engines, trt_engines
from models import save_samples

from engines.backends.compiler import ShapeRange
from engines.backends.layers import Layer
from engines.timing.driver import Driver
from engines.timing.events import EventTimer
from qdq.build.measured.forms import TimedForm
from qdq.cli.main import main
from qdq.deploy import deploy as deploy_module
from qdq.deploy.report.report import DeployReport
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.tune.tuned import TuningOutcome


def net() -> Model:
    """x -> (Conv -> Relu) twice -> y, of 32 channels."""
    tensors = {f"w{i}": 0.05 * normal(32, 32, 3, 3, seed=i) for i in range(2)}
    nodes = [
        node("Conv", "x w0", "a", "conv_0", pads=[1] * 4),
        node("Relu", "a", "b"),
        node("Conv", "b w1", "y", "conv_1", pads=[1] * 4),
    ]
    return build(nodes, {"x": (1, 32, 16, 16)}, tensors)


def fast_codes(layer: Layer, predicted_us: float) -> float:
    """A GPU on which kernels that read INT8 take a tenth of what is predicted."""
    return predicted_us * (0.1 if any(t.dtype == "int8" for t in layer.inputs) else 1.0)


def slow_codes(layer: Layer, predicted_us: float) -> float:
    """The same with a wrong clock: what is fast is slow."""
    return predicted_us * (10.0 if any(t.dtype == "int8" for t in layer.inputs) else 1.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """net.onnx and samples in data/; the current directory. Engines are not run through Polygraphy."""
    monkeypatch.chdir(tmp_path)
    onnx.save(net().proto, "net.onnx")
    save_samples(tmp_path / "data", samples(net(), 3))
    monkeypatch.setattr(deploy_module, "runs_here", lambda targets: False)
    return tmp_path


def qdq(*args: str) -> Result:
    result = CliRunner().invoke(main, args)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


QUICK = ("--calibrator", "max", "--equalize", "none", "--bias-correction", "off", "--tune-compiles", "6")


def deployed(*more: str) -> DeployReport:
    done = qdq("deploy", "net.onnx", "--data", "data", "--out", "out", *QUICK, *more)
    assert done.exit_code == 0, done.output
    return DeployReport.from_json(Path("out/report.json").read_text())


def test_deploy_ships_what_is_measured_fastest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx_engines(monkeypatch, fast_codes)
    report = deployed("--judge", "measured")
    tuning = report.tuning
    assert tuning is not None and tuning.measured is not None
    plan = Plan.from_json(Path("out/plan.json").read_text())
    assert plan.quantized_nodes == ("conv_0", "conv_1") and report.model_file == "net.int8.onnx"
    measured = tuning.measured
    forms = {form.name: form for form in measured.forms}
    assert {"FP16", "FP32", "as built"} <= forms.keys() and not [f.why for f in measured.forms if f.why]
    built = forms["as built"]
    assert measured.shipped == built and built.graph and built.measured_us and built.predicted_us
    assert forms["FP16"].measured_us == pytest.approx(forms["FP16"].predicted_us, rel=0.01)  # on this clock
    assert built.measured_us < 0.98 * (forms["FP16"].measured_us or 0.0)
    assert built.kernels and built.unpaired == 0
    assert all(k.predicted_us > 0 and k.measured_us > 0 for k in built.kernels)
    lines = Path("out/measured.jsonl").read_text().splitlines()
    assert [TimedForm.from_json(line) for line in lines] == list(measured.forms)
    rows = {row.what: row.value for row in report.rows()}
    label = "measured on NVIDIA GeForce RTX 4090 with TensorRT-RTX"
    assert any(what.startswith(label) and "of FP16" in value for what, value in rows.items())
    assert any(note.startswith(label) and "so it is taken" in note for note in report.notes)


def test_a_wrong_clock_changes_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx_engines(monkeypatch, slow_codes)
    report = deployed("--judge", "measured", "--gpu", "rtx4090")
    plan = Plan.from_json(Path("out/plan.json").read_text())
    assert not plan.points and report.model_file in ("net.fp16.onnx", "net.fp32.onnx")
    assert any("so nothing is quantized" in note for note in report.notes)


def test_tune_measures_by_default_where_the_gpu_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx_engines(monkeypatch, fast_codes)
    done = qdq("tune", "net.onnx", "--data", "data", "-o", "plan.json", "--tune-compiles", "6", "--json")
    assert done.exit_code == 0, done.output
    outcome = TuningOutcome.from_json(done.stdout)
    assert outcome.measured is not None and outcome.quantized_nodes == 2
    assert Plan.from_json(Path("plan.json").read_text()).quantized_nodes == ("conv_0", "conv_1")
    assert len(Path("plan.measured.jsonl").read_text().splitlines()) == len(outcome.measured.forms)
    shown = qdq("tune", "net.onnx", "-o", "plan.json", "--tune-compiles", "6")
    assert "furthest off" in shown.stdout and "measured on NVIDIA GeForce RTX 4090 with" in shown.stdout


def test_predicted_times_decide_where_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, _ = rtx_engines(monkeypatch, slow_codes)
    assert qdq("tune", "net.onnx", "-o", "plan.json", "--judge", "predicted", "--json").exit_code == 0
    assert "cuEventRecord" not in cuda.calls and not Path("plan.measured.jsonl").exists()


def test_a_spread_larger_than_the_gain_keeps_float(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsteady(layer: Layer, predicted_us: float) -> Callable[[float], float]:
        us, rng = fast_codes(layer, predicted_us), np.random.default_rng(0)
        return lambda at_s: us * float(rng.uniform(0.1, 1.9))

    rtx_engines(monkeypatch, unsteady)
    done = qdq("tune", "net.onnx", "-o", "plan.json", "--tune-compiles", "6", "--json")
    assert done.exit_code == 0, done.output
    outcome = TuningOutcome.from_json(done.stdout)
    assert outcome.measured is not None and outcome.quantized_nodes == 0, outcome.said
    best = min(f.measured_us for f in outcome.measured.forms if f.measured_us and f.quantized_nodes)
    plain = outcome.measured.form(outcome.measured.unquantized).measured_us or 0.0
    assert best < 0.98 * plain  # it is faster, and not by more than the spread


def test_the_bound_on_accuracy_holds_for_what_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx_engines(monkeypatch, fast_codes)
    report = deployed("--judge", "measured", "--min-sqnr-db", "55")
    plan = Plan.from_json(Path("out/plan.json").read_text())
    assert report.passed and not plan.points and report.tuning is not None and report.tuning.measured is not None


def test_without_a_gpu_of_the_target_it_ends_with_3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    more = ("net.onnx", "--data", "data", "--judge", "measured")
    for args in (("deploy", *more, "--out", "out"), ("tune", *more, "-o", "plan.json")):
        done = qdq(*args)
        assert done.exit_code == 3 and "no NVIDIA GPU or driver was found here" in done.stderr
    install(monkeypatch, FakeCuda())
    done = qdq("deploy", *more, "--out", "out", "--target", "sm86")
    assert done.exit_code == 3 and "the engine is for sm86, and here is NVIDIA GeForce RTX 4090 (sm89)" in done.stderr
    assert not Path("out").exists() and not Path("plan.json").exists()


def test_what_does_not_load_is_said_and_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engines = rtx_engines(monkeypatch, fast_codes)
    add = engines.add

    def only_float(made: Any, model: onnx.ModelProto, shapes: Any) -> None:
        if not any(n.op_type == "QuantizeLinear" for n in model.graph.node):
            add(made, model, shapes)

    monkeypatch.setattr(engines, "add", only_float)
    done = qdq("tune", "net.onnx", "-o", "plan.json", "--tune-compiles", "6", "--json")
    outcome = TuningOutcome.from_json(done.stdout)
    assert outcome.quantized_nodes == 0 and outcome.measured is not None
    assert any("does not load the engine" in form.why for form in outcome.measured.forms)
    assert any("was left out: it does not run" in said for said in outcome.said)


def test_tensorrt_goes_through_the_same_bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt_engines(monkeypatch, fast_codes)
    more = ("--compiler", "tensorrt", "--target", "sm89")
    report = deployed("--judge", "measured", *more)
    assert report.model_file == "net.int8.onnx" and report.tuning is not None and report.tuning.measured is not None
    built = report.tuning.measured.shipped
    assert built.name == "as built" and built.compiler == "TensorRT" and built.version == "11.4.0" and built.kernels
    assert all(k.kernel.startswith("trt ") and k.predicted_us > 0 for k in built.kernels)  # paired by ONNX nodes
    done = qdq("tune", "net.onnx", "--data", "data", "-o", "plan.json", *more)
    assert done.exit_code == 0 and "measured on NVIDIA GeForce RTX 4090 with TensorRT 11.4.0" in done.stdout
    assert Plan.from_json(Path("plan.json").read_text()).quantized_nodes == ("conv_0", "conv_1")


def test_a_wrong_clock_changes_the_plan_of_tensorrt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt_engines(monkeypatch, slow_codes)
    report = deployed("--judge", "measured", "--compiler", "tensorrt", "--target", "sm89")
    assert not Plan.from_json(Path("out/plan.json").read_text()).points
    assert any("so nothing is quantized" in note for note in report.notes)


def test_the_timer_of_a_driver_times_kernels_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, engines = rtx_engines(monkeypatch, lambda layer, us: 7.0)
    from engines.backends.backend import backend_named

    made = backend_named("rtx").build(
        net().proto, targets=("sm89",), shapes={"x": ShapeRange.fixed((1, 32, 16, 16))}, options=None, directory=None,
        on_progress=None,
    )  # fmt: skip
    with Driver() as driver:
        seen = EventTimer(driver).kernel_times(made, 3)
    assert [k.name for k in seen] == [k.name for k in engines[made.data].kernels] and {k.us for k in seen} == {7.0}
    assert json.loads(made.table.to_json())["layers"]
