"""Earlier work: given back as it was, made again where it is damaged, and never wrong for several processes at once."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from qdq.core.disk import cache
from qdq.core.disk.cache import Cache, caching, remembered
from qdq.core.errors import InputError

NO_PARTS = b"qdq.cache/1\n" + hashlib.sha256(b"\x93\x01").digest() + b"\x93\x01"  # a list that ends too early


def doubled(key: tuple[object, ...], made: list[int], value: int) -> int:
    """Twice a value, counting how often it is computed."""

    def make() -> int:
        made.append(value)
        return 2 * value

    return remembered(
        "doubles", lambda: key, make, pack=lambda v: {"v": str(v).encode()}, unpack=lambda parts: int(parts["v"])
    )


def test_nothing_is_kept_without_a_folder() -> None:
    made: list[int] = []
    assert [doubled(("a",), made, 3) for _ in range(2)] == [6, 6] and made == [3, 3]


def test_the_same_key_is_computed_once_and_another_key_anew(tmp_path: Path) -> None:
    made: list[int] = []
    for _ in range(2):
        with caching(tmp_path / "kept"):
            assert doubled(("a",), made, 3) == 6 and doubled(("b",), made, 4) == 8
    assert made == [3, 4]
    with caching(None):
        doubled(("a",), made, 3)
    assert made == [3, 4, 3]


@pytest.mark.parametrize("damage", [b"", b"{", b"qdq.cache/1\n" + bytes(40), NO_PARTS, b"other"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: bytes) -> None:
    made: list[int] = []
    with caching(tmp_path):
        doubled(("a",), made, 3)
        (entry,) = tmp_path.glob("*/*")
        whole = entry.read_bytes()
        entry.write_bytes(damage if damage != b"other" else whole[:-1] + b"\0")
        assert doubled(("a",), made, 3) == 6 and made == [3, 3]
        assert entry.read_bytes() == whole


def test_an_entry_that_means_nothing_is_made_again(tmp_path: Path) -> None:
    made: list[int] = []
    with caching(tmp_path) as held:
        doubled(("a",), made, 3)
        assert held is not None
        (entry,) = tmp_path.glob("*/*")
        held.put("doubles", entry.stem, {"v": b"six"})
        assert doubled(("a",), made, 3) == 6 and made == [3, 3]


def test_another_version_of_the_program_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    with caching(tmp_path):
        doubled(("a",), made, 3)
        monkeypatch.setattr(cache, "program", lambda: "another")
        doubled(("a",), made, 3)
    assert made == [3, 3]


def test_what_was_of_use_longest_ago_goes_first(tmp_path: Path) -> None:
    held = Cache(tmp_path, most_bytes=4000)
    for number in range(5):
        held.put("k", f"{number}", {"x": bytes(1000)})
        os.utime(tmp_path / "k" / f"{number}.kept", (time.time() - 100 + number,) * 2)
    assert held.get("k", "0") is not None  # of use just now
    held.trim()
    left = {path.stem for path in tmp_path.glob("*/*")}
    assert "0" in left and "1" not in left and "4" in left
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 4000


def test_what_killed_runs_left_goes_and_no_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "k").mkdir()
    names = (".1.kept.0a1b2c3d.part", ".film.part", "notes.txt", ".unet.onnx.0a1b2c3d.part")
    for name in names:
        (tmp_path / "k" / name).write_text("")
        os.utime(tmp_path / "k" / name, (time.time() - 3600,) * 2)
    Cache(tmp_path, most_bytes=0).trim()
    assert sorted(path.name for path in tmp_path.glob("k/*")) == sorted(names[1:])


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot use the cache"), caching(tmp_path / "file"):
        pass
    monkeypatch.setenv(cache.SIZE, "many")
    with pytest.raises(InputError, match="QDQ_CACHE_SIZE is 'many'"), caching(tmp_path / "kept"):
        pass


def test_a_full_disk_costs_time_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_atomic", full)
    made: list[int] = []
    with caching(tmp_path):
        assert doubled(("a",), made, 3) == doubled(("a",), made, 3) == 6


HAMMER = """
import sys
from pathlib import Path
from qdq.core.disk.cache import caching, remembered
folder, wrong = Path(sys.argv[1]), 0
with caching(folder):
    for number in range(150):
        value = number % 5
        made = remembered(
            "doubles", lambda: (value,), lambda: 2 * value,
            pack=lambda v: {"v": str(v).encode()}, unpack=lambda parts: int(parts["v"]),
        )
        wrong += made != 2 * value
        if number % 40 == 7:
            for entry in folder.glob("*/*.kept"):
                entry.unlink(missing_ok=True)
sys.exit(wrong)
"""


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HAMMER, str(tmp_path / "kept")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert list((tmp_path / "kept").rglob("*.kept")) and not list((tmp_path / "kept").rglob("*.part"))


class Thing:
    """An object that may be gone."""


def test_a_hash_is_of_the_object_and_does_not_keep_it(tmp_path: Path) -> None:
    made: list[object] = []
    with caching(tmp_path) as held:
        thing, numbers = Thing(), [1, 2]
        for value in (thing, numbers, thing, numbers):
            cache.hashed(value, lambda value=value: made.append(value) or f"{len(made)}")
        assert made == [thing, numbers]
        gone = weakref.ref(thing)
        made.clear()
        del thing, value
        gc.collect()
        assert gone() is None and held is not None
        others = [Thing() for _ in range(50)]  # one of them may have the id of the thing that is gone
        for number, other in enumerate(others):
            assert cache.hashed(other, lambda number=number: f"of {number}") == f"of {number}"
