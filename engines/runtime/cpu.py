"""A Q/DQ model in ONNX Runtime on the CPU, in the types that its file has; for any number of threads at once.

`HeldModel` -> `OnCpu` -> arrays by name in and out. Must not read a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.core import arithmetic, onnx_runtime as ort
from engines.core.errors import EngineError, OutOfMemoryError, import_runtime
from engines.runtime.arrays import Array, OnGpu, TensorSpec
from engines.verify.covered import HeldModel

_MEMORY = re.compile(r"bad_alloc|bad allocation|[Ff]ailed to allocate|out of memory|Cannot allocate memory")
_NAMES = {"float": "float32", "double": "float64"}


class OnCpu:
    """A model that runs on the CPU."""

    def __init__(self, model: HeldModel, *, custom_ops: Sequence[Path | str] = (), threads: int = 0) -> None:
        """Open it.

        Args:
            model: as it was verified.
            custom_ops: shared libraries of custom operators, which are code.
            threads: inside one operator; 0 lets ONNX Runtime choose.

        Raises:
            EngineError: ONNX Runtime refuses it.
            MissingRuntimeError: onnxruntime is not installed.
        """
        self._session: Any | None = arithmetic.session(
            model.proto, directory=model.directory, where=model.name, custom_ops=custom_ops, threads=threads
        )
        opened: Any = self._session
        self.inputs = tuple(_spec(i) for i in opened.get_inputs())
        self.outputs = tuple(_spec(o) for o in opened.get_outputs() if str(o.type).startswith("tensor("))
        self.title = f"ONNX Runtime {import_runtime('onnxruntime').__version__} on the CPU"

    def run(self, arrays: Mapping[str, Array | OnGpu]) -> dict[str, Array]:
        """One run, from any thread.

        Raises:
            OutOfMemoryError: it needs more memory than there is.
            EngineError: ONNX Runtime's own message; an array lies on a GPU.
        """
        fed, opened = {}, self._session
        if opened is None:
            raise EngineError("The model was closed.")
        for name, array in arrays.items():
            if isinstance(array, OnGpu):
                raise EngineError(f"Input {name!r} lies on a GPU, and the model runs on the CPU: move it there first.")
            fed[name] = array
        try:
            return next(ort.run(opened, [fed]))
        except MemoryError as error:
            raise OutOfMemoryError(f"A run needs more memory than this machine has: {error}.") from error
        except EngineError as error:
            kind = OutOfMemoryError if _MEMORY.search(str(error)) else EngineError
            raise kind(str(error)) from error

    def close(self) -> None:
        """Give the session back; runs that go on end first."""
        self._session = None


def _spec(value: Any) -> TensorSpec:
    kind = str(value.type).partition("(")[2].rstrip(")")
    dtype = "" if kind == "string" or "(" in kind else _NAMES.get(kind, kind)
    shape = tuple(n if isinstance(n, int) else None for n in value.shape)
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)
