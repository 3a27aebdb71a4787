"""One of some names, or an error that names the nearest."""

from __future__ import annotations

from collections.abc import Sequence

from engines.core.errors import did_you_mean
from qdq.core.errors import InputError


def choose(value: str, allowed: Sequence[str], what: str) -> str:
    """Return `value` if it is one of `allowed`.

    Args:
        value: what the user gave.
        allowed: the names that exist.
        what: the option's name, for the message.

    Raises:
        InputError: the name is unknown; the message names the nearest one.
    """
    if value in allowed:
        return value
    hint = did_you_mean(str(value), allowed)
    raise InputError(f"Unknown {what} {value!r}: it must be one of {', '.join(allowed)}.{hint}")
