"""What a run is to do, apart from the model and the data: a YAML file, the command line's options, or both.

recipe.yaml -> mapping -> options given on the command line replace keys -> `Recipe`, valid from then on.
A key is the name of the option with underscores. It must not look at a model or load a runtime.

    scheme: int8
    calibrator: entropy
    exclude: ["*/head/*"]
    target: [sm86, sm89]
    shape: ["image:1x1x32x32x32:1x1x64x64x64:1x1x96x96x96"]
    min_sqnr_db: 20
    gpu: [a10, {name: edge, target: sm89, bandwidth_gb_s: 288, tera_ops: {float32: 22, float16: 88, int8: 353}}]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from engines.backends.backend import DEFAULT, backends
from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.plan.settings import Settings

UNQUANTIZED_TYPES = ("auto", "fp16", "bf16", "fp32")
TUNES = ("placement", "rewrites", "off")
TIME_LIMIT_S = 110.0
LIMITS: Mapping[str, tuple[float, float]] = {
    "min_sqnr_db": (-300.0, 300.0),
    "min_cosine": (-1.0, 1.0),
    "min_dice": (0.0, 1.0),
    "min_top1": (0.0, 1.0),
}
"""The limits that decide the exit code, each with the range of values that make sense."""

_SHAPE = r"\d+(?:x\d+)*"
_SHAPE_OPTION = re.compile(rf"(?P<name>.+?):(?:(?P<fixed>{_SHAPE})|(?P<range>{_SHAPE}:{_SHAPE}:{_SHAPE}))")


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
        parts = (match["range"] or ":".join([match["fixed"]] * 3)).split(":")
        low, usual, high = (tuple(int(size) for size in part.split("x")) for part in parts)
        if not len(low) == len(usual) == len(high) or any(
            not 1 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True)
        ):
            raise InputError(
                f"The shape {text!r} is no range: min, opt and max need one rank, and 1 <= min <= opt <= max in every "
                "dimension."
            )
        return cls(name=match["name"], min=low, opt=usual, max=high)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        shapes = ["x".join(map(str, shape)) for shape in (self.min, self.opt, self.max)]
        return ":".join([self.name, *(shapes[:1] if len(set(shapes)) == 1 else shapes)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings, the float type of what `deploy` leaves unquantized, what to compile for, and the limits to pass.

    Attributes:
        settings: how to quantize.
        unquantized_type: float type of what is not quantized; "auto" is that of a tuned plan (FP16, or FP32 where that
            is faster), else FP16.
        tune: what is chosen by compiled results: 'placement' (rewrites, and which nodes are quantized at all),
            'rewrites' (everything the rules want is quantized), or 'off'. By default placement for the scheme int8; who
            asks for another wants a smaller model, and gets rewrites.
        time_limit_s: seconds for that choice.
        gpus: to predict times for, names in `engines.cost.GPUS` or mappings that `engines.cost.Gpu` can be made of;
            none for the usual one of each target.
        targets: to compile for.
        backend: that compiles, a name in `engines.backends`.
        shapes: of dynamic inputs.
        limits: keys of `LIMITS`.
    """

    settings: Settings = field(default_factory=Settings)
    unquantized_type: str = "auto"
    tune: str = "placement"
    time_limit_s: float = TIME_LIMIT_S
    gpus: tuple[str | Mapping[str, object], ...] = ()
    targets: tuple[str, ...] = ("sm89",)
    backend: str = DEFAULT
    shapes: tuple[ShapeOption, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Recipe:
        """The recipe in plain values, as YAML holds them.

        Raises:
            InputError: an unknown key or value; the message names the nearest key.
        """
        setting_keys = [f.name for f in fields(Settings)]
        keys = [*setting_keys, "unquantized_type", "tune", "time_limit", "gpu", "target", "backend", "shape", *LIMITS]
        values = {"unquantized_type" if k == "rest" else k: v for k, v in values.items()}  # `rest`: its older name
        for key in values:
            choose(str(key), keys, "recipe key")
        words = {True: "on", False: "off"}  # YAML reads on and off as booleans
        values = {
            k: words[v] if k in ("tune", "bias_correction") and isinstance(v, bool) else v for k, v in values.items()
        }
        gpus = values.get("gpu", [])
        settings = Settings.from_mapping({k: v for k, v in values.items() if k in setting_keys})
        tune = "placement" if settings.scheme == "int8" else "rewrites"
        return cls(
            settings=settings,
            unquantized_type=choose(
                str(values.get("unquantized_type", "auto")), UNQUANTIZED_TYPES, "type for what is not quantized"
            ),
            tune=choose(str(values.get("tune", tune)), TUNES, "way to tune"),
            time_limit_s=_seconds(values.get("time_limit", TIME_LIMIT_S)),
            gpus=tuple(g if isinstance(g, Mapping) else str(g) for g in (gpus if isinstance(gpus, list) else [gpus])),
            targets=tuple(_texts("target", values.get("target", ["sm89"]))),
            backend=choose(str(values.get("backend", DEFAULT)), tuple(backends()), "backend"),
            shapes=tuple(ShapeOption.parse(text) for text in _texts("shape", values.get("shape", []))),
            limits={key: _limit(key, values[key]) for key in LIMITS if values.get(key) is not None},
        )


def read_recipe(path: Path | str) -> dict[str, object]:
    """The keys of a recipe file, not yet checked.

    Raises:
        InputError: the file is unreadable, no YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the recipe {path}: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The recipe {path} is not YAML: {' '.join(str(error).split())}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(
            f"The recipe {path} holds a {type(values).__name__}; it needs lines such as 'scheme: int8', one per option."
        )
    return {str(key): value for key, value in values.items()}


def _texts(key: str, value: object) -> Sequence[str]:
    """A list of texts; one text stands for a list of one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{key} is {value!r}: it must be a text or a list of texts.")
    return texts


def _seconds(value: object) -> float:
    """The time limit."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise InputError(f"time_limit is {value!r}: it must be a number of seconds, 0 or more.")
    return float(value)


def _limit(key: str, value: object) -> float:
    """A limit inside its range."""
    low, high = LIMITS[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        between = f" from {low:g} to {high:g}" if math.isfinite(high) else ""
        raise InputError(f"{key} is {value!r}: it must be a number{between}.")
    return float(value)
