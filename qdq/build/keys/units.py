"""In which unit an output's error is told: the recipe's `units`, and `--unit OUTPUT=UNIT,SCALE`.

units: {energy: "meV/atom,1000", forces: "meV/A,1000"}
"""

from __future__ import annotations

from collections.abc import Mapping

from engines.verify.report import Unit
from qdq.core.errors import InputError


def units_of(texts: Mapping[str, str]) -> dict[str, Unit]:
    """Output -> its unit, of texts UNIT,SCALE; without a scale the output is in that unit.

    >>> units_of({"energy": "meV/atom,1000"})["energy"].scale
    1000.0

    Raises:
        InputError: a unit without a name, or a scale that is no number above 0.
    """
    return {output: _unit(output, text) for output, text in texts.items()}


def _unit(output: str, text: str) -> Unit:
    name, _, scale = text.rpartition(",") if "," in text else (text, "", "1")
    try:
        number = float(scale)
    except ValueError:
        number = 0.0
    if not name.strip() or not 0 < number < float("inf"):
        raise InputError(
            f"The unit of output {output!r} is {text!r}: it must be UNIT or UNIT,SCALE with a number above 0, how many "
            "of that unit one of the output's own makes, as in 'meV/atom,1000' of an output in eV/atom."
        )
    return Unit(name=name.strip(), scale=number)
