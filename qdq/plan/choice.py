"""What one node may become in a plan that mixes precisions: a scheme with its granularity, or a float type.

text, as in `Settings.overrides` -> `Choice`. It must not look at a model.

    int8, fp8, w4a8 ...     a scheme
    int4:block=32           with blocks of its own, or channel or tensor
    int8:shift=off          with symmetric codes
    float                   not quantized, in the type that all unquantized nodes have
    fp32                    not quantized, and in FP32 where the others are FP16 or BF16
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.plan.scheme import SCHEMES, Scheme

FLOAT, FP32 = "float", "fp32"
FLOATS = {name: Scheme(name=name, data=None, weight="", unblocked="", convolution=None) for name in (FLOAT, FP32)}
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One choice.

    Attributes:
        scheme: a name in `SCHEMES` or `FLOATS`.
        block: as `Settings.block`; None for that of the settings.
        shift: as `Settings.shift`; None for that of the settings.
    """

    scheme: str
    block: int | str | None = None
    shift: bool | None = None

    @property
    def row(self) -> Scheme:
        """What it does to a node."""
        return FLOATS.get(self.scheme) or SCHEMES[self.scheme]

    @property
    def given(self) -> tuple[str, ...]:
        """The settings that it has of its own."""
        return tuple(name for name in ("block", "shift") if getattr(self, name) is not None)

    @property
    def quantizes(self) -> bool:
        """Whether it is a scheme."""
        return self.scheme not in FLOATS


@lru_cache(maxsize=1024)
def choice(text: str) -> Choice:
    """Read one.

    Raises:
        InputError: an unknown scheme or option, or a float type with options.
    """
    name, *options = text.split(":")
    choose(name, (*SCHEMES, *FLOATS), "scheme")
    given = dict[str, str]()
    for option in options:
        key, equals, value = option.partition("=")
        choose(key, ("block", "shift"), f"option of {name}")
        if not equals or not value or key in given:
            raise InputError(f"{text!r}: an option is KEY=VALUE, once each, as in int4:block=32 or int8:shift=off.")
        given[key] = value
    if given and name in FLOATS:
        raise InputError(f"{text!r}: {name} is not quantized, so it has neither block nor shift. Leave them out.")
    text = given.get("block", "")
    block = int(text) if text.isdecimal() else text or None
    shift = _SWITCH[choose(given["shift"], tuple(_SWITCH), "shift")] if "shift" in given else None
    return Choice(scheme=name, block=block, shift=shift)
