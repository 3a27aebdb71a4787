"""Work that an earlier run did, found by a hash of all that it depends on: `--cache DIR`.

values that decide a result -> key -> file with the result, its own hash first -> the result, or none
A file appears whole or not at all, and is never changed, so several processes may use a folder at once; a damaged one
counts as missing, and is written again. Must not know what it keeps. What it gives back is what would be computed:
the key holds this program's own code, the versions of what it calls, and what the processor can do.
"""

from __future__ import annotations

import hashlib
import os
import platform
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TypeVar

import msgspec

from engines.core.documents import byte_count
from engines.core.files import abandoned, read_file, write_atomic
from qdq.core.errors import InputError
from qdq.core.resources import cores

FOLDER, SIZE = "QDQ_CACHE", "QDQ_CACHE_SIZE"  # environment variables: the folder, and how large it may grow
USUAL_BYTES = 10 << 30
ENTRY_BYTES = 2 << 30  # of what is larger nothing is kept
SUFFIX = ".kept"
_HEAD = b"qdq.cache/1\n"
_PACKAGES = (
    "msgspec", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "onnxruntime-extensions",
    "polygraphy", "scipy", "tensorrt-cu13", "tensorrt-rtx-cu13", "torch",
)  # fmt: skip

T = TypeVar("T")
Parts = Mapping[str, bytes]
_HERE: ContextVar[Cache | None] = ContextVar("folder of earlier work", default=None)


class Cache:
    """Results in a folder, by kind and key."""

    def __init__(self, folder: Path, *, most_bytes: int = USUAL_BYTES) -> None:
        """Make the folder if need be.

        Raises:
            InputError: it cannot be made or written to.
        """
        self.folder, self.most_bytes = folder, most_bytes
        self.hashes: dict[int, tuple[Callable[[], object], str]] = {}  # id -> what gives the object, and its hash
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK | os.X_OK)
        except OSError:
            writable = False
        if not writable:
            raise InputError(f"Cannot use the cache {folder}: it is no folder that is writable. Choose another.")

    def get(self, kind: str, key: str) -> dict[str, bytes] | None:
        """What was kept, None where there is nothing or it is damaged."""
        path = self._path(kind, key)
        try:
            content = read_file(path)
        except OSError:
            return None
        head, body = content[: len(_HEAD) + 32], content[len(_HEAD) + 32 :]
        if head != _HEAD + hashlib.sha256(body).digest():
            return None
        with suppress(OSError):
            os.utime(path)  # it is of use: the last to go
        with suppress(msgspec.DecodeError):
            return msgspec.msgpack.decode(body, type=dict[str, bytes])
        return None

    def put(self, kind: str, key: str, parts: Parts) -> None:
        """Keep a result. A disk that is full, or a folder that is gone, only costs time later."""
        if sum(map(len, parts.values())) > ENTRY_BYTES:
            return
        body = msgspec.msgpack.encode(dict(parts))
        with suppress(OSError, InputError):
            path = self._path(kind, key)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, _HEAD + hashlib.sha256(body).digest() + body, error=InputError)

    def trim(self) -> None:
        """Remove what was of use longest ago where all is larger than it may be, and what killed runs left."""
        for path in self.folder.glob(f"*/.*{SUFFIX}.*.part"):  # no other program's, wherever the folder is
            if abandoned(path):
                with suppress(OSError):
                    path.unlink()
        held = []
        for path in self.folder.glob(f"*/*{SUFFIX}"):
            with suppress(OSError):  # another process removed it
                state = path.stat()
                held.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held) if total > self.most_bytes else ():
            if total <= 0.8 * self.most_bytes:
                break
            with suppress(OSError):
                path.unlink()
            total -= size

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}{SUFFIX}"


@contextmanager
def caching(folder: Path | None) -> Iterator[Cache | None]:
    """Inside, stages take what is kept in a folder, and keep there what they do; None changes nothing.

    Raises:
        InputError: the folder is not writable, or the environment has a size that is none.
    """
    if folder is None:
        yield _HERE.get()
        return
    size = os.environ.get(SIZE, "")
    try:
        most = byte_count(size) if size else USUAL_BYTES
    except ValueError:
        raise InputError(f"{SIZE} is {size!r}: it must be a size such as 800M, 20G or 1.5GiB.") from None
    made = Cache(folder, most_bytes=most)
    token = _HERE.set(made)
    try:
        yield made
    finally:
        _HERE.reset(token)
        made.trim()


def caches() -> bool:
    """Whether anything is kept: what a key takes long to compute is not computed where nothing is."""
    return _HERE.get() is not None


def remembered(
    kind: str,
    key: Callable[[], tuple[object, ...]],
    make: Callable[[], T],
    *,
    pack: Callable[[T], Parts | None],
    unpack: Callable[[dict[str, bytes]], T],
) -> T:
    """What `make` gives, or gave in an earlier run.

    Args:
        kind: folder of such results.
        key: all that the result depends on beside the program and the machine, as values whose `repr` says all.
        pack: the result as bytes by name; None where this one is not to be kept.
        unpack: the result again; whatever it raises, the entry counts as damaged.
    """
    if not caches():
        return make()
    wanted = key()
    if (known := recalled(kind, wanted, unpack)) is not None:
        return known
    made = make()
    if (packed := pack(made)) is not None:
        keep(kind, wanted, packed)
    return made


def recalled(kind: str, key: tuple[object, ...], unpack: Callable[[dict[str, bytes]], T]) -> T | None:
    """What was kept of an earlier run, as of `remembered`; None where there is nothing of use."""
    found = _HERE.get()
    parts = None if found is None else found.get(kind, _name(kind, key))
    if parts is None:
        return None
    try:
        return unpack(parts)
    except Exception:  # whatever damage makes of it
        return None


def keep(kind: str, key: tuple[object, ...], parts: Parts) -> None:
    """Keep a result for `recalled`, where anything is kept."""
    if (found := _HERE.get()) is not None:
        found.put(kind, _name(kind, key), parts)


def hashed(value: object, make: Callable[[], str]) -> str:
    """A hash of an object that does not change, computed once while the cache is in use."""
    found = _HERE.get()
    if found is None:
        return make()
    known = found.hashes.get(id(value))
    if known is None or known[0]() is not value:  # an id may be that of an object that is gone
        try:
            held: Callable[[], object] = weakref.ref(value)
        except TypeError:
            held = lambda: value  # noqa: E731  # kept alive
        known = found.hashes[id(value)] = (held, make())
    return known[1]


def _name(kind: str, key: tuple[object, ...]) -> str:
    return hashlib.sha256(repr((kind, program(), key)).encode(errors="surrogatepass")).hexdigest()


@cache
def program() -> str:
    """A hash of this program's code, of the versions of what it calls and of what the processor can do."""
    from importlib import metadata  # takes 20 ms

    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[3]
    for package in ("calib_data", "engines", "qdq"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            digest.update(f"{name} {metadata.version(name)}\0".encode())
    machine = (platform.python_version(), platform.system(), platform.machine(), _features(), cores())
    digest.update(repr(machine).encode())
    return digest.hexdigest()


def _features() -> str:
    """The instructions that the processor has, as Linux lists them: libraries choose their arithmetic by them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.partition(":")[0].strip() in ("flags", "Features"):
                return line.partition(":")[2].strip()
    return ""
