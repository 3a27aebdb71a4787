"""With --json every verb prints one object that its schema allows, and nothing else; an error does too."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from clinic import image
from image_files import write_nifti
from models import images, save_samples, segmenter

from engines.core.documents import Document
from qdq.cli import entry
from qdq.cli.answer.error import EXIT_CODES, KINDS, error_json
from qdq.cli.main import main
from qdq.deploy.report.schemas import FILES, declared, schema
from qdq.plan.plan import Plan

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(segmenter(), "net.onnx")
    save_samples(tmp_path / "data", images(3))
    return tmp_path


def held(text: str) -> dict[str, Any]:
    """An answer, held to the schema that its key names."""
    found: dict[str, Any] = json.loads(text)
    name = next(n for n in FILES if getattr(declared(n), "FORMAT", "") == found["schema"])
    jsonschema.Draft202012Validator(schema(name)).validate(found)
    return found


def answer(*words: object, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return held(result.stdout)


def test_every_verb_has_the_option() -> None:
    lacking = [n for n, verb in main.commands.items() if "--json" not in {o for p in verb.params for o in p.opts}]
    assert lacking == []


def test_the_stages(folder: Path) -> None:
    assert answer("plan", "net.onnx", "-o", "plan.json")["schema"] == Plan.FORMAT
    made = answer("calibrate", "net.onnx", "--data", "data", "--plan", "plan.json", "-o", "t.json")
    assert (made["table"], made["samples"], made["pictures"]) == ("t.json", 3, None) and made["tensors"] == 2
    made = answer("quantize", "net.onnx", "--data", "data", "--table", "t.json", "-o", "q.onnx")
    assert made["model"] == "q.onnx" and made["quantized_nodes"] == 2
    made = answer("build", "q.onnx", "-o", "q.engine", "--target", "sm86")
    assert made["targets"] == ["sm86"] and made["kernels"] > 0 and made["compiled"] == "q.onnx"
    assert answer("audit", "q.engine")["targets"] == ["sm86"]
    made = answer("audit", "q.onnx", "--gpu", "rtx4090")
    assert made["predicted_us"] == pytest.approx(sum(k["us"] for k in made["kernels"]))
    assert answer("check", "net.onnx", "q.onnx", "--data", "data")["passed"]
    assert answer("check", "net.onnx", "q.onnx", "--data", "data", "--min-sqnr-db", 300, code=1)["failures"]
    assert answer("lint", "q.onnx")["schema"].startswith("qdq.lint/")
    assert answer("explain", "net.onnx", "/head/Conv")["lines"]
    assert answer("tune", "net.onnx", "-o", "p.json", "--tune-compiles", 3)["schema"].startswith("qdq.tuning/")
    made = answer("deploy", "net.onnx", "--data", "data", "--out", "o", "--tune", "off")
    assert made == json.loads((folder / "o/report.json").read_text())
    sums = (folder / "o/SHA256SUMS").read_text()
    (folder / "o/report.html").write_text("of another version")
    made = answer("report", "o")
    assert made["page"] == str(folder / "o/report.html") and (folder / "o/SHA256SUMS").read_text() == sums
    made = answer("compare", "net.onnx", "--data", "data", "--schemes", "int8")
    assert made["schema"].startswith("qdq.compare/")


def test_data_and_segments(folder: Path) -> None:
    assert answer("data", "data")["arrays"] == {"image": {"shape": [1, 1, 8, 8], "dtype": "float32"}}
    pytest.importorskip("nibabel", reason="nibabel is not installed: pip install 'qdq[medical]'")
    scan = (250 * image(0, (12, 10, 9))).astype(np.int16)
    write_nifti(folder / "scans/0.nii.gz", scan, np.diag([-1.0, 1.0, 1.2, 1.0]))
    (folder / "r.yaml").write_text(
        "volume: {orientation: RAS, spacing_mm: [1, 1, 1], grid: centers, intensity: {zscore: all}, patch: [8, 8, 8]}"
    )
    made = answer("data", "scans", "--recipe", "r.yaml", "--write-recipe", "-")
    assert len(made["images"]) == 1 and made["recipe"].startswith("volume:") and made["arrays"] == {}
    onnx.save(segmenter(spatial=(8, 8, 8)), "net3.onnx")
    made = answer("segment", "net3.onnx", "--data", "scans", "--recipe", "r.yaml", "-o", "labels")
    assert all((folder / "labels" / name).is_file() for name in made["files"]) and len(made["files"]) == 2


def test_what_is_known_of_the_machine_and_the_program(folder: Path) -> None:
    made = answer("doctor")
    assert made["purpose"] == "" and any(row["name"] == "onnxruntime" and row["ok"] for row in made["findings"])
    assert answer("doctor", "--for", "prepare")["lacking"] == []
    listed = answer("schema")["schemas"]
    assert {row["name"] for row in listed} == set(FILES)
    for row in listed:
        kind = declared(row["name"])
        assert row["version"] == (kind.FORMAT if issubclass(kind, Document) else "")
        result = CliRunner().invoke(main, ["schema", row["name"], "--json"])
        jsonschema.Draft202012Validator.check_schema(json.loads(result.stdout))
    assert "schemes" in answer("help")["text"] and answer("help", "limits")["topic"] == "limits"
    assert "_QDQ_COMPLETE" in answer("completion", "zsh")["script"]


def process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qdq", *words], capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (("deplo",), "usage", "Did you mean 'deploy'"),
        (("deploy",), "usage", "Missing argument"),
        (("plan", "net.onnx", "--nonsense"), "usage", "--nonsense"),
        (("plan", "absent.onnx"), "input", "absent.onnx"),
        (("schema", "plam"), "input", "Did you mean 'plan'"),
    ],
)
def test_a_refusal_is_json_too(folder: Path, words: tuple[str, ...], kind: str, said: str) -> None:
    done = process(*words, "--json", cwd=folder)
    found = held(done.stdout)["error"]
    assert (done.returncode, found["exit_code"], found["kind"]) == (2, 2, kind)
    assert said in found["message"] and "Error: " in done.stderr and said in done.stderr
    plain = process(*words, cwd=folder)
    assert plain.stdout == "" and plain.returncode == 2 and plain.stderr == done.stderr
    assert process(*words, "--", "--json", cwd=folder).stdout == ""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a command line whose verbs do something else; gives its exit code and standard output."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(work: Callable[..., object], *words: str) -> tuple[int, str]:
        monkeypatch.setattr(main, "main", work)
        monkeypatch.setattr(entry._Signals, "end_late", lambda self: None)
        monkeypatch.setattr(sys, "argv", ["qdq", *words])
        with pytest.raises(SystemExit) as end:
            entry.main()
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().out

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_fault_a_missing_runtime_and_a_signal(ended: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qdq.cli.terminal import Refusal, show_json

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fault(**_: object) -> None:
        raise ZeroDivisionError("in a stage")

    def missing(**_: object) -> None:
        raise Refusal("Cannot import tensorrt.", 3)

    def late(**_: object) -> None:
        show_json('{"schema": "qdq.plan/2"}\n')
        raise ZeroDivisionError("after the answer")

    code, out = ended(fault, "deploy", "--json")
    error = held(out)["error"]
    assert (code, error["kind"], error["cause"]) == (70, "fault", "ZeroDivisionError")
    assert "in fault" in Path(error["log"]).read_text()
    code, out = ended(missing, "deploy", "--json")
    assert (code, held(out)["error"]["kind"]) == (3, "runtime")
    for number, kind in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
        code, out = ended(lambda n=number, **_: signal.raise_signal(n), "deploy", "--json")
        assert (code, held(out)["error"]["kind"]) == (128 + number, kind)
    assert ended(fault, "deploy") == (70, "")
    assert ended(late, "deploy", "--json") == (70, '{"schema": "qdq.plan/2"}\n')


def test_each_exit_code_has_a_kind() -> None:
    for code in set(EXIT_CODES) - {0, 1, 141}:
        assert held(error_json(code, "a\n b"))["error"]["message"] == "a b"
    assert set(schema("error")["$defs"]["Failure"]["properties"]["kind"]["enum"]) == set(KINDS)


def test_files_of_before_are_read(folder: Path) -> None:
    """Their key was "format"."""
    assert CliRunner().invoke(main, ["plan", "net.onnx", "-o", "plan.json"]).exit_code == 0
    calibrate = ["calibrate", "net.onnx", "--data", "data", "--plan", "plan.json", "-o", "t.json"]
    assert CliRunner().invoke(main, calibrate).exit_code == 0
    for name in ("plan.json", "t.json"):
        text = (folder / name).read_text()
        assert text.count('"schema": "qdq.') == 1
        (folder / name).write_text(text.replace('"schema": "qdq.', '"format": "qdq.'))
    answer("quantize", "net.onnx", "--data", "data", "--plan", "plan.json", "--table", "t.json", "-o", "q.onnx")
