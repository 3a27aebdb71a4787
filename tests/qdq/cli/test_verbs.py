"""The command line: every verb on a tiny model, and every bad input gives one paragraph, exit code 2 and no trace."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from models import images, save_samples, segmenter

from engines.core.documents import replace
from engines.verify.manifest import Manifest
from qdq.cli.main import main
from qdq.cli.terminal import Bars, show_rows

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.onnx, another model, and samples in data/; the current directory."""
    monkeypatch.chdir(tmp_path)
    onnx.save(segmenter(), "net.onnx")
    onnx.save(segmenter(seed=9), "other.onnx")
    save_samples(tmp_path / "data", images(3))
    return tmp_path


def qdq(*args: object) -> Result:
    """Run the command line in this process."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception  # a bug of ours: show where
    return result


def done(*args: object) -> str:
    """Standard output of a command that must succeed."""
    result = qdq(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def state(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def refused(folder: Path, *args: object, code: int = 2) -> str:
    """The message of a command that must be refused, leaving everything as it was."""
    before = state(folder)
    result = qdq(*args)
    assert result.exit_code == code, result.output
    assert state(folder) == before
    assert result.stdout == ""
    *notes, message = result.stderr.strip().splitlines()
    assert all(line.startswith("Note: ") for line in notes)
    assert message.startswith("Error: ")
    return message


def test_each_verb_starts_from_the_file_of_the_one_before(folder: Path) -> None:
    done("plan", "net.onnx", "-o", "plan.json")
    done("calibrate", "net.onnx", "--data", "data", "--plan", "plan.json", "-o", "table.json")
    said = done(
        "quantize", "net.onnx", "--data", "data", "--plan", "plan.json", "--table", "table.json", "-o", "q.onnx"
    )
    assert "2 nodes in INT8" in said
    done("build", "q.onnx", "-o", "q.engine", "--target", "sm89")
    audit = json.loads(done("audit", "q.engine", "--json"))
    assert audit["int8_share"] == 1.0 and audit["missed"] == [] and audit["targets"] == ["sm89"]
    report = json.loads(done("check", "net.onnx", "q.onnx", "--data", "data", "--min-sqnr-db", "20", "--json"))
    assert report["passed"] and report["stood_for_engine"] and report["samples"] == 3
    assert {p.name for p in folder.iterdir() if p.is_file()} == {
        *("net.onnx", "other.onnx", "plan.json", "table.json", "q.onnx"),
        *("q.engine", "q.engine.json", "q.engine.manifest.json"),
    }


def test_stages_give_the_same_bytes_as_one_command(folder: Path) -> None:
    done("plan", "net.onnx", "-o", "plan.json")
    done("calibrate", "net.onnx", "--data", "data", "--plan", "plan.json", "-o", "table.json")
    done("quantize", "net.onnx", "--data", "data", "--plan", "plan.json", "--table", "table.json", "-o", "a.onnx")
    done("quantize", "net.onnx", "--data", "data", "-o", "b.onnx")
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


def test_quantize_leaves_the_rest_in_fp16_like_every_verb_unless_told_otherwise(folder: Path) -> None:
    for name, options in (("auto", ()), ("fp16", ("--rest", "fp16")), ("fp32", ("--rest", "fp32"))):
        done("quantize", "net.onnx", "--data", "data", "-o", f"{name}.onnx", *options)
    half, full = ((folder / f"{name}.onnx").read_bytes() for name in ("fp16", "fp32"))
    assert (folder / "auto.onnx").read_bytes() == half != full


def test_deploy_leaves_all_results_and_a_failed_limit_ends_with_1(folder: Path) -> None:
    before = state(folder)
    save_samples(folder / "held_out", images(2, seed=5))
    args = ("deploy", "net.onnx", "--data", "data", "--eval", "held_out", "--target", "sm86", "--target", "8.9")
    result = qdq(*args, "--tune", "off", "--out", "results/new", "--min-sqnr-db", "200")
    assert result.exit_code == 1
    assert "Failed: Output logits: sqnr_db" in result.stderr and "stood for the engine" in result.stderr
    results = folder / "results/new"
    assert {p.name for p in results.iterdir()} == {
        *("net.int8.onnx", "net.engine", "net.engine.json", "net.engine.manifest.json"),
        *("plan.json", "table.json", "report.json", "report.html", "provenance.json", "SHA256SUMS"),
    }
    report = json.loads((results / "report.json").read_text())
    assert not report["passed"] and report["evaluated_on"] == "evaluation samples"
    assert report["audit"]["int8_share"] == 1.0 and report["audit"]["targets"] == ["sm86", "sm89"]
    assert report["int8_file_bytes"] > 0 and report["float_engine"]["bytes_moved"] > 0
    manifest = json.loads((results / "net.engine.manifest.json").read_text())
    for key, name in (("output", "net.int8.onnx"), ("engine", "net.engine"), ("plan", "plan.json")):
        assert manifest[key] == hashlib.sha256((results / name).read_bytes()).hexdigest()
    for key, name in (("table", "table.json"), ("report", "report.json"), ("layers", "net.engine.json")):
        assert manifest[key] == hashlib.sha256((results / name).read_bytes()).hexdigest()
    assert manifest["model"] == hashlib.sha256((folder / "net.onnx").read_bytes()).hexdigest()
    assert str(folder) not in "".join(p.read_text() for p in results.glob("*.json"))
    assert {k: v for k, v in state(folder).items() if not k.startswith(("results", "held_out"))} == before


def test_deploy_with_a_recipe_prints_json_and_says_what_it_was_checked_on(folder: Path) -> None:
    Path("recipe.yaml").write_text("calibrator: max\nexclude: ['/head/*']\nmin_sqnr_db: 10\ntarget: sm89\n")
    text = done("deploy", "net.onnx", "--data", "data", "--out", ".", "--recipe", "recipe.yaml", "--json")
    report = json.loads(text)
    assert report == json.loads((folder / "report.json").read_text())
    assert any("calibration samples themselves" in note for note in report["notes"])
    assert json.loads((folder / "plan.json").read_text())["settings"]["calibrator"] == "max"
    lines = json.loads(done("explain", "plan.json", "/head/Conv", "--json"))["lines"]
    assert "excluded by the pattern" in lines[0]


def test_options_go_before_the_recipe(folder: Path) -> None:
    Path("recipe.yaml").write_text("calibrator: max\n")
    made = json.loads(done("plan", "net.onnx", "--recipe", "recipe.yaml", "--calibrator", "entropy", "--json"))
    assert made["settings"]["calibrator"] == "entropy"


def test_plan_says_why_nodes_stay_in_float(folder: Path) -> None:
    said = done("plan", "net.onnx")
    assert "nodes in INT8" in said and "Relu" in said


def test_audit_of_a_model_compiles_it_and_names_float_nodes(folder: Path) -> None:
    assert "100.0% in float32" in done("audit", "net.onnx")


def test_a_tuned_plan_goes_through_the_other_verbs(folder: Path) -> None:
    nodes = [onnx.helper.make_node("ConvTranspose", ["image", "w"], ["logits"], "up", strides=[2, 2])]
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).normal(size=(1, 4, 2, 2)).astype(np.float32), "w")
    ends = [onnx.helper.make_tensor_value_info(n, 1, [1, c, s, s]) for n, c, s in (("image", 1, 8), ("logits", 4, 16))]
    graph = onnx.helper.make_graph(nodes, "up", ends[:1], ends[1:], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), "up.onnx")
    said = done("tune", "up.onnx", "--data", "data", "--tune", "rewrites", "--gpu", "rtx4090", "-o", "plan.json")
    assert "predicted on rtx4090" in said
    plan = json.loads((folder / "plan.json").read_text())
    # which rewrites pay is the compiler's to say
    done("calibrate", "up.onnx", "--data", "data", "--plan", "plan.json", "-o", "table.json")
    made = ("quantize", "up.onnx", "--data", "data", "--plan", "plan.json", "--table", "table.json", "--rest", "fp16")
    done(*made, "-o", "up.int8.onnx")
    ops = {n.op_type for n in onnx.load("up.int8.onnx").graph.node}
    assert ("ConvTranspose" not in ops) == any(r["name"] == "conv_transpose" for r in plan.get("rewrites", []))
    report = json.loads(done("tune", "up.onnx", "--tune", "rewrites", "-o", "plan.json", "--cache", "kept", "--json"))
    assert report["predicted_us"] <= report["untuned_us"] and len(list((folder / "kept").iterdir())) >= 2


def test_explain_says_cost_and_kernel(folder: Path) -> None:
    done("deploy", "net.onnx", "--data", "data", "--out", "build", "--tune", "rewrites")
    said = done("explain", "net.onnx", "/head/Conv", "--engine", "build/net.engine")
    # 8 x 8 positions x 3 outputs x 4 inputs x 9 weights = 6912, of the model's 6912 + 64 x 4 x 9 = 9216
    assert "6.91 k multiply-adds, 75.0%" in said
    assert "runs in int8" in said
    assert "float" in done("explain", "net.onnx", "/encode/Relu")


def test_dynamic_shapes_come_from_the_samples_or_from_the_option(folder: Path) -> None:
    onnx.save(segmenter(spatial=("h", "w")), "net.onnx")
    save_samples(folder / "data", images(1, (1, 1, 6, 10)))
    done("deploy", "net.onnx", "--data", "data", "--out", "build")
    manifest = json.loads((folder / "build/net.engine.manifest.json").read_text())
    assert manifest["options"]["shape.image"] == "1x1x6x8:1x1x8x8:1x1x8x10"
    name = json.loads((folder / "build/report.json").read_text())["model_file"]
    done("build", f"build/{name}", "-o", "fixed.engine", "--shape", "image:1x1x8x8")
    assert json.loads((folder / "fixed.engine.manifest.json").read_text())["options"]["shape.image"] == "1x1x8x8"
    held = Manifest.from_json((folder / "build/net.engine.manifest.json").read_text())
    other = replace(held, options={**held.options, "shape.image": "-1e+308"})
    (folder / "build/net.engine.manifest.json").write_text(other.to_json())
    (folder / "build/SHA256SUMS").unlink(missing_ok=True)
    assert "image '-1e+308'. Build the engine again" in refused(folder, "audit", "build/net.engine")
    assert "--shape" in refused(folder, "build", f"build/{name}", "-o", "x.engine")


def test_random_data_only_when_asked_for_and_said_so(folder: Path) -> None:
    assert "--random-data" in refused(folder, "quantize", "net.onnx", "-o", "q.onnx")
    result = qdq("quantize", "net.onnx", "--random-data", "2", "-o", "q.onnx")
    assert result.exit_code == 0 and "nothing about its accuracy" in result.stderr


def test_a_table_alone_rounds_to_nearest_and_says_so(folder: Path) -> None:
    done("calibrate", "net.onnx", "--data", "data", "-o", "table.json")
    result = qdq("quantize", "net.onnx", "--table", "table.json", "-o", "q.onnx")
    assert result.exit_code == 0 and "nearest" in result.stderr


def test_doctor_names_runtimes(folder: Path) -> None:
    rows = {row["name"]: row for row in json.loads(done("doctor", "--json"))["findings"]}
    assert rows["onnxruntime"]["ok"] and rows["compile with TensorRT-RTX"]["ok"]
    assert "onnxruntime" in done("doctor")


def test_did_you_mean(folder: Path) -> None:
    assert "Did you mean 'quantize'?" in qdq("quantise").stderr
    assert "--calibrator" in qdq("plan", "net.onnx", "--calibrater", "max").stderr
    assert qdq("quantise").exit_code == qdq("plan", "net.onnx", "--nonsense").exit_code == 2


def quantized(folder: Path) -> None:
    done("quantize", "net.onnx", "--data", "data", "-o", "q.onnx")


def external(location: str) -> Callable[[Path], None]:
    """A change of net.onnx: its weights lie in a file of this name, which is not made."""

    def change(folder: Path) -> None:
        model = onnx.load("net.onnx")
        onnx.save(model, "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
        model = onnx.load("net.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location
        Path("net.onnx").write_bytes(model.SerializeToString())
        if location == "net.data":
            Path("net.data").unlink()

    return change


def sample(**arrays: np.ndarray) -> Callable[[Path], None]:
    """A change of the data: one more sample, the last."""
    return lambda folder: np.savez(folder / "data/z.npz", **arrays)


def content(name: str, data: bytes) -> Callable[[Path], object]:
    """A change of one file."""
    return lambda folder: (folder / name).write_bytes(data)


GOOD = np.zeros((1, 1, 8, 8), np.float32)
QUANTIZE = ("quantize", "net.onnx", "--data", "data", "-o", "out.onnx")
DEPLOY = ("deploy", "net.onnx", "--data", "data", "--out", "build")


def unchanged(folder: Path) -> None:
    """No change."""


def split(folder: Path) -> None:
    """A model whose weights lie in split.bin."""
    net = onnx.load(folder / "net.onnx")
    onnx.save(net, folder / "split.onnx", save_as_external_data=True, location="split.bin", size_threshold=0)


BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "missing model": (lambda f: (f / "net.onnx").unlink(), QUANTIZE, "net.onnx"),
    "empty model": (content("net.onnx", b""), QUANTIZE, "empty"),
    "truncated model": (lambda f: (f / "net.onnx").write_bytes((f / "net.onnx").read_bytes()[:300]), QUANTIZE, "ONNX"),
    "no ONNX": (content("net.onnx", b"\x89PNG\r\n and so on, no protobuf at all"), QUANTIZE, "ONNX"),
    "a folder as model": (unchanged, ("plan", "data"), "folder"),
    "external data missing": (external("net.data"), QUANTIZE, "net.data"),
    "external data outside": (external("../net.data"), QUANTIZE, "outside|inside"),
    "external data absolute": (external("/etc/hostname"), QUANTIZE, "outside|inside"),
    "sample with a wrong name": (sample(picture=GOOD), QUANTIZE, "'image'"),
    "sample of a wrong dtype": (sample(image=GOOD.astype(np.uint8)), QUANTIZE, "uint8"),
    "sample of a wrong rank": (sample(image=GOOD[0]), QUANTIZE, "rank"),
    "sample with NaN": (sample(image=np.full_like(GOOD, np.nan)), QUANTIZE, "NaN"),
    "pickled sample": (sample(image=np.array([{}], dtype=object)), QUANTIZE, "unpickle"),
    "no sample": (lambda f: [p.unlink() for p in (f / "data").iterdir()], QUANTIZE, "No samples"),
    "missing data": (unchanged, (*QUANTIZE, "--data", "dat"), "No such file or folder"),
    "tune bounded without data": (
        unchanged,
        ("tune", "net.onnx", "-o", "plan.json", "--min-sqnr-db", "20"),
        "--data",
    ),
    "tune for another GPU": (
        unchanged,
        ("tune", "net.onnx", "-o", "plan.json", "--gpu", "rtx3090", "--target", "sm89"),
        "--target sm86",
    ),
    "tune without a node of that name": (
        unchanged,
        ("tune", "net.onnx", "-o", "plan.json", "--exclude", "/haed/*"),
        "matches none",
    ),
    "no such way to tune": (unchanged, ("tune", "net.onnx", "-o", "plan.json", "--tune", "fast"), "placement"),
    "no data": (unchanged, ("deploy", "net.onnx", "--out", "build"), "--random-data"),
    "both kinds of data": (unchanged, (*QUANTIZE, "--random-data", "2"), "choose one"),
    "no random samples": (unchanged, ("quantize", "net.onnx", "--random-data", "0", "-o", "q.onnx"), "at least one"),
    "unknown scheme": (unchanged, (*QUANTIZE, "--scheme", "int9"), "Did you mean 'int8'"),
    "unknown calibrator": (unchanged, (*QUANTIZE, "--calibrator", "entrpy"), "Did you mean 'entropy'"),
    "unknown rounding": (unchanged, (*QUANTIZE, "--rounding", "gpt"), "Did you mean 'gptq'"),
    "bad percentile": (unchanged, (*QUANTIZE, "--percentile", "101"), "percentile"),
    "unknown target": (unchanged, (*DEPLOY, "--target", "sm88"), "sm88"),
    "unknown compiler": (unchanged, (*DEPLOY, "--compiler", "rxt"), "Did you mean 'rtx'"),
    "exclude matches nothing": (unchanged, (*QUANTIZE, "--exclude", "/haed/*"), "/head/Conv"),
    "missing recipe": (unchanged, (*QUANTIZE, "--recipe", "r.yaml"), "r.yaml"),
    "unknown recipe key": (content("r.yaml", b"calibrater: max"), (*QUANTIZE, "--recipe", "r.yaml"), "'calibrator'"),
    "recipe is no YAML": (content("r.yaml", b"a: [1"), (*QUANTIZE, "--recipe", "r.yaml"), "not YAML"),
    "recipe is a list": (content("r.yaml", b"- a"), (*QUANTIZE, "--recipe", "r.yaml"), "list"),
    "recipe with a bad limit": (content("r.yaml", b"min_dice: 2"), (*DEPLOY, "--recipe", "r.yaml"), "from 0 to 1"),
    "recipe with a bad list": (
        content("r.yaml", b"target: [86]"),
        (*DEPLOY, "--recipe", "r.yaml"),
        r"target is [86]: it must be a text",
    ),
    "limit out of range": (unchanged, (*DEPLOY, "--min-cosine", "1.5"), "from -1 to 1"),
    "shape of no form": (unchanged, (*DEPLOY, "--shape", "image:8,8"), "Cannot read the shape"),
    "shape that is no range": (unchanged, (*DEPLOY, "--shape", "image:1x8:1x4:1x8"), "no range"),
    "shape of an unknown input": (unchanged, (*DEPLOY, "--shape", "imag:1x1x8x8"), "Did you mean 'image'"),
    "shape against the model": (unchanged, (*DEPLOY, "--shape", "image:1x1x9x8"), "does not fit"),
    "output in a missing folder": (unchanged, (*QUANTIZE[:-1], "no/q.onnx"), "Cannot write"),
    "output is a folder": (unchanged, (*QUANTIZE[:-1], "data"), "Cannot write"),
    "output is the input": (unchanged, (*QUANTIZE[:-1], "net.onnx"), "input of this command"),
    "output is a sample": (unchanged, (*QUANTIZE[:-1], "data/000.npz"), "input of this command"),
    "output is the weights' file": (split, ("plan", "split.onnx", "-o", "split.bin"), "input of this command"),
    "output is the data function's file": (
        content("d.py", b"def f(): pass"),
        ("quantize", "net.onnx", "--data", "d.py:f", "-o", "d.py"),
        "input of this command",
    ),
    "output is a pipe": (lambda f: os.mkfifo(f / "p"), (*QUANTIZE[:-1], "p"), "it is a pipe or a device"),
    "a result of the folder is a pipe": (
        lambda f: ((f / "out").mkdir(), os.mkfifo(f / "out" / "plan.json")),
        ("deploy", "net.onnx", "--data", "data", "--tune", "off", "--out", "out"),
        "it is a pipe or a device",
    ),
    "the log would replace the model": (
        unchanged,
        (*QUANTIZE, "--log-file", "net.onnx"),
        "holds no log of qdq",
    ),
    "block is no digit of ours": (unchanged, (*QUANTIZE, "--block", "\u00b2"), "it must be one of"),
    "recipe of very many values": (
        content("r.yaml", b"exclude: [" + b"a," * 10_001 + b"]"),
        (*QUANTIZE, "--recipe", "r.yaml"),
        "more than 10000 values",
    ),
    "custom operators are a pipe": (lambda f: os.mkfifo(f / "p"), (*QUANTIZE, "--custom-ops", "p"), "a pipe"),
    "output folder is a file": (unchanged, (*DEPLOY[:-1], "net.onnx"), "Cannot write"),
    "output folder below a file": (unchanged, (*DEPLOY[:-1], "net.onnx/build"), "Cannot write"),
    "output folder not writable": (unchanged, (*DEPLOY[:-1], "/proc/qdq"), "Cannot write"),
    "quantized already": (quantized, ("quantize", "q.onnx", "--data", "data", "-o", "r.onnx"), "quantized already"),
    "plan of another model": (
        lambda f: done("plan", "other.onnx", "-o", "plan.json"),
        (*QUANTIZE, "--plan", "plan.json"),
        "another model",
    ),
    "table of another model": (
        lambda f: done("calibrate", "other.onnx", "--data", "data", "-o", "table.json"),
        (*QUANTIZE, "--table", "table.json"),
        "another model",
    ),
    "plan is no plan": (content("plan.json", b"{}"), (*QUANTIZE, "--plan", "plan.json"), "plan"),
    "plan against the options": (
        lambda f: done("plan", "net.onnx", "-o", "plan.json"),
        (*QUANTIZE, "--plan", "plan.json", "--exclude", "/head/*"),
        "already says what is quantized",
    ),
    "unknown node": (unchanged, ("explain", "net.onnx", "/head/Con"), "/head/Conv"),
    "missing engine": (unchanged, ("audit", "net.engine"), "no such file"),
    "engine without papers": (content("net.engine", b"x"), ("audit", "net.engine"), "net.engine.manifest.json"),
    "check of nothing": (unchanged, ("check", "net.onnx", "none.onnx", "--data", "data"), "none.onnx"),
}


@pytest.mark.parametrize(("prepare", "args", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_paragraph_and_leaves_no_trace(
    folder: Path, prepare: Callable[[Path], object], args: tuple[str, ...], expected: str
) -> None:
    prepare(folder)
    message = refused(folder, *args)
    assert any(word in message for word in expected.split("|")), message


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt_rtx"])
def test_a_missing_runtime_ends_with_3_and_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    assert "qdq[cpu]" in refused(folder, *DEPLOY, code=3)


def test_an_engine_without_a_gpu_ends_with_3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdq.build.machine.gpus", list)
    done("build", "net.onnx", "-o", "net.engine")
    message = refused(folder, "check", "net.onnx", "net.engine", "--data", "data", code=3)
    assert "No GPU here" in message and "sm89" in message


def test_an_engine_needs_the_model_it_was_compiled_from(folder: Path) -> None:
    done("build", "net.onnx", "-o", "net.engine")
    (folder / "net.onnx").unlink()
    assert "compiled from" in refused(folder, "audit", "net.engine")
    (folder / "net.engine").write_bytes(b"another")
    assert "another engine" in refused(folder, "audit", "net.engine")


def test_a_file_that_is_not_the_engines_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer table of another engine would say what that one does; a plan, table or report alike."""
    monkeypatch.setattr("qdq.build.machine.gpus", list)
    done("deploy", "net.onnx", "--data", "data", "--out", "out", "--tune", "off")
    done("build", "net.onnx", "-o", "float.engine")
    own = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    foreign = {
        "net.engine.json": (folder / "float.engine.json").read_bytes(),
        **{name: own[name].replace(b"1", b"2") for name in ("plan.json", "table.json", "report.json")},
    }
    for name, other in foreign.items():
        (folder / "out" / name).write_bytes(other)
        for args in (("audit", "out/net.engine"), ("check", "net.onnx", "out/net.engine", "--data", "data")):
            message = refused(folder, *args)
            begins = [hashlib.sha256(content).hexdigest()[:12] for content in (own[name], other)]
            assert all(text in message for text in (f"out/{name}", *begins, "qdq build"))
        (folder / "out" / name).write_bytes(own[name])
    for name in ("plan.json", "table.json", "report.json"):
        (folder / "out" / name).unlink()  # they need not go with the engine
    assert json.loads(done("audit", "out/net.engine", "--json"))["int8_share"] == 1.0
    (folder / "out/broken.onnx").write_bytes(b"no model")
    (folder / "out/net.int8.onnx").write_bytes((folder / "net.onnx").read_bytes())
    for args in (
        ("audit", "out/net.engine"),
        ("audit", "out/net.int8.onnx"),
        ("check", "net.onnx", "out/net.int8.onnx"),
    ):
        more = ("--data", "data") if args[0] == "check" else ()
        assert "out/net.int8.onnx is not the one that out/SHA256SUMS" in refused(folder, *args, *more)
    (folder / "out/SHA256SUMS").unlink()
    assert "net.int8.onnx has" in refused(folder, "audit", "out/net.engine")


