"""Shared libraries of TensorRT plugins: held to their sha256, then loaded into the registry of this process.

What they do when they are loaded is theirs: a library is code.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engines.core.documents import Part
from engines.core.errors import EngineError
from engines.core.files import sha256_file

_LOADED: set[tuple[str, str]] = set()  # module and sha256: to TensorRT a second time is an error


class PluginLibrary(Part, frozen=True, kw_only=True):
    """A library of plugins that a model needs.

    Attributes:
        path: of the library.
        sha256: that it must have; "" takes any, and the manifest says which it was.
        serialize: put it into the engine; only with the flag VERSION_COMPATIBLE.
    """

    path: str
    sha256: str = ""
    serialize: bool = False

    def found(self) -> str:
        """The sha256 of the file.

        Raises:
            EngineError: it cannot be read, or is not the one that was asked for.
        """
        found = sha256_file(self.path)
        if self.sha256 and found != self.sha256.lower():
            raise EngineError(
                f"The plugin library {self.path} has the sha256 {found}, and the recipe asks for {self.sha256}: it is "
                "not loaded. Put the right library there, or correct `plugins` if this one is meant."
            )
        return found

    def known(self) -> str:
        """The sha256 of the library, which need not be on this machine where the recipe has it.

        Raises:
            EngineError: see `found`; or it is not here, and nobody says its sha256.
        """
        if Path(self.path).is_file():
            return self.found()
        if not self.sha256:
            raise EngineError(
                f"The plugin library {self.path} is not here, and the recipe has no sha256 of it: give plugins: "
                f"[{{path: {self.path}, sha256: ...}}], so that the build knows it where it is."
            )
        return self.sha256.lower()


def load_plugins(trt: Any, libraries: Iterable[PluginLibrary]) -> None:
    """Load libraries into the registry that parsers, builders and runtimes of this process share, each once.

    Raises:
        EngineError: one cannot be read, is not the one that was asked for, or TensorRT does not load it.
    """
    for library in libraries:
        key = (trt.__name__, library.found())
        if key in _LOADED:
            continue
        registry = trt.get_plugin_registry()
        if registry.load_library(str(Path(library.path).resolve())) is None:
            raise EngineError(
                f"TensorRT does not load the plugin library {library.path}: it is built for another version, or its "
                "plugins are registered already. The log on standard error says which."
            )
        _LOADED.add(key)
