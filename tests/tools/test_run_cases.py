"""The runner reads a table of cases as people write them, runs each in a copy, and says how it ended."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import engine_graphs as graphs
import onnx
import pytest
from places import ROOT

README = """
| case | command | today |
|---|---|---|
| one | `qdq plan model.onnx -o plan.json`; then `qdq lint model.onnx` | fails |
| two, three | the same | fails |
| two | `qdq plan X.onnx -o p.json`, `qdq lint a.onnx`, `b.onnx` | fails |
| three | `--data first` etc.; `... --rest fp16` | fails |
| one | `pathlib.Path("made").touch()`; `qdq audit model.onnx --shape ...` | `not | a command` |
| absent | `qdq lint model.onnx` | no folder |
"""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("run_cases")


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    for name, files in {"one": ["model"], "two": ["a", "b"], "three": ["model"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            onnx.save(
                graphs.conv(batch="n" if file != "b" else 3, data=None, fmt=None), tmp_path / name / f"{file}.onnx"
            )
    for name in ("first", "second.npz"):
        (tmp_path / "three" / name).write_bytes(b"")
    (tmp_path / "three/data").mkdir()
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_abbreviations_are_spelled_out(runner: ModuleType, cases: Path) -> None:
    before: list[list[str]] = []
    found = []
    for names, text in runner.table(cases / "README.md"):
        before = runner.commands(text, before)
        made = runner.outputs(before)
        for name in names:
            found += [
                f"{name}: {' '.join(words)}"
                for line in before
                for words in runner.spelled_out(line, cases / name, made)
            ]
    assert found == [
        "one: qdq plan model.onnx -o plan.json",
        "one: qdq lint model.onnx",
        *(f"two: qdq plan {model}.onnx -o plan.json" for model in "ab"),
        *(f"two: qdq lint {model}.onnx" for model in "ab"),
        "three: qdq plan model.onnx -o plan.json",
        "three: qdq lint model.onnx",
        *(f"two: qdq plan {model}.onnx -o p.json" for model in "ab"),
        *(f"two: qdq lint {model}.onnx" for model in "ab"),
        *(f"three: qdq quantize model.onnx --data {file} -o q.onnx" for file in ("data", "first", "second.npz")),
        "three: qdq lint model.onnx --rest fp16",
        'one: python -c import pathlib; pathlib.Path("made").touch()',
        "one: qdq audit model.onnx --shape x:4x16x8x8",
    ]


def test_open_sizes_are_those_of_a_twin(runner: ModuleType, cases: Path) -> None:
    command = ["qdq", "audit", "a.onnx", "--shape", "..."]
    (words,) = runner.spelled_out(command, cases / "two", ())
    assert words[3:] == ["--shape", "x:3x16x8x8"]


def test_each_case_runs_in_a_copy_and_its_end_is_printed(
    runner: ModuleType, cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(str(path) for path in cases.rglob("*"))
    (cases / "README.md").write_text(
        "| case | command |\n|---|---|\n| one | `qdq plan model.onnx -o p.json`, `qdq explain model.onnx none` |\n"
        '| two | `builtins.print("SQNR of y: 12.5 dB")`; `time.sleep(60)` |\n'
    )
    monkeypatch.setattr(sys, "argv", ["run_cases.py", str(cases)])
    monkeypatch.setattr(runner, "run", lambda command, folder, limit, run=runner.run: run(command, folder, 5.0))
    runner.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[2]) for row in rows] == [("one", "0"), ("one", "2"), ("two", "0"), ("two", "over 5 s")]
    assert rows[1][3].startswith("Error: ") and rows[2][4] == "12.5"
    assert sorted(str(path) for path in cases.rglob("*")) == before


def test_only_the_named_cases_run(
    runner: ModuleType, cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run_cases.py", str(cases), "--only", "three"])
    monkeypatch.setattr(runner, "run", lambda command, folder, limit: ("0", "done"))
    runner.main()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 6 and all(row.startswith("three | ") for row in rows)
