"""What users choose: one of some names, or values of declared types; else an error that says what is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from engines.core.documents import DocumentError, Part, check_fields
from engines.core.errors import did_you_mean
from qdq.core.errors import InputError

T = TypeVar("T", bound=Part)


def choose(value: str, allowed: Sequence[str], what: str) -> str:
    """Return `value` if it is one of `allowed`; `what` is the option's name, for the message.

    Raises:
        InputError: the name is unknown; the message names the nearest one.
    """
    if value in allowed:
        return value
    hint = did_you_mean(str(value), allowed)
    raise InputError(f"Unknown {what} {value!r}: it must be one of {', '.join(allowed)}.{hint}")


def checked(part: Part) -> None:
    """Hold the fields of a declared model to their types.

    Raises:
        InputError: says which field is wrong, what is there and what is needed.
    """
    try:
        check_fields(part)
    except DocumentError as error:
        raise InputError(f"{error}.") from None


def converted(values: Mapping[str, object], kind: type[T], what: str) -> T:
    """Plain values, as a file or the command line gives them, as a declared model that checks its own fields.

    `what` is what messages call a key.

    Raises:
        InputError: an unknown key, whose nearest known one is named, or a value of another type.
    """
    for key in values:
        choose(str(key), kind.__struct_fields__, what)
    return kind(**values)
