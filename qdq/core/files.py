"""Reading and writing files and folders: whole or not at all, with errors a person can act on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from engines.core.documents import Document, DocumentError
from engines.core.files import Scratch, read_file, uninterrupted, write_atomic
from qdq.core.errors import InputError

D = TypeVar("D", bound=Document)


def write_text(path: str | os.PathLike[str], text: str, *, resumed: bool = False) -> None:
    """Write a UTF-8 file whole or not at all; an existing one is replaced. `resumed` as in `new_files`.

    Raises:
        InputError: the folder is missing or not writable.
    """
    write_atomic(path, text, error=InputError, resumed=resumed)


def read_document(path: str | os.PathLike[str], kind: type[D], what: str) -> D:
    """Read one of our JSON files by its declared model; `what` is "plan" or "table", for messages.

    Raises:
        InputError: missing, not JSON, of another kind or version, or a key that is missing, unknown or of another type.
    """
    try:
        return kind.from_json(read_file(path))
    except OSError as error:
        raise InputError(
            f"Cannot read the {what} {path}: {error.strerror or error}. Make it with `{kind.MAKE}`."
        ) from None
    except DocumentError as error:
        raise InputError(f"Cannot use the {what} {path}: {error}.") from None


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `out`; removed in any case.

    Raises:
        InputError: `out` is a file, or the place is not writable.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, f"{place} is a file")
        scratch = Scratch(place)
    except OSError as error:
        raise InputError(
            f"Cannot write to the folder {out}: {error.strerror}. Choose a folder that is writable."
        ) from error
    with scratch as folder:
        yield folder


def move_all(folder: Path, out: Path, *, outdated: Collection[str] = ()) -> tuple[str, ...]:
    """Moves every file into `out`, all or none, and returns their names; what they replace is then gone.

    Args:
        outdated: names of files in `out` that are gone then too, for they belong to what was replaced.

    Raises:
        InputError: `out` is not writable, or holds a folder, a pipe or a device where a file is to lie; nothing is
            changed then.
    """
    names = sorted(path.name for path in folder.iterdir())
    if taken := next((out / name for name in names if (out / name).exists() and not (out / name).is_file()), None):
        kind = "folder" if taken.is_dir() else "pipe or a device"
        raise InputError(f"Cannot write {taken}: it is a {kind}. Move it away, or choose another folder.")
    gone = sorted(name for name in set(outdated).difference(names) if (out / name).is_file())
    done: list[str] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        with Scratch(out) as old, uninterrupted():
            try:
                for name in (*names, *gone):
                    with suppress(FileNotFoundError):
                        os.replace(out / name, old / name)
                    done.append(name)
                    if name in names:
                        os.replace(folder / name, out / name)
            except OSError:
                for name in done:
                    for source, target in ((out, folder), (old, out)):
                        with suppress(FileNotFoundError):
                            os.replace(source / name, target / name)
                raise
    except OSError as error:
        raise InputError(f"Cannot write to the folder {out}: {error.strerror or error}.") from error
    return tuple(names)


def how_to_export(text: str) -> str:
    """Of a text that names a model which is no ONNX file yet, how to make one, in a sentence; "" of any other."""
    if text.startswith(("torch:", "hf:")) or text.endswith(".pt2"):
        return f"Write the ONNX file first: `qdq export {text} -o model.onnx`. `qdq deploy` takes it as it is."
    if text.endswith((".pt", ".pth", ".ckpt", ".safetensors")):
        return (
            "It holds weights and no network: write a function that makes the module and loads them, and export that: "
            "`qdq export torch:package.module:function -o model.onnx`."
        )
    return ""
