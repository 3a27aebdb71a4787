"""What a benchmark prints replaces its section of RESULTS.md, and only there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("results")


def test_a_section_is_replaced_by_what_was_printed(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text("before\n<!-- bench_x -->\nold\n<!-- /bench_x -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["tools/bench_x.py", "--zoo", "/some/where/zoo", "--results", str(file)])
    results.record(lambda: print("| a |\n|---|\n| 1 |"))
    head, text, tail = re.fullmatch(
        r"(before\n)<!-- bench_x -->\n(.*)<!-- /bench_x -->\n(after\n)", file.read_text(), re.S
    ).groups()  # type: ignore[union-attr]
    assert (
        head and tail and "`python tools/bench_x.py --zoo zoo`" in text and text.endswith("\n\n| a |\n|---|\n| 1 |\n")
    )
    assert "some/where" not in text and "| 1 |" in capsys.readouterr().out
    assert results.shown("1 s") == "```text\n1 s\n```"


def test_a_section_that_is_missing_is_said_before_the_work(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text("nothing\n")
    monkeypatch.setattr(sys, "argv", ["bench_x.py", "--results", f"{file}:other"])
    with pytest.raises(ValueError, match="no section 'other'"):
        results.record(lambda: pytest.fail("ran"))
    assert file.read_text() == "nothing\n"


def test_rows_are_merged_into_the_table_that_stands_there(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, head = tmp_path / "RESULTS.md", "| name | GPU | us |\n|---|---|---|\n"
    rows = "| a | x | 1 |\n| b | x | 2 |\n"
    file.write_text(f"<!-- bench_x -->\n`old`, long ago\n\n{head}{rows}\nA note.\n<!-- /bench_x -->\n")
    command = ["bench_x.py", "--results", str(file), "--merge"]

    def run(printed: str) -> str:
        monkeypatch.setattr(sys, "argv", list(command))
        results.record(lambda: print(printed), key=2)
        return file.read_text()

    found = run(f"{head}| a | y | 3 |\n| b | x | 4 |\n| c | x | 5 |\n\nA note.\nAnother.")
    order = ["| a | x | 1 |", "| a | y | 3 |", "| b | x | 4 |", "| c | x | 5 |", "", "A note.", "Another."]
    assert "\n".join(order) in found and found.startswith(
        "<!-- bench_x -->\n`old`, long ago\n`python tools/bench_x.py`"
    )
    assert run(f"{head}| c | x | 5 |") == found  # a second time changes nothing
    with pytest.raises(ValueError, match="no table of these columns"):
        run("| other |\n|---|\n| 1 |")


def test_without_the_option_nothing_is_kept(results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_x.py"])
    ran: list[int] = []
    results.record(lambda: ran.append(1))
    assert ran == [1]


def test_every_section_belongs_to_a_script() -> None:
    names = re.findall(r"^<!-- (\w+) -->$", (ROOT / "tools" / "RESULTS.md").read_text(encoding="utf-8"), re.M)
    scripts = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert names and all(any(name == s or name.startswith(f"{s}_") for s in scripts) for name in names)
