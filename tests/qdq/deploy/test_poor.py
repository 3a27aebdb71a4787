"""Poor results are said: what costs most and what to try, limits on INT8, names of float files, and seen samples."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from models import assemble, constant, images, save_samples, segmenter
from onnx import helper

from engines.core.documents import replace
from engines.verify.audit import Audit, NodeAudit
from engines.verify.meaning import Meaning
from engines.verify.report import OutputReport, Report
from engines.verify.sums import Sums
from qdq.cli.main import main
from qdq.core.disk.cache import caching
from qdq.deploy.costs import find
from qdq.deploy.costs.find import NOTHING, with_costs
from qdq.deploy.costs.switches import float_weights, switched
from qdq.deploy.report.report import check_rows, headline, share_failures, warning_lines
from qdq.measure.inference.session import Session
from qdq.model.storage import load
from qdq.passes.prepare import load_float

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

PLAIN = ("--tune", "off", "--calibrator", "max", "--equalize", "none", "--bias-correction", "off", "--no-shift")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with wide.onnx and net.onnx and samples for both; the current directory."""
    monkeypatch.chdir(tmp_path)
    onnx.save(wide(), "wide.onnx")
    onnx.save(segmenter(), "net.onnx")
    rng = np.random.default_rng(0)
    for name in ("rows", "other"):
        save_samples(tmp_path / name, [{"x": rng.normal(size=(4, 32)).astype(np.float32)} for _ in range(4)])
    save_samples(tmp_path / "data", images(3))
    return tmp_path


def wide() -> onnx.ModelProto:
    """x -> /first/MatMul -> /widen/Mul, one column 40 times the others -> /bad/MatMul, which ignores it -> y."""
    rng = np.random.default_rng(0)
    factors, second = np.ones(32), rng.normal(size=(32, 16)) / 6
    factors[5], second[5] = 40, 0
    tensors = {"first.w": rng.normal(size=(32, 32)) / 6, "factors": factors, "bad.w": second}
    nodes = [
        helper.make_node("MatMul", ["x", "first.w"], ["h"], name="/first/MatMul"),
        helper.make_node("Mul", ["h", "factors"], ["wide"], name="/widen/Mul"),
        helper.make_node("MatMul", ["wide", "bad.w"], ["y"], name="/bad/MatMul"),
    ]
    stored = [constant(name, array.astype(np.float32)) for name, array in tensors.items()]
    return assemble(nodes, {"x": ("n", 32)}, {"y": ("n", 16)}, stored)


