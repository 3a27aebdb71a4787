"""A function or an object of a module of the user's own, found by the module's name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib_data.elements import Elements
from calib_data.sources import ArrayForm, Form
from calib_data.sources.function import called, first_arrays, opened
from calib_data.users_code import object_of
from calib_data.validation import InputSpec

_NAMED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def _function(source: str) -> tuple[Callable[[], object], Path | None]:
    """What gives the samples, and its file."""
    found = object_of(source, f"the data source {source}", or_else=", or give a file: module.py:function")
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
