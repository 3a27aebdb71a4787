"""A function or an object of a module of the user's own, found by the module's name."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib_data.elements import Elements
from calib_data.sources import ArrayForm, Form
from calib_data.sources.function import called, first_arrays, opened
from calib_data.users_code import users_code
from calib_data.validation import DataError, InputSpec

_NAMED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def object_of(source: str) -> Any:
    """What `package.module:name` names; the current folder is searched first, as by `python -m`.

    Raises:
        DataError: there is no such module or name, a package that it needs is missing, or importing it fails.
    """
    module_name, _, name = source.partition(":")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        with users_code(None, f"Cannot import {module_name}, of the data source {source}"):
            found: Any = importlib.import_module(module_name)
    except DataError as error:
        lost = getattr(error.__cause__, "name", None) if isinstance(error.__cause__, ModuleNotFoundError) else None
        if lost is None:
            raise
        if f"{module_name}.".startswith(f"{lost}."):
            raise DataError(
                f"No module {lost!r} for the data source {source}: neither in the current folder nor installed. Run "
                "in the folder that the module's name starts from, or give a file: module.py:function."
            ) from None
        raise DataError(
            f"Cannot import {module_name}, of the data source {source}: it needs {lost}, which is not installed: "
            f"pip install {lost.partition('.')[0]}."
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            there = ", ".join(n for n in vars(found) if not n.startswith("_")) if hasattr(found, "__dict__") else "none"
            raise DataError(f"No {part!r} in {module_name}, of the data source {source}: it has {there[:300]}.")
        found = getattr(found, part)
    return found


def _function(source: str) -> tuple[Callable[[], object], Path | None]:
    """What gives the samples, and its file."""
    found = object_of(source)
    file = getattr(sys.modules.get(source.partition(":")[0]), "__file__", None)
    path = Path(file) if file else None
    return (found if _is_function(found) else lambda: found), path


def _is_function(found: Any) -> bool:
    """Whether it is called for samples: a function or a class; a Dataset that can be called too is none."""
    return callable(found) and not (hasattr(type(found), "__getitem__") or hasattr(type(found), "__iter__"))


def _open(source: str, inputs: Sequence[InputSpec]) -> Elements:
    function, path = _function(source)
    return opened(function, inputs, source, path)


def arrays(source: str) -> dict[str, ArrayForm]:
    """Those of the first sample."""
    function, path = _function(source)
    return first_arrays(called(function, source, path), source)


FORM = Form(
    says="package.module:name of such a function, a Dataset or a DataLoader",
    owns=lambda source: _NAMED.fullmatch(source) is not None and not Path(source).exists(),
    open=_open,
    arrays=arrays,
    last=True,
)
