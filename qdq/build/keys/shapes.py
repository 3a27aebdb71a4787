"""The shape of an input, and the value at which one is held, as a user writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError
from qdq.core.errors import InputError
from qdq.model.model import Held

_SHAPE = r"\d{1,18}(?:x\d{1,18})*"
_SHAPE_OPTION = re.compile(rf"(?P<name>.+?):(?P<shapes>{_SHAPE}(?::{_SHAPE}:{_SHAPE})?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeOption:
    """The smallest, the usual and the largest shape of one input, as a user wrote them."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> ShapeOption:
        """Read 'name:shape' or 'name:min:opt:max', each shape like 1x3x224x224. A name may hold colons.

        >>> ShapeOption.parse("input:0:1x3:2x3:4x3").max
        (4, 3)

        Raises:
            InputError: another form, or shapes that are no range.
        """
        match = _SHAPE_OPTION.fullmatch(text)
        if not match:
            raise InputError(
                f"Cannot read the shape {text!r}: it must be name:shape or name:min:opt:max, with shapes such as "
                "1x1x64x64x64."
            )
        try:
            found = ShapeRange.parse(match["shapes"])
        except BuildError:
            found = None
        if found is None or 0 in found.min:
            raise InputError(
                f"The shape {text!r} is no range: min, opt and max need one rank, and 1 <= min <= opt <= max in every "
                "dimension."
            )
        return cls(name=match["name"], min=found.min, opt=found.opt, max=found.max)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{self.name}:{ShapeRange(min=self.min, opt=self.opt, max=self.max)}"


def held_input(text: str) -> tuple[str, Held]:
    """An input and its value, of NAME=VALUE; a value is true, false or an integer.

    >>> held_input("rate=16000"), held_input("use=cache=true")
    (('rate', 16000), ('use=cache', True))

    Raises:
        InputError: another form.
    """
    name, _, value = text.rpartition("=")
    words = {"true": True, "false": False}
    if not name or not (value.lower() in words or re.fullmatch(r"-?\d{1,19}", value)):
        raise InputError(
            f"Cannot read what to hold, {text!r}: it must be NAME=VALUE, the name of an input and an integer, true or "
            "false, such as rate=16000."
        )
    return name, words[value.lower()] if value.lower() in words else int(value)