@pytest.mark.parametrize("name", ["net.engine", "net.int8.onnx", "plan.json", "net.engine.json", "table.json"])
def test_an_altered_byte_is_refused_by_audit_and_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also where the engine, or the model, that was named is not the file that changed; also of the manifest."""
    monkeypatch.setattr("qdq.build.machine.gpus", list)
    done("deploy", "net.onnx", "--data", "data", "--out", "out", "--tune", "off")
    for changed in (name, "net.engine.manifest.json"):
        path = folder / "out" / changed
        before = path.read_bytes()
        for at in (0, len(before) // 2, len(before) - 1):
            path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
            for given in ("out/net.engine", "out/net.int8.onnx"):
                refused(folder, "audit", given)
                refused(folder, "check", "net.onnx", given, "--data", "data")
        path.write_bytes(before)
    done("audit", "out/net.engine")


def test_samples_without_variety_work(folder: Path) -> None:
    for path in (folder / "data").iterdir():
        path.unlink()
    save_samples(folder / "data", [{"image": np.zeros_like(GOOD)}])
    model = onnx.load("net.onnx")
    weight = next(t for t in model.graph.initializer if t.name == "encode.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[1] = 0  # a dead channel
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, "net.onnx")
    done("deploy", "net.onnx", "--data", "data", "--out", "build")


def test_bars_show_on_a_terminal_and_stay_silent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with Bars() as bars:
            bars(0, None, "prepare")
            bars(1, 4, "calibrating")
            bars(2, 4, "calibrating")
        assert ("Prepare" in stream.getvalue() and "Calibrating" in stream.getvalue()) == shown
        assert shown or not stream.getvalue()


def test_a_table_without_rows_keeps_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows("net.onnx: nothing found", [])
    assert capsys.readouterr().out.strip() == "net.onnx: nothing found"
