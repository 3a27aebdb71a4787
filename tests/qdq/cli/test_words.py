"""Help on topics says what the program's own tables say; completion knows verbs, options and their values."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from places import ROOT

from engines.cost.gpus import GPUS
from qdq.build.recipe import LIMITS
from qdq.cli.about.topics import WIDTH, topics
from qdq.cli.answer.error import EXIT_CODES
from qdq.cli.main import main
from qdq.deploy.report.schemas import FILES
from qdq.plan.scheme import SCHEMES


def said(*words: str) -> str:
    result = CliRunner().invoke(main, ["help", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_topics_hold_what_there_is() -> None:
    assert all(f"qdq help {name}" in said() for name in topics())
    held = {
        "schemes": SCHEMES,
        "limits": [f"--{name.replace('_', '-')}" for name in (*LIMITS, "min_int8_share")],
        "exit-codes": map(str, EXIT_CODES),
        "files": FILES,
        "compilers": [*GPUS, "rtx", "tensorrt:10.3"],
        "environment": ["QDQ_CACHE", "QDQ_CACHE_SIZE"],
        "samples": [".npz", "module.py"],
    }
    assert held.keys() == topics().keys()
    for topic, names in held.items():
        text = said(topic)
        assert [name for name in names if name not in text] == []
        assert max(map(len, text.splitlines())) <= WIDTH


def test_a_verb_and_a_wrong_word() -> None:
    assert said("deploy") == CliRunner().invoke(main, ["deploy", "--help"]).stdout
    wrong = CliRunner().invoke(main, ["help", "scheme"])
    assert wrong.exit_code == 2 and "Did you mean 'schemes'?" in wrong.stderr


def test_exit_codes_of_the_readme_and_of_the_command_are_these() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = {int(n) for row in re.findall(r"^\| (\d[\d, ]*) \|", readme, flags=re.MULTILINE) for n in row.split(",")}
    assert listed == set(EXIT_CODES) - {141}
    assert {int(n) for n in re.findall(r"\b(\d+) ", (main.help or "").partition("Exit codes:")[2])} <= set(EXIT_CODES)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_of_shells(shell: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0 and "_QDQ_COMPLETE" in result.stdout
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(result.stdout)
        assert subprocess.run([program, "-n", tmp_path / "script"], check=False).returncode == 0
    assert CliRunner().invoke(main, ["completion", "tcsh"]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("qdq dep", "plain,deploy"),
        ("qdq deploy --min-sq", "plain,--min-sqnr-db"),
        ("qdq deploy --scheme int8-", "plain,int8-smooth"),
        ("qdq deploy --gpu rtx409", "plain,rtx4090"),
        ("qdq deploy --compiler tens", "plain,tensorrt"),
        ("qdq deploy --data vol", "file,vol"),
        ("qdq help sch", "plain,schemes"),
        ("qdq schema ma", "plain,manifest"),
        ("qdq doctor --for pre", "plain,prepare"),
    ],
)
def test_completion(words: str, found: str) -> None:
    env = {**os.environ, "_QDQ_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    start = "import sys; sys.argv = ['qdq']; from qdq.cli.entry import main; main()"
    done = subprocess.run([sys.executable, "-c", start], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and found in done.stdout.splitlines(), done.stdout + done.stderr
