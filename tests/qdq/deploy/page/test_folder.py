"""What a folder must hold, and what is said of one that does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_run import made_run

from engines.core.files import sha256_file
from engines.verify.covered import read_sums, write_sums
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.deploy.page.folder import Run, page_beside, read
from qdq.deploy.page.view import view

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made_run(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_without_its_plan_is_read(run: Path) -> None:
    whole = read(run)
    assert isinstance(whole, Run) and whole.plan and whole.table and whole.layers is None and whole.name == "run"
    (run / "plan.json").unlink()
    assert isinstance(found := read(run), Run) and found.plan is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("report.json", "{", "it is not JSON"),
        ("report.json", "[1]", "its schema is None, which is no run"),
        ("report.json", '{"schema": "qdq.plan/2"}', "its schema is 'qdq.plan/2', which is no run"),
        ("report.json", '{"format": "qdq.report/1"}', "made by another version of qdq"),
        ("report.json", None, "it has no report.json"),
        ("plan.json", "null", "Cannot use the plan"),
        ("table.json", '{"format": "qdq.table/3"}', "Cannot use the table"),
        ("provenance.json", "{{", "Cannot use the provenance"),
        ("provenance.json", "[]", "it holds no object"),
        ("measured.jsonl", '{"format": "x"}\n', "Cannot use line 1"),
    ],
)
def test_what_cannot_be_read_is_said_and_nothing_is_written(
    run: Path, name: str, content: str | None, said: str
) -> None:
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_text(content)
    done = CliRunner().invoke(main, ["report", str(run)])
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert not (run / "report.html").exists()


def test_a_place_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file or folder"):
        read(tmp_path / "nowhere")
    for words in (["a", "b", "c"], ["a", "b", "--with-images"]):
        assert CliRunner().invoke(main, ["report", *words]).exit_code == 2


def test_no_file_of_the_run_is_replaced_but_the_page(run: Path) -> None:
    before = (run / "plan.json").read_bytes()
    done = CliRunner().invoke(main, ["report", str(run), "-o", str(run / "plan.json")])
    assert done.exit_code == 2 and (run / "plan.json").read_bytes() == before
    for _ in range(2):
        assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0
    assert (run / "report.html").exists()


@pytest.mark.parametrize("given", ["", "report.json"])
def test_a_page_made_again_is_in_the_sums(run: Path, given: str) -> None:
    (run / "report.html").write_text("another")
    write_sums(run)
    assert CliRunner().invoke(main, ["report", str(run / given)]).exit_code == 0
    assert read_sums(run)["report.html"] == sha256_file(run / "report.html")
    done = CliRunner().invoke(main, ["report", str(run / given), "-o", str(run / "table.json")])
    assert done.exit_code == 2 and "is an input" in done.stderr, done.output
    for _ in range(2):
        assert CliRunner().invoke(main, ["report", str(run / given), "-o", str(run / "mine.html")]).exit_code == 0


def test_another_page_in_place_of_a_runs_is_in_its_sums(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    (other / "report.html").write_text("own")
    write_sums(other)
    assert CliRunner().invoke(main, ["report", str(run), "-o", str(other / "report.html")]).exit_code == 0
    assert read_sums(other)["report.html"] == sha256_file(other / "report.html")


@pytest.mark.parametrize("name", ["report.json", "plan.json", "table.json", "provenance.json", "slices.npz"])
def test_no_page_tells_of_a_file_that_was_altered(run: Path, name: str, tmp_path: Path) -> None:
    for extra in ("provenance.json", "slices.npz"):
        (run / extra).write_text("{}")
    write_sums(run)
    assert CliRunner().invoke(main, ["report", str(run), "-o", str(tmp_path / "a.html")]).exit_code == 0
    with (run / name).open("ab") as file:
        file.write(b" ")
    for runs in ([run], [run, run], [run / "report.json"]):
        done = CliRunner().invoke(main, ["report", *map(str, runs), "-o", str(tmp_path / "b.html")])
        assert done.exit_code == 2 and f"{name} is not the one" in done.stderr, done.output
    assert not (tmp_path / "b.html").exists()


def test_the_page_of_a_json_file_lies_beside_it(tmp_path: Path) -> None:
    assert page_beside(tmp_path / "a.json") == tmp_path / "a.html"
    assert page_beside(tmp_path / "a.html") == tmp_path / "a.html.html"  # no result is replaced by its page


def test_a_page_says_what_the_folder_lacks(run: Path) -> None:
    (run / "table.json").unlink()
    assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0
    assert "Not in the folder, so not on this page: table.json" in (run / "report.html").read_text()


def test_provenance_is_shown(run: Path) -> None:
    files = [{"name": "plan.json", "sha256": "123"}, {"name": "x", "sha256": "4", "bytes": 5}]
    content = {
        "schema": "s/1",
        "model": {"sha256": "abc"},
        "command": ["qdq", "deploy"],
        "files": files,
        "to": ["a", "b"],
    }
    (run / "provenance.json").write_text(json.dumps(content))
    found = read(run)
    assert isinstance(found, Run)
    assert view(found)["provenance"] == [
        ("", [("schema", "s/1"), ("command", "qdq deploy"), ("to", "a, b")]),
        ("Model", [("sha256", "abc")]),
        ("Files", [("plan.json", "123"), ("x.sha256", "4"), ("x.bytes", "5")]),
    ]
    assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0
    text = (run / "report.html").read_text()
    assert "<summary>Files" in text and "abc" in text and "As provenance.json has it" in text
