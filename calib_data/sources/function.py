"""A function of the user's own, in a Python file."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib_data.elements import Elements, Stream, as_array, limited_to
from calib_data.reading import Reading, reading_of
from calib_data.sources import ArrayForm, Form, RawSample, SampleShapes
from calib_data.users_code import SAMPLES, users_code
from calib_data.validation import Array, DataError, InputSpec

YIELDS = "a function without arguments that yields dicts (input name -> array)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonFunction:
    """What a function of this program gives anew for each pass: dicts of arrays by input."""

    where: str
    function: Callable[[], Iterable[Mapping[str, Array]]]
    count: int | None = None

    def read(self, indices: range) -> Iterator[RawSample]:
        """Call the function and pick the samples asked for; the others are drawn and dropped."""
        drawn = enumerate(self.function())
        for i, arrays in itertools.islice(drawn, indices.start, indices.stop, indices.step):
            yield RawSample(f"{self.where}, sample {i}", arrays)

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """Call the function and look at its arrays: there is no header to read."""
        for where, arrays in self.read(indices):
            yield SampleShapes(where, {name: array.shape for name, array in arrays.items()})


def function_of(
    source: str, of: str = "", needed: str = YIELDS, fix: str = SAMPLES
) -> tuple[Callable[..., object], Path]:
    """Import the file of `module.py:function`; the function, and the file.

    Args:
        source: the text.
        of: what it is, for messages; "" is the data source.
        needed: what kind of function it must name.
        fix: of what fails while the file is imported.

    Raises:
        DataError: the file is missing or cannot be imported, or has no such function.
    """
    path, name = Path(source.rpartition(":")[0]), source.rpartition(":")[2]
    of = of or f"the data source {path}:{name}"
    if not path.is_file():
        raise DataError(f"No such file: {path}, in {of}. Check the path.")
    module_name = f"calib_data_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # `FORM` has checked the suffix .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.resolve().parent))  # as for a script: modules beside the file can be imported
    try:
        with users_code(path, f"Cannot import {path}, of {of}", fix):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise DataError(
            f"No function {name!r} in {path}: it has {there}; {needed} is needed. Check the name after the colon."
        )
    return function, path


def called(function: Callable[[], object], where: str, path: Path | None) -> Reading:
    """How to read what a function gives: a generator is made anew for each pass, anything else is kept.

    Raises:
        DataError: the function raises or ends Python; says where.
    """
    with users_code(path, f"The data source {where} failed"):
        first = function()
    limit = limited_to()
    if not isinstance(first, Iterator):
        return reading_of(first, where, limit)
    given = [first]

    class Anew:
        """Calls the function for each pass."""

        def __iter__(self) -> Iterator[Any]:
            made = given.pop() if given else function()
            return iter(made)  # type: ignore[call-overload, no-any-return]

    return reading_of(Anew(), where, limit)


def opened(function: Callable[[], object], inputs: Sequence[InputSpec], where: str, path: Path | None) -> Elements:
    """The samples of what a function gives.

    Raises:
        DataError: see `called` and `Elements.open`.
    """
    reading = called(function, where, path)
    return Elements.open(Stream(None, limit=limited_to()), inputs, where, reading, path)


def first_arrays(reading: Reading, where: str) -> dict[str, ArrayForm]:
    """Those of the first element, by its names; what is no array, such as boxes of several sizes, is left aside."""
    found = {}
    for _, element in reading.draw(range(1)):
        for name, value in element.items() if isinstance(element, Mapping) else ():
            with suppress(DataError):
                array = as_array(value, str(name), where)
                found[str(name)] = ArrayForm(array.shape, array.dtype)
    return found


def arrays(source: str) -> dict[str, ArrayForm]:
    """Those of the first sample that the function gives."""
    function, path = function_of(source)
    return first_arrays(called(function, source, path), source)


def _open(source: str, inputs: Sequence[InputSpec]) -> Elements:
    function, path = function_of(source)
    return opened(function, inputs, source, path)


FORM = Form(
    says="module.py:function that yields dicts or returns a Dataset or DataLoader",
    owns=lambda source: source.rpartition(":")[0].endswith(".py"),
    open=_open,
    arrays=arrays,
)
