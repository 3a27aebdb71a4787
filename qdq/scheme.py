"""How tensors are to be quantized: `Spec` for one tensor, `Settings` for a whole run.

recipe or options -> Settings (validated here, trusted everywhere else) -> placement, calibration, solve.
This module must not look at a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from qdq.errors import InputError
from qdq.formats import FORMATS

SCHEMES: tuple[str, ...] = ("int8",)
CALIBRATORS: tuple[str, ...] = ("mse", "percentile", "entropy", "max", "auto")
EQUALIZERS: tuple[str, ...] = ("smoothquant", "none")
BIAS_CORRECTIONS: tuple[str, ...] = ("auto", "on", "off")
ROUNDINGS: tuple[str, ...] = ("gptq", "nearest")


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
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"Unknown {what} {value!r}: it must be one of {', '.join(allowed)}.{hint}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How one tensor is quantized.

    Attributes:
        format: a name in `qdq.formats.FORMATS`.
        axis: None for one scale per tensor, else the axis that has one scale per index.
        shift: the tensor may be moved by a constant before it is quantized, so that an asymmetric range uses all codes.
    """

    format: str
    axis: int | None = None
    shift: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown format and what is no axis or shift."""
        choose(self.format, tuple(FORMATS), "format")
        if not (self.axis is None or type(self.axis) is int) or not isinstance(self.shift, bool):
            raise InputError(f"axis is {self.axis!r}, shift {self.shift!r}: needed are an integer or none, and a flag.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides how a model is quantized, apart from the model and the samples.

    Attributes:
        scheme: which operands get which format.
        calibrator: how an activation's range is chosen from its histogram.
        percentile: percent of the values that the `percentile` calibrator keeps inside the range.
        rounding: how weights are rounded to codes.
        equalize: the formula by which input channels of a layer are balanced where that pays, or "none".
        shift: allow `Spec.shift` for activations.
        exclude: glob patterns of node names that stay in float; each must match at least one node.
        bias_correction: shift biases so that quantization does not move means; "auto" where held-out samples gain.

    Raises:
        InputError: an unknown name or a percentile outside (50, 100].
    """

    scheme: str = "int8"
    calibrator: str = "mse"
    percentile: float = 99.99
    rounding: str = "gptq"
    equalize: str = "smoothquant"
    shift: bool = True
    exclude: tuple[str, ...] = ()
    bias_correction: str = "auto"

    def __post_init__(self) -> None:
        """Validate each field."""
        choose(self.scheme, SCHEMES, "scheme")
        choose(self.calibrator, CALIBRATORS, "calibrator")
        choose(self.rounding, ROUNDINGS, "rounding")
        choose(self.bias_correction, BIAS_CORRECTIONS, "bias_correction")
        choose(self.equalize, EQUALIZERS, "equalization")
        if (
            isinstance(self.percentile, bool)
            or not isinstance(self.percentile, int | float)
            or not 50 < self.percentile <= 100
        ):
            raise InputError(
                f"percentile is {self.percentile!r}: it must be a number above 50 and at most 100, such as 99.99."
            )
        if not isinstance(self.shift, bool):
            raise InputError(f"shift is {self.shift!r}: it must be true or false.")
        if not isinstance(self.exclude, list | tuple) or not all(isinstance(p, str) and p for p in self.exclude):
            raise InputError(
                f"exclude is {self.exclude!r}: it must be a list of node name patterns, such as ['*/head/*']."
            )
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Settings:
        """Build settings from a recipe's keys.

        Raises:
            InputError: a key that is no setting, or a bad value.
        """
        names = [f.name for f in fields(cls)]
        for key in values:
            choose(str(key), names, "setting")
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks every value's type

    def to_mapping(self) -> dict[str, object]:
        """The settings as plain values, ready for JSON or YAML."""
        return {**asdict(self), "exclude": list(self.exclude)}

    def activation(self) -> Spec:
        """How this scheme quantizes the data operand of a weighted operator."""
        return Spec(format="int8", shift=self.shift)

    def weight(self, axis: int) -> Spec:
        """How this scheme quantizes a weight whose output channels lie on `axis`."""
        return Spec(format="int8", axis=axis)
