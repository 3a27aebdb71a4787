"""torch and what it needs to write ONNX, imported when first asked for."""

from __future__ import annotations

import contextlib
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
    """Warnings of torch's own code are not shown, and what it prints goes to standard error."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
