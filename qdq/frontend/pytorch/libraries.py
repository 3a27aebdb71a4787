"""torch and what it needs to write ONNX, imported when first asked for."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, TextIO

from engines.core.errors import import_runtime


@cache
def torch_here() -> Any:
    """The module torch.

    Raises:
        MissingRuntimeError: torch, or onnxscript, with which it writes ONNX, is not installed.
    """
    torch = import_runtime("torch")
    import_runtime("onnxscript")
    return torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of torch's own code are not shown, and what it prints, in C++ too, goes to standard error."""
    silent = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), _descriptor_to(2, 1):
        warnings.simplefilter("ignore")
        logging.disable(max(silent, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(silent)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """What this thread prints meanwhile, and C++ to standard output, is not shown; it is a note of what is raised."""
    said = io.StringIO()
    with (
        tempfile.TemporaryFile() as file,
        contextlib.redirect_stdout(_OfThread(sys.stdout, said)),
        contextlib.redirect_stderr(_OfThread(sys.stderr, said)),
    ):
        try:
            with _descriptor_to(file.fileno(), 1):
                yield
        except Exception as error:
            file.seek(0)
            if text := f"{said.getvalue()}{file.read().decode(errors='replace')}".strip():
                error.add_note(text)
            raise


class _OfThread(io.TextIOBase):
    """A stream that keeps what the thread writes that made it; others, as of a progress bar, write on."""

    def __init__(self, stream: TextIO, kept: TextIO) -> None:
        """Of a stream."""
        self._stream, self._kept, self._thread = stream, kept, threading.get_ident()

    def write(self, text: str) -> int:
        """To what is kept, or on."""
        return (self._kept if threading.get_ident() == self._thread else self._stream).write(text)

    def flush(self) -> None:
        """The stream's."""
        self._stream.flush()


@contextlib.contextmanager
def _descriptor_to(target: int, source: int) -> Iterator[None]:
    """What is written to one file descriptor of the process goes to another."""
    try:
        before = os.dup(source)
        os.dup2(target, source)
    except OSError:  # one of them is closed
        yield
        return
    try:
        yield
    finally:
        os.dup2(before, source)
        os.close(before)
