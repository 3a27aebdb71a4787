"""Temporary folders and files: they go at the end, and what a killed run left goes the next time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engines.core.files import YOUNG_S, Scratch, new_files, read_file, uninterrupted
from qdq.core.errors import InputError
from qdq.core.files import folder_beside, move_all


def killed(program: str) -> None:
    """Run Python until it kills itself."""
    done = subprocess.run([sys.executable, "-c", f"import os\n{program}\nos.kill(os.getpid(), 9)"], check=False)
    assert done.returncode == -9


def aged(path: Path) -> Path:
    """The path, changed a while ago."""
    then = path.stat().st_mtime - 2 * YOUNG_S
    os.utime(path, (then, then))
    return path


def test_a_folder_of_a_killed_run_goes_and_one_in_use_stays(tmp_path: Path) -> None:
    killed(f"from pathlib import Path; from engines.core.files import Scratch; s = Scratch(Path({str(tmp_path)!r}))")
    (left,) = tmp_path.iterdir()
    (left / "file").write_text("x")
    aged(left)
    with Scratch(tmp_path) as mine:
        aged(mine)
        assert not left.exists()
        with Scratch(tmp_path) as other:
            assert mine.exists() and other.exists()
    assert not list(tmp_path.iterdir())


def test_what_others_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = (".qdq-scratch-mine", ".qdq-scratch-abcdefgh.txt", "qdq-baseline", ".qdq-baseline")
    for name in names:
        (tmp_path / name).mkdir()
        aged(tmp_path / name)
    (tmp_path / ".qdq-scratch-abcdefgh").symlink_to(tmp_path)
    for place in (tmp_path, None):
        with Scratch(place):
            pass
    assert {p.name for p in tmp_path.iterdir()} == {*names, ".qdq-scratch-abcdefgh"}


def test_a_temporary_file_of_a_killed_run_goes_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "a[1].onnx"
    killed(
        "from pathlib import Path; from engines.core.files import new_files\n"
        f"files = new_files(Path({str(path)!r})); files.__enter__()"
    )
    (left,) = tmp_path.iterdir()
    aged(left)
    with new_files(path):
        aged(next(p for p in tmp_path.iterdir() if p != left))
        assert not left.exists()
        with new_files(path) as (file,):  # another at the same time leaves the first alone
            file.write(b"second")
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b""


def test_results_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old a")
    (out / "mine").write_text("stays")

    def moved(*names: str) -> tuple[str, ...]:
        with folder_beside(out) as folder:
            for name in names:
                (folder / name).write_text(f"new {name}")
            return move_all(folder, out)

    (out / "c").mkdir()
    with pytest.raises(InputError, match="out/c: it is a folder"):
        moved("a", "b", "c")
    (out / "c").rmdir()
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if target == out / "b":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        moved("a", "a new name", "b")
    assert {p.name: p.read_text() for p in out.iterdir()} == {"a": "old a", "mine": "stays"}
    monkeypatch.undo()
    assert moved("a", "b") == ("a", "b")
    assert {p.name: p.read_text() for p in out.iterdir()} == {"a": "new a", "b": "new b", "mine": "stays"}


def test_a_signal_waits_for_renames_that_belong_together() -> None:
    import signal

    before, seen = signal.signal(signal.SIGINT, signal.default_int_handler), []  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            seen.append("whole")
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["whole"]


def test_what_may_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a file"):
            read_file(path)
