"""A command line as it may be kept: options and values, files by their names, and no place of data at all.

click's context -> `command_of` -> words. Must not keep a folder: names of folders often are those of patients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Options whose values name data, or where results of them lie -> what stands for the value.
HIDDEN: Mapping[str, str] = {
    "data": "DATA",
    "evaluation": "EVALUATION",
    "text": "TEXT",
    "out": "OUT",
    "case_key": "KEY",
    "preprocess": "PREPROCESSING",
    "labels": "LABELS",
    "log_file": "LOG",
    "cluster": "CLUSTER",
}


def command_of(context: Any) -> tuple[str, ...]:
    """The words of a verb, of its `click.Context`: what was given on the command line, in the order of its options."""
    words = ["qdq", str(context.info_name)]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE":
            words += _words(parameter, context.params.get(parameter.name))
    return tuple(words)


def _words(parameter: Any, value: Any) -> Iterator[str]:
    """An option with its values, or an argument."""
    is_option = parameter.param_type_name == "option"
    name = max((*parameter.opts, *parameter.secondary_opts), key=len)
    if isinstance(value, bool):
        yield next((o for o in parameter.secondary_opts if not value), max(parameter.opts, key=len))
        return
    for one in value if isinstance(value, list | tuple) else (value,):
        if is_option:
            yield name
        yield HIDDEN.get(str(parameter.name)) or _kept(one)


def _kept(value: Any) -> str:
    """A value; of a path the name alone. Names of nodes look like paths, and lead nowhere."""
    text = str(value)
    place = os.path.dirname(text)
    named = isinstance(value, os.PathLike) or (place not in ("", os.sep) and os.path.isdir(place))
    return Path(text).name if named else text
