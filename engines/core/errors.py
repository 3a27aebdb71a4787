"""The errors of this package, and the one function that imports a runtime.

EngineError                   exit code 2: bad input
|-- BuildError                the parser or the builder refused; carries its own message
|-- UnsupportedTargetError    a target, or a data type that a target lacks
|-- OutOfMemoryError          a run needs more memory than there is; a smaller one may fit
`-- MissingRuntimeError       exit code 3: a package, a driver or a GPU is missing
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

EXTRAS = {
    "onnxruntime": "cpu",
    "tensorrt_rtx": "cpu",
    "tensorrt": "gpu",
    "polygraphy": "cpu",
    "torch": "torch",
    "onnxscript": "torch",
}


class EngineError(Exception):
    """Anything this package refuses, in one paragraph: what, where, got, needed, fix."""

    exit_code = 2


class BuildError(EngineError):
    """The ONNX parser or the engine builder refused the model.

    `nodes` holds the ONNX node names the message is about, where the runtime gave them.
    """

    def __init__(self, message: str, *, nodes: tuple[str, ...] = ()) -> None:
        """The message, and the ONNX nodes it is about."""
        super().__init__(message)
        self.nodes = nodes


class UnsupportedTargetError(EngineError):
    """A compute capability that the compiler has no name for, or that lacks a data type of the model."""


class OutOfMemoryError(EngineError):
    """A run needs more memory than its device has; a smaller batch may fit."""


class MissingRuntimeError(EngineError):
    """A runtime package, its libraries or a GPU is missing."""

    exit_code = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is nearest, with a space before it; '' where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def how_to_install(module: str) -> str:
    """The command that installs the package of a module."""
    package = module.partition(".")[0]
    return f"pip install 'qdq[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"


def import_runtime(name: str) -> ModuleType:
    """Imports an optional runtime package.

    Raises:
        MissingRuntimeError: the package or one of its libraries is missing; says what to install.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        fix = how_to_install(name)
        raise MissingRuntimeError(f"Cannot import {name} ({error}). It is an optional runtime: {fix}.") from error