def qdq(*args: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def written(path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


def test_deploy_names_what_costs_most_and_the_advice_helps(folder: Path) -> None:
    args = ("deploy", "wide.onnx", "--data", "rows", "--eval", "other", *PLAIN)
    done = qdq(*args, "--out", "out")
    assert done.exit_code == 0, done.output
    warnings = [line for line in done.stderr.splitlines() if line.startswith("Warning: ")]
    assert done.stderr.splitlines()[-len(warnings) :] == warnings  # the last that is said
    assert re.match(r"Warning: Output y: SQNR is -?\d+\.\d dB, below 20; against its spread", warnings[0])
    assert "wide (data of /bad/MatMul) leaves" in warnings[1]
    report = written("out/report.json")["check"]
    assert report["poor"] and report["passed"] and report["costly"][0]["tensor"] == "wide"
    assert report["costly"][0]["sqnr_db"] == pytest.approx(report["sqnr_db"], abs=3)  # alone as bad as everything
    option = next(re.search(r"--exclude \S+", line) for line in report["advice"] if "--exclude" in line)
    assert option is not None and option[0] == "--exclude /bad/MatMul"
    better = qdq(*args, *option[0].split(), "--out", "better")
    assert "Warning: Output" not in better.stderr and written("better/report.json")["check"]["sqnr_db"] > 30
    quiet = qdq(*args, "--out", "quiet", "--warn-sqnr-db", "-50", "--warn-top1", "0")
    assert "Warning" not in quiet.stderr and written("quiet/report.json")["check"]["poor"] == []


def test_check_says_the_same_of_a_file(folder: Path) -> None:
    scheme = ("--calibrator", "max", "--equalize", "none", "--bias-correction", "off", "--no-shift")
    assert qdq("quantize", "wide.onnx", "--data", "rows", "-o", "q.onnx", *scheme).exit_code == 0
    done = qdq("check", "wide.onnx", "q.onnx", "--data", "other", "-o", "check.json")
    assert done.exit_code == 0 and "wide (data of /bad/MatMul)" in done.stderr
    assert written("check.json")["costly"][0]["nodes"] == ["/bad/MatMul"] and "--calibrator auto" in done.stderr
    assert qdq("quantize", "wide.onnx", "--data", "rows", "-o", "f.onnx", "--scheme", "nvfp4").exit_code == 0
    blocks = qdq("check", "wide.onnx", "f.onnx", "--data", "other", "--warn-sqnr-db", "99")
    assert "--exclude" in blocks.stderr and "--calibrator" not in blocks.stderr  # no range is chosen for FP4
    Path("recipe.yaml").write_text("warn_sqnr_db: -50\nwarn_top1: 0\ntask: regression\n")
    calm = qdq("check", "wide.onnx", "q.onnx", "--data", "other", "--recipe", "recipe.yaml", "--json")
    assert json.loads(calm.stdout)["poor"] == [] and json.loads(calm.stdout)["outputs"][0]["top1"] is None
    against_itself = qdq("check", "wide.onnx", "wide.onnx", "--data", "other", "--min-sqnr-db", "100")
    assert against_itself.exit_code == 0 and "identical" in against_itself.stdout and "inf" not in against_itself.stdout


def poor(output: str = "y") -> Report:
    """A report of one output with no signal to speak of."""
    sums = Sums(Meaning(task="regression", why="a test"))
    sums.add(np.asarray([[1.0, 2.0]]), np.asarray([[2.0, 1.0]]))
    return Report(outputs=(sums.report(output),), samples=1)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "int8-weight"])
@pytest.mark.parametrize("options", [(), ("--rest", "fp32", "--equalize", "none"), ("--rest", "fp32")])
def test_with_every_switch_on_the_model_is_the_quantized_one_and_with_all_off_nearly_the_float_one(
    folder: Path, scheme: str, options: tuple[str, ...]
) -> None:
    """Shifts, equalization and FP16 included: the float weights found are those that were quantized."""
    cases = [("wide", "wide.onnx", "rows", "y")]
    cases += [("net", "net.onnx", "data", "logits")] if scheme in ("int8", "fp8") else []  # no weight-only Conv
    for name, source, data, output in cases:
        done = qdq("quantize", source, "--data", data, "--scheme", scheme, "-o", f"{name}.q.onnx", *options)
        assert done.exit_code == 0, done.output
        model, quantized = load_float(source), load(f"{name}.q.onnx")
        sample = dict(np.load(next(Path(data).iterdir())))
        made = switched(quantized, float_weights(quantized, model, sample))
        assert made.untold == 0 and len(made.switches) == len(made.tensors) >= 2
        session = Session(quantized.replace(made.proto), [output])

        def run(on: bool, session: Session = session, made: Any = made, sample: Any = sample, out: str = output) -> Any:
            return session({**sample, **{s: np.asarray(on) for s in made.switches}})[out].astype(np.float64)

        expected = Session(model, [output])(sample)[output].astype(np.float64)
        as_it_is = Session(quantized, [output])(sample)[output].astype(np.float64)
        scale = float(np.abs(expected).max())
        if options:  # in FP16 sums in another order reach other codes
            assert np.abs(run(True) - as_it_is).max() <= 1e-5 * scale  # float32 sums in another order
        lost, left = (float(((y - expected) ** 2).sum()) for y in (as_it_is, run(False)))
        assert left <= max(0.3 * lost, 1e-5 * float((expected**2).sum()))


