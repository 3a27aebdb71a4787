"""Whether a file may be written, asked before the work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from qdq.core.errors import InputError

SAMPLES = (".npz", ".npy")  # what a folder of samples holds


def check_output(path: Path, *inputs: Path | str | None) -> None:
    """Refuse early what would fail after the work, or would replace a file that is being read.

    Raises:
        InputError: says which.
    """
    folder, what = path.absolute().parent, ""
    if path.exists() and not path.is_file():
        what = "it is a folder" if path.is_dir() else "it is a pipe or a device"
    elif not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "its folder does not exist or is not writable"
    if what:
        raise InputError(f"Cannot write {path}: {what}. Choose a file name in a folder that is writable.")
    if path.exists() and any(path.samefile(held) for held in _files_of(inputs, path)):
        raise InputError(
            f"Cannot write {path}: it is an input of this command, which is never changed. Choose another name."
        )


def _files_of(inputs: Iterable[Path | str | None], beside: Path) -> Iterator[Path]:
    """The files that are read of some inputs: themselves, a sample that lies `beside`, a model's external data."""
    for given in inputs:
        if not given:
            continue
        path = Path(given)
        if not path.exists() and isinstance(given, str):
            path = Path(given.rpartition(":")[0])  # of module.py:function
        if path.is_file():
            yield path
            yield from (path.parent / name for name in _external(path) if (path.parent / name).is_file())
        elif path.is_dir() and beside.suffix in SAMPLES and beside.parent.samefile(path):
            yield beside


def _external(model: Path) -> set[str]:
    """The files of a model's weights; none of what is no model, which its reader refuses."""
    if model.suffix != ".onnx":
        return set()
    from engines.core.errors import BuildError
    from engines.core.load import load_graph
    from engines.core.nodes import external_files

    try:
        return {name for name in external_files(load_graph(model)) if "\0" not in name}
    except BuildError:
        return set()
