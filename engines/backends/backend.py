"""What a compiler of engines offers, and which compilers there are.

A backend is one file of this folder with a `BACKEND`; `backends` finds it.
Must not know any of them, nor import a runtime: a backend does that inside its functions.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import onnx

import engines.backends
from engines.backends.compiler import Engine, OnProgress, ShapeRange
from engines.backends.plugins import PluginLibrary
from engines.backends.tensorrt_options import DLA, TensorRtOptions
from engines.core.errors import EngineError, UnsupportedTargetError, did_you_mean

DEFAULT = "rtx"


class Build(Protocol):
    """How a backend compiles one engine and reads the table of its layers."""

    def __call__(
        self,
        model: Path | str | onnx.ModelProto,
        *,
        targets: Sequence[str],
        shapes: Mapping[str, ShapeRange] | None,
        options: TensorRtOptions | None,
        directory: Path | None,
        on_progress: OnProgress | None,
    ) -> Engine:
        """Compile a path, or a model; where the backend takes no `options`, they change nothing.

        External data of a path are found beside it, those of a model in `directory`.

        Raises:
            EngineError: what was asked for is refused, or the runtime is missing; says why.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What an engine needs beside it when it runs.

    Attributes:
        runtime_cache: file of what TensorRT-RTX compiles when an engine first runs: read if it exists, then written.
        weight_streaming_budget: bytes of device memory for the weights of an engine that streams them; -1 leaves it to
            TensorRT, None streams none.
        plugins: libraries to load before the engine.
    """

    runtime_cache: Path | None = None
    weight_streaming_budget: int | None = None
    plugins: tuple[PluginLibrary, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One compiler of engines.

    Attributes:
        name: as layer tables hold it.
        compiler: the name that `--compiler` takes it by; what each version of it does, `profile.Profile` says.
        title: the compiler's own name.
        runtime: module that must be importable.
        packages: distributions that may hold that module, the usual one first.
        targets: the GPU generations it knows.
        needs_gpu: it compiles for the GPU of this machine, whatever the target.
        predicts: `engines.cost` predicts the time of its kernels from its layer tables.
        check_targets: (model, targets) -> normalised targets, each once, () where the GPU of this machine decides;
            refuses an unknown target, and a data type of the model that a target lacks.
        build: compiles.
        runner: (path or bytes of an engine, name=shown in reports, running=`Running`) -> a Polygraphy runner.
        no_options: why it takes none of `TensorRtOptions`; "" where it takes them.
        no_runtime_cache: why its engines have no runtime cache; "" where they have.
    """

    name: str
    compiler: str
    title: str
    runtime: str
    packages: tuple[str, ...]
    targets: tuple[str, ...]
    needs_gpu: bool
    predicts: bool
    check_targets: Callable[[onnx.ModelProto, Sequence[str]], tuple[str, ...]]
    build: Build
    runner: Callable[..., Any]
    no_options: str = ""
    no_runtime_cache: str = ""

    def target(self, text: str) -> str:
        """The name of a target in the form 'sm89', from '8.9', '89' or 'SM_89'.

        Raises:
            UnsupportedTargetError: the compiler does not know it; names another backend that does, or the nearest, or
                says why there is none for DLA.
        """
        name = target_name(text)
        if name in self.targets:
            return name
        if name.lower().startswith("dla"):
            raise UnsupportedTargetError(DLA)
        others = [f"{b.title} (--compiler {b.compiler})" for b in backends().values() if name in b.targets]
        hint = f" {name} needs {' or '.join(others)}." if others else did_you_mean(name, self.targets)
        known = ", ".join(self.targets)
        raise UnsupportedTargetError(f"{self.title} has no target {text!r}; it compiles for {known}.{hint}")

    @property
    def need(self) -> str:
        """What it needs, for help and messages."""
        return "needs this machine's GPU" if self.needs_gpu else "needs no GPU"


def target_name(text: str) -> str:
    """A target in the form 'sm89', from '8.9', '89' or 'SM_89'; a text of another form as it is."""
    match = re.fullmatch(r"(?:sm[_ ]?)?(\d+)\.?(\d)", text.strip().lower())
    return f"sm{match[1]}{match[2]}" if match else text


def members(attribute: str) -> Iterator[Any]:
    """What the files of this folder hold under a name, in the order of the files; those without it are left aside."""
    for module in pkgutil.iter_modules(engines.backends.__path__):
        found = getattr(import_module(f"{engines.backends.__name__}.{module.name}"), attribute, None)
        if found is not None:
            yield found


def backends() -> dict[str, Backend]:
    """Name -> backend, of every file of this folder that holds one."""
    return {backend.name: backend for backend in members("BACKEND")}


def backend_named(name: str) -> Backend:
    """The backend of that name.

    Raises:
        EngineError: there is none; names the nearest.
    """
    found = backends()
    if name not in found:
        raise EngineError(f"Unknown backend {name!r}; there are {', '.join(found)}.{did_you_mean(name, found)}")
    return found[name]


def predicting(name: str) -> Backend:
    """The backend of that name if times are predicted of its kernels, else one that they are of."""
    own = backend_named(name)
    return own if own.predicts else next(b for b in backends().values() if b.predicts)