def test_a_tensor_that_breaks_the_output_is_named(folder: Path) -> None:
    """exp of a rounded 89 may be infinite; the scale is such that it is."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="/MatMul"), helper.make_node("Exp", ["h"], ["y"])]
    weight = np.full((32, 16), 2.77, np.float32)
    onnx.save(assemble(nodes, {"x": ("n", 32)}, {"y": ("n", 16)}, [constant("w", weight)]), "exp.onnx")
    save_samples(folder / "ones", [{"x": np.ones((1, 32), np.float32)}])
    done = qdq(
        "quantize", "exp.onnx", "--data", "ones", "-o", "q.onnx", "--no-shift", "--rest", "fp32", "--scheme", "int8"
    )
    assert done.exit_code == 0, done.output
    model = onnx.load("q.onnx")
    (scale,) = [t for t in model.graph.initializer if t.name == "x_scale"]
    scale.CopyFrom(constant("x_scale", np.asarray(1.6, np.float32)))  # 1 becomes 1.6: exp(142) is infinite
    onnx.save(model, "q.onnx")
    checked = qdq("check", "exp.onnx", "q.onnx", "--data", "ones", "-o", "check.json")
    assert checked.exit_code == 1 and "x (data of /MatMul) leaves -inf dB" in checked.stderr
    assert written("check.json")["costly"][0]["sqnr_db"] == "-inf"


def test_what_cannot_be_measured_is_said(folder: Path) -> None:
    model = load_float("wide.onnx")
    sample = dict(np.load(next(Path("rows").iterdir())))
    good = replace(poor(), outputs=(replace(poor().outputs[0], identical=True, sqnr_db=None, sqnr_spread_db=None),))
    assert with_costs(good, model, model, [sample]) is good
    assert with_costs(poor(), model, model, [sample]).advice == (NOTHING,)
    refused = with_costs(poor("nowhere"), model, model, [sample])
    assert refused.costly == () and refused.advice[0].startswith("What costs most was not found")


def test_what_the_clock_cut_short_is_looked_for_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert qdq("deploy", "wide.onnx", "--data", "rows", *PLAIN, "--out", "out").exit_code == 0
    model, quantized = load_float("wide.onnx"), load("out/wide.int8.onnx")
    sample = dict(np.load(next(Path("rows").iterdir())))
    found = []
    for limit in (-1.0, 20.0):
        monkeypatch.setattr(find, "TIME_LIMIT_S", limit)
        with caching(folder / "kept"):
            found.append(with_costs(poor(), model, quantized, [sample]))
    assert not found[0].costly and found[1].costly
    monkeypatch.setattr(find, "_measured", None)
    with caching(folder / "kept"):
        assert with_costs(poor(), model, quantized, [sample]) == found[1]


def test_a_file_without_quantized_tensors_is_named_by_its_float_type(folder: Path) -> None:
    args = ("deploy", "net.onnx", "--data", "data", "--tune", "off", "--exclude", "*")
    for rest, extra in (("fp16", ()), ("fp32", ("--rest", "fp32"))):
        done = qdq(*args, *extra, "--out", rest)
        assert done.exit_code == 0 and f"net.{rest}.onnx" in done.stdout
        assert f"The model is called net.{rest}.onnx, by its float type" in done.stderr
        report = written(f"{rest}/report.json")
        assert report["model_file"] == f"net.{rest}.onnx" and (folder / rest / f"net.{rest}.onnx").exists()
        assert not list((folder / rest).glob("*.int8.onnx"))


def test_a_share_of_int8_can_be_required(folder: Path) -> None:
    """The head, which is left in float, has most of the multiply-adds; some run in INT8."""
    args = ("deploy", "net.onnx", "--data", "data", "--tune", "off", "--exclude", "/head/*", "--out", "out")
    missed = qdq(*args, "--min-int8-share", "0.9")
    assert missed.exit_code == 1
    report = written("out/report.json")
    share = report["audit"]["int8_share"]
    said = f"{share:.4f} of the multiply-adds run in INT8 as compiled: min_int8_share is 0.9."
    assert 0.1 < share < 0.9 and f"Failed: {said}" in missed.stderr and report["failures"] == [said]
    assert not report["passed"] and report["check"]["passed"] and report["min_int8_share"] == 0.9
    assert qdq("audit", "out/net.engine", "--min-int8-share", "0.9").exit_code == 1
    assert qdq("audit", "out/net.engine", "--min-int8-share", "0.1", "--json").exit_code == 0
    Path("recipe.yaml").write_text("min_int8_share: 0.1\n")
    assert qdq(*args, "--recipe", "recipe.yaml").exit_code == 0
    refused = qdq(*args, "--min-int8-share", "50")
    assert refused.exit_code == 2 and "min_int8_share" in refused.stderr


def test_samples_that_were_calibrated_with_are_refused_for_evaluation(folder: Path) -> None:
    args = ("deploy", "net.onnx", "--data", "data", "--tune", "off", "--out", "out")
    same = qdq(*args, "--eval", "data")
    assert same.exit_code == 2 and "3 of the 3 samples of --eval are among those of --data" in same.stderr
    save_samples(folder / "mixed", images(2, seed=7))
    shutil.copy(folder / "data/001.npz", folder / "mixed/renamed.npz")
    mixed = qdq(*args, "--eval", "mixed")
    assert mixed.exit_code == 2 and "1 of the 3 samples" in mixed.stderr and not Path("out").exists()
    allowed = qdq(*args, "--eval", "mixed", "--allow-overlap")
    assert allowed.exit_code == 0 and "1 of the evaluation samples are calibration samples too" in allowed.stderr
    assert written("out/report.json")["overlap"] == 1


def output(reference: Any, candidate: Any, *, task: Any = "regression", name: str = "y") -> OutputReport:
    sums = Sums(Meaning(task=task, axis=1 if task == "classification" else None, why="a test"))
    for r, c in zip(reference, candidate, strict=True):
        sums.add(np.asarray(r), np.asarray(c))
    return sums.report(name)


def test_rows_say_identical_constant_and_empty_in_place_of_infinity() -> None:
    outputs = (
        output([[[1.0, 2.0]], [[3.0, 5.0]]], [[[1.0, 2.0]], [[3.0, 5.0]]], name="same"),
        output([[[1.0, 1.0]]] * 2, [[[1.0, 1.0]]] * 2, name="flat"),
        output([[[1.0, 2.0]]] * 2, [[[1.0, 2.5]]] * 2, name="still"),
        output([np.zeros((1, 0))], [np.zeros((1, 0))], name="none"),
        output([np.asarray([["a", "b"]])], [np.asarray([["a", "c"]])], task="labels", name="text"),
    )
    zero = Report(outputs=(output([[0.0, 0.0]], [[0.0, 1.0]]),), samples=1)
    assert check_rows(zero)[0].value.startswith("no signal: it should be 0") and "should be 0" in zero.poor[0]
    broken = Report(outputs=(output([[1.0, 2.0]], [[1.0, math.nan]]),), samples=1)
    assert check_rows(broken)[0].value == "1 values are not finite" and "not finite" in broken.poor[0]
    report = Report(outputs=outputs, samples=2)
    rows = {row.what: row.value for row in check_rows(report)}
    assert rows["SQNR of same against the float model"] == "identical"
    assert rows["SQNR of flat against the float model"] == "identical, and constant"
    assert "the output is constant" in rows["SQNR of still against the float model, the worst output"]
    assert rows["SQNR of none against the float model"] == "empty"
    assert rows["labels of text against the float model"] == "50.00% are equal"
    assert "inf" not in " ".join(rows.values()) and "nan" not in " ".join(rows.values())
    assert headline(report) == f"{report.sqnr_db:.1f} dB in the worst output, still"
    assert [line for line in warning_lines(report) if "text" in line and "labels are equal in 50.00%" in line]


def test_a_weight_whose_large_rows_nothing_reads_is_named(folder: Path) -> None:
    """Rows of 100 decide the scales of a weight; the data they meet are zero, and the other rows keep two bits."""
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(32, 16)), np.ones(32)
    values[8:], mask[8:] = 100, 0
    nodes = [
        helper.make_node("Mul", ["x", "mask"], ["seen"], name="/mask/Mul"),
        helper.make_node("MatMul", ["seen", "w"], ["y"], name="/rows/MatMul"),
    ]
    stored = [constant(name, array.astype(np.float32)) for name, array in (("mask", mask), ("w", values))]
    onnx.save(assemble(nodes, {"x": ("n", 32)}, {"y": ("n", 16)}, stored), "rows.onnx")
    args = ("quantize", "rows.onnx", "--data", "rows", "--scheme", "int8-weight", "--rounding", "nearest")
    assert qdq(*args, "--equalize", "none", "-o", "q.onnx").exit_code == 0
    done = qdq("check", "rows.onnx", "q.onnx", "--data", "other")
    assert "w (weight of /rows/MatMul) leaves" in done.stderr and "--exclude /rows/MatMul" in done.stderr


def test_a_deployed_model_may_have_labels_alone(folder: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="/MatMul"),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1),
    ]
    model = assemble(nodes, {"x": (4, 32)}, {"best": (4, 1)}, [constant("w", np.eye(32, 16, dtype=np.float32))])
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.save(model, "best.onnx")
    done = qdq("deploy", "best.onnx", "--data", "rows", "--tune", "off", "--out", "out")
    assert done.exit_code == 0, done.output
    assert "labels, rounded as compiled" in done.stdout and "inf dB" not in done.stdout


def test_a_float_file_in_which_nothing_became_fp16_is_called_fp32(folder: Path) -> None:
    nodes = [helper.make_node("Sin", ["x"], ["a"], name="/Sin"), helper.make_node("Exp", ["a"], ["y"], name="/Exp")]
    onnx.save(assemble(nodes, {"x": (4, 32)}, {"y": (4, 32)}, []), "plain.onnx")
    done = qdq("deploy", "plain.onnx", "--data", "rows", "--tune", "off", "--out", "out")
    assert done.exit_code == 0 and (folder / "out/plain.fp32.onnx").exists()
    assert "identical" in next(line for line in done.stdout.splitlines() if "rounded as compiled" in line)


def test_what_costs_most_is_measured_in_the_types_of_the_file(folder: Path) -> None:
    """ONNX Runtime has no BF16 products; NaN of the float model itself is said."""
    args = ("quantize", "wide.onnx", "--data", "rows", *PLAIN[2:], "--rest", "bf16", "-o", "q.onnx")
    assert qdq(*args).exit_code == 0
    done = qdq("check", "wide.onnx", "q.onnx", "--data", "other")
    assert "--exclude /bad/MatMul" in done.stderr and "was not found" not in done.stderr
    model = onnx.load("wide.onnx")
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(helper.make_node("Log", ["z"], ["y"], name="/Log"))
    onnx.save(model, "log.onnx")
    assert qdq("quantize", "log.onnx", "--data", "rows", *PLAIN[2:], "-o", "q.onnx").exit_code == 0
    done = qdq("check", "log.onnx", "q.onnx", "--data", "other")
    assert "output y of the float model itself is not finite" in done.stderr
    assert "nan dB" not in done.output and "more is lost elsewhere" not in done.output


@pytest.mark.parametrize(("consumed", "passes"), [("int8", True), ("float16", False), ("unknown", False)])
def test_a_share_of_int8_is_not_kept_by_nodes_that_cannot_be_counted(consumed: str, passes: bool) -> None:
    totals = {"kernels": 1, "bytes_moved": None, "weight_bytes": 0, "activation_bytes": 0, "engine_bytes": 0}
    more = {"backend": "rtx", "version": "1", "targets": ("sm89",), **totals}
    node = {"op_type": "MatMul", "requested": "", "kernel": "", "cause": ""}
    nodes = (
        NodeAudit(node="known", macs=100, consumed="int8", **node),
        NodeAudit(node="open", macs=None, consumed=consumed, **node),
    )
    said = share_failures(Audit(nodes=nodes, **more), 0.5)
    assert not said if passes else "cannot be checked: 1 nodes have unknown multiply-adds" in said[0]
