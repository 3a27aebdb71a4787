"""Files appear whole and together, or not at all; each caller gets its own error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engines.core.errors import EngineError
from engines.core.files import new_files, unfinished, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_several_files_appear_together(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    b.write_bytes(b"old")
    with new_files(a, b) as (first, second):
        first.write(b"1")
        second.write(b"2")
        assert not a.exists() and b.read_bytes() == b"old"
    assert (a.read_bytes(), b.read_bytes(), names(tmp_path)) == (b"1", b"2", ["a", "b"])


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyError), new_files(tmp_path / "a", tmp_path / "b") as (first, _):
        first.write(b"half")
        raise KeyError
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError), new_files(tmp_path / "c", tmp_path / "no" / "d"):
        pytest.fail("opened")
    assert names(tmp_path) == ["a"]


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    unfinished(tmp_path / "a").write_bytes(b"a longer text")
    write_atomic(tmp_path / "a", "é", resumed=True)
    assert (tmp_path / "a").read_bytes() == "é".encode() and names(tmp_path) == ["a"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", [EngineError, LookupError])
def test_the_error_is_that_of_the_caller(tmp_path: Path, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"Cannot write .*No such file.*Choose a folder that exists and is writable"):
        write_atomic(tmp_path / "no" / "a", b"1", error=kind)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(EngineError, match="a pipe or a device"):
        write_atomic(tmp_path / "a", b"1")
    assert (tmp_path / "a").is_fifo() and names(tmp_path) == ["a"]
