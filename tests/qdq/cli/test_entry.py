"""What ends the command line: a fault, a signal at any moment, a closed pipe; and what it says on the way."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qdq.cli import entry
from qdq.cli.main import main as verbs
from qdq.cli.terminal import Bars, note, voice, warn


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The signal handlers are this process's own again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(monkeypatch: pytest.MonkeyPatch, work: object, *arguments: str) -> int:
    """The exit code of a command line whose verbs do `work`."""
    monkeypatch.setattr(verbs, "main", work)
    monkeypatch.setattr(entry._Signals, "end_late", lambda self: None)  # which would end the tests
    monkeypatch.setattr(sys, "argv", ["qdq", *arguments])
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_fault_of_ours_ends_with_70_and_a_log_without_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        try:
            open(Path(tmp_path, "patient-7"), "rb")  # noqa: SIM115
        except FileNotFoundError as error:
            raise ZeroDivisionError("in ward 3") from error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert ended(monkeypatch, fail, "deploy", "patient-7.onnx", "--data=ward", "--out", "here") == 70
    said = capsys.readouterr().err
    (log,) = tmp_path.glob("qdq-fault-*.log")
    assert said.startswith("Error: ") and said.count("\n") == 1 and str(log) in said and "ZeroDivisionError" in said
    held = log.read_text()
    assert "in fail" in held and "qdq deploy --data --out" in held and "onnx " in held
    assert "FileNotFoundError" in held and "ZeroDivisionError" in held
    assert "patient-7" not in held.replace('"patient-7"', "") and "ward" not in held.replace('"in ward 3"', "")


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "Inter"), (signal.SIGTERM, 143, "Termin")])
def test_a_signal_ends_with_its_code_and_one_line_whatever_it_becomes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, word: str
) -> None:
    def changed(**options: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise ImportError("numpy says") from error

    for work in (lambda **options: signal.raise_signal(number), changed):
        assert ended(monkeypatch, work) == code
        said = capsys.readouterr().err
        assert said.startswith(word) and said.count("\n") == 1


def test_ctrl_c_during_the_imports() -> None:
    program = (
        "import signal, sys\n"
        "class Ctrl:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click.core': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Ctrl())\n"
        "from qdq.cli.entry import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr == "Interrupted; no file is left half written.\n"


def test_ctrl_c_waits_until_a_compiled_module_is_set_up(tmp_path: Path) -> None:
    """Raised inside, it ends the process: of onnx by `terminate`."""
    program = (
        "import signal, sys\n"
        "from importlib.machinery import ExtensionFileLoader\n"
        "from qdq.cli import entry\n"
        "plain, done = ExtensionFileLoader.exec_module, []\n"
        "def exec_module(self, module):\n"
        "    if module.__name__.startswith('onnx.'):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    done.append(plain(self, module))\n"
        "ExtensionFileLoader.exec_module = exec_module\n"
        "def report():\n"
        "    print('set up', flush=True) if done else None\n"
        "import atexit; atexit.register(report)\n"
        "sys.argv = ['qdq', 'plan', 'absent.onnx']\n"
        "entry.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 130 and "set up" in done.stdout
    assert done.stderr == "Interrupted; no file is left half written.\n"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timer that sends a signal")
def test_a_signal_that_a_destructor_drops_ends_the_run_all_the_same() -> None:
    """What cleans up meanwhile, for longer than that takes, is not interrupted."""
    program = (
        "import signal, sys, time\n"
        "from qdq.cli import entry\n"
        "class Dropped:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "def run():\n"
        "    try:\n"
        "        Dropped()\n"
        "        print('goes on', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        time.sleep(2.5)\n"
        "        print('cleaned', flush=True)\n"
        "entry._run = run\n"
        "entry.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout) == (130, "goes on\ncleaned\n"), done.stderr
    assert done.stderr.endswith("Interrupted; no file is left half written.\n")


def test_a_signal_while_python_ends_changes_nothing() -> None:
    program = (
        "import atexit, signal, sys\n"
        "from qdq.cli.entry import main\n"
        "atexit.register(lambda: [signal.raise_signal(n) for n in (signal.SIGINT, signal.SIGTERM)])\n"
        "sys.argv = ['qdq', '--version']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("where", ["itself", "a thread that is waited for"])
def test_a_signal_ends_what_does_not_see_it(where: str) -> None:
    """A call of another language neither ends nor comes back to Python for some minutes."""
    program = (
        "import hashlib, signal, threading, qdq.cli.entry as entry\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def long(): hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)\n"
        "def run():\n"
        "    threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM]).start()\n"
        "    if THREAD:\n"
        "        with ThreadPoolExecutor(1) as pool: pool.submit(long).result()\n"
        "    long()\n"
        "entry.LATE_S, entry._run = 1.0, run\n"
        "entry.main()\n"
    ).replace("THREAD", str(where != "itself"))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (143, "")
    assert found.stderr == "Terminated; no file is left half written.\n"


def test_what_is_no_exception_is_a_fault_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class OddError(BaseException):
        pass

    def fail(**options: object) -> None:
        raise OddError

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert ended(monkeypatch, fail) == 70
    assert capsys.readouterr().err.count("\n") == 1


def test_a_closed_pipe_ends_quietly() -> None:
    command = [sys.executable, "-m", "qdq", "schema", "report"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert said == b"" and process.returncode == 141


def test_streams_that_cannot_be_written_change_no_exit_code(tmp_path: Path) -> None:
    command = f"{sys.executable} -m qdq lint absent.onnx"
    for streams in (">&-", "2>&-", ">&- 2>&-", *(["2>/dev/full"] if Path("/dev/full").exists() else [])):
        done = subprocess.run(["/bin/sh", "-c", f"{command} {streams}"], capture_output=True, check=False, cwd=tmp_path)
        assert done.returncode == 2, streams
    done = subprocess.run(["/bin/sh", "-c", f"{sys.executable} -m qdq schema plan >&-"], check=False, cwd=tmp_path)
    assert done.returncode == 0


def test_a_refusal_is_no_fault_and_a_fault_no_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qdq", "lint", "absent.onnx"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("Error: Cannot read absent.onnx")


def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    child = (
        "import os, time; from qdq.core.child import as_child; as_child(os.getppid()); print('up', flush=True)\n"
        "time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid = int(process.stdout.readline())
    os.kill(pid, signal.SIGINT)  # which a terminal sends to all: the child leaves it to its parent
    os.kill(pid, 0)
    process.kill()
    process.communicate()
    until = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < until, "the child lives"
        time.sleep(0.1)


def test_a_child_whose_parent_was_killed_before_it_was_ready_ends() -> None:
    program = "from qdq.core.child import as_child; as_child(1 << 30); import time; time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", program], timeout=50, check=False).returncode == 1


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_lines_without_a_terminal_say_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Bars(every_s=0.01) as bars:
        bars(3, 12, "calibrating")
        until = time.monotonic() + 20
        while "left" not in stream.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        bars(0, None, "compile")
        while "Compile" not in stream.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert re.search(r"Calibrating: 3 of 12, about \d+ s left\n", stream.getvalue())
    assert re.search(r"Compile: for \d+ s\n", stream.getvalue())


@click.command()
def spoken() -> None:
    """A verb that says one thing of each kind."""
    with Bars() as bars:
        bars(0, 1, "work")
    note("a note")
    warn(["a warning"])
    click.echo("result")


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], ["Note: a note", "Warning: a warning"]),
        (["-q"], ["Warning: a warning"]),
        (["-v"], ["Work", "Work: 0.0 s", "Note: a note", "Warning: a warning"]),
    ],
)
def test_quiet_verbose_and_the_log_file(tmp_path: Path, options: list[str], shown: list[str]) -> None:
    log = tmp_path / "run.log"
    from qdq.cli.terminal import voice_options

    verb = click.Command("spoken", callback=spoken.callback, params=[*voice_options()])
    done = CliRunner().invoke(verb, [*options, "--log-file", str(log)])
    assert done.exit_code == 0 and done.stdout == "result\n"
    assert done.stderr.splitlines() == shown
    lines = [line.partition(" ")[2] for line in log.read_text().splitlines()]
    assert lines == ["qdq spoken", "Work", "Work: 0.0 s", "Note: a note", "Warning: a warning"]
    assert voice().log is None


def test_verbose_says_where_an_error_arose(tmp_path: Path) -> None:
    done = CliRunner().invoke(verbs, ["lint", "-v", str(tmp_path / "absent.onnx")])
    assert done.exit_code == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: Cannot read")
