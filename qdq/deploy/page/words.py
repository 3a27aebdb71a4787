"""Figures in words with units, for the page. Must not know where they come from."""

from __future__ import annotations

import math

TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "fp4": "FP4", "fp8": "FP8"}
LOW = frozenset(("INT8", "FP8", "INT4", "FP4", "NVFP4", "W4A8"))


def time(us: float | None) -> str:
    """Microseconds for people.

    >>> time(142.24), time(10_250.0), time(None)
    ('142.2 µs', '10.25 ms', 'not known')
    """
    if us is None or not math.isfinite(us):
        return "not known"
    return f"{us:.1f} µs" if us < 10_000 else f"{us / 1000:.2f} ms"


def decibels(value: float | None) -> str:
    """A ratio; one without noise is no number.

    >>> decibels(47.27), decibels(math.inf), decibels(None)
    ('47.3 dB', 'exact', '')
    """
    if value is None:
        return ""
    if math.isnan(value):
        return "not finite"
    return f"{value:.1f} dB" if math.isfinite(value) else "exact" if value > 0 else "no signal"


def share(value: float) -> str:
    """A fraction in percent; never 100 % or 0 % where it is not.

    >>> share(0.826), share(0.99999), share(1.0), share(0.00001)
    ('82.6 %', '> 99.9 %', '100 %', '< 0.1 %')
    """
    if value in (0, 1):
        return f"{value:.0%}".replace("%", " %")
    if 0 < value < 0.001 or 0.999 < value < 1:
        return "< 0.1 %" if value < 0.5 else "> 99.9 %"
    return f"{value * 100:.1f} %"


def fraction(now: float | None, before: float | None) -> str:
    """What part one is of another.

    >>> fraction(1.0, 4.0), fraction(None, 4.0)
    ('0.25', '')
    """
    return "" if now is None or not before else f"{now / before:.2f}"


def kind(dtype: str) -> str:
    """A type as people write it.

    >>> kind("float16"), kind("int8"), kind("")
    ('FP16', 'INT8', '')
    """
    return TYPES.get(dtype, dtype.upper())


def number(value: float | None) -> float | str:
    """What a table is sorted by: finite, or nothing."""
    if value is None or math.isnan(value):
        return ""
    return round(max(min(value, 1e12), -1e12), 6)


def plural(count: int, what: str) -> str:
    """A number of things.

    >>> plural(1, "node"), plural(2, "node")
    ('1 node', '2 nodes')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"
