"""A function of the user's own, in a Python file."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib_data.sources import ArrayForm, Form, RawSample, SampleShapes
from calib_data.validation import Array, DataError

_ENDINGS = (Exception, SystemExit, GeneratorExit)  # what code may raise by itself; Ctrl-C comes from outside


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonFunction:
    """A user's function, called afresh for each pass; it returns or yields dicts of arrays."""

    where: str
    function: Callable[[], object]
    count: int | None = None
    path: Path | None = None

    @classmethod
    def open(cls, source: str) -> PythonFunction:
        """Import the file and find the function.

        Raises:
            DataError: the file is missing or cannot be imported, or has no such function.
        """
        path, name = Path(source.rpartition(":")[0]), source.rpartition(":")[2]
        if not path.is_file():
            raise DataError(f"No such file: {path}, in the data source {path}:{name}. Check the path.")
        module_name = f"calib_data_source_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # `FORM` has checked the suffix .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        sys.path.insert(0, str(path.resolve().parent))  # as for a script: modules beside the file can be imported
        try:
            with _users_code(path, f"Cannot import the data source {path}"):
                spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.resolve().parent))
        function = getattr(module, name, None)
        if not callable(function):
            there = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
            raise DataError(
                f"No function {name!r} in {path}: it has {there}; a function without arguments that yields dicts "
                "(input name -> array) is needed. Check the name after the colon."
            )
        return cls(where=f"{path}:{name}", function=function, path=path)

    def read(self, indices: range) -> Iterator[RawSample]:
        """Call the function and pick the samples asked for; the others are drawn and dropped.

        Raises:
            DataError: the function raises, ends Python or gives something else; says where.
        """
        with self._guarded():
            result = self.function()
        items = [result] if isinstance(result, Mapping) else result
        if not isinstance(items, Iterable):
            raise DataError(
                f"{self.where} returned {type(result).__name__}; an iterable of dicts is needed. Yield one dict per "
                "sample."
            )
        for i, item in itertools.islice(enumerate(self._drawn(items)), indices.start, indices.stop, indices.step):
            where = f"{self.where}, sample {i}"
            if not isinstance(item, Mapping):
                raise DataError(
                    f"{where} is a {type(item).__name__}; a dict of input name -> array is needed. Yield "
                    "one dict per sample."
                )
            yield RawSample(where, {str(name): _as_array(value, str(name), where) for name, value in item.items()})

    def _guarded(self) -> AbstractContextManager[None]:
        return _users_code(self.path, f"The data source {self.where} failed")

    def _drawn(self, items: Iterable[object]) -> Iterator[object]:
        with self._guarded():
            drawn = iter(items)
        while True:
            with self._guarded():
                try:
                    item = next(drawn)
                except StopIteration:
                    return
            yield item

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """Call the function and look at its arrays: there is no header to read."""
        for where, arrays in self.read(indices):
            yield SampleShapes(where, {name: array.shape for name, array in arrays.items()})


@contextmanager
def _users_code(path: Path | None, doing: str) -> Iterator[None]:
    """Run what the user wrote; whatever it raises, `sys.exit` too, becomes a DataError that says what and where."""
    try:
        yield
    except DataError:
        raise
    except _ENDINGS as error:
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        where = f" (line {line})" if line else ""
        raise DataError(f"{doing}: {_said(error)}{where}. It must give samples and not end Python. Mend it.") from error


def _said(error: BaseException) -> str:
    """The type and the text of what was raised; an exception of the user's own may fail to give a text."""
    try:
        text = str(error)
    except Exception:
        text = "it has no text"
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"


def _as_array(value: object, name: str, where: str) -> Array:
    try:
        return np.asarray(value)
    except _ENDINGS as error:  # an object may bring its own way to become an array
        raise DataError(f"{name!r} in {where} is not an array: {_said(error)}. Yield a numpy array.") from error


def arrays(source: str) -> dict[str, ArrayForm]:
    """Those of the first sample that the function yields."""
    first = next(iter(PythonFunction.open(source).read(range(1))), None)
    return {n: ArrayForm(a.shape, a.dtype) for n, a in (first.arrays if first else {}).items()}


FORM = Form(
    says="module.py:function that yields dicts",
    owns=lambda source: source.rpartition(":")[0].endswith(".py"),
    open=lambda source, inputs: PythonFunction.open(source),
    arrays=arrays,
)
