"""torch and what it needs to write ONNX, imported when first asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

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
