"""GPUs that times are predicted for: a row of `engines.cost.datasheets`, or a user's own from a recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Literal, cast, get_args

from engines.backends.layers import BITS
from engines.core.errors import EngineError, did_you_mean
from engines.cost.datasheets import KINDS, ROWS, TENSORRT_ONLY, USUAL

Accumulation = Literal["float16", "float32"]
RATES = (*BITS, "fp32_cores", "float16_accumulating")
_NUMBERS = ("sms", "boost_mhz", "base_mhz", "l2_mb", "bandwidth_gb_s", "watts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured on a GPU, each where it is known; it takes the place of what is predicted.

    Attributes:
        start_us: of a small kernel that waits for the one before it.
        product_start_us: of a small product, beyond that.
        bandwidth_gb_s: that one pointwise kernel reaches from memory, 10^9 bytes a second.
        l2_gb_s: that one pointwise kernel reaches from the L2 cache at the boost clock, 10^9 bytes a second.
        tera_ops: data type -> 10^12 operations a second of large products (4096^3), once begun, over seconds: the
            sustained clock.
        boost_tera_ops: the same over some 50 ms: the boost clock.
        factor: measured / predicted time of engines, multiplied into every prediction.
        start_factor: the same of starts of kernels and products, in the place of `factor`; None where it is the same.
    """

    start_us: float | None = None
    product_start_us: float | None = None
    bandwidth_gb_s: float | None = None
    l2_gb_s: float | None = None
    tera_ops: Mapping[str, float] = field(default_factory=dict, hash=False)
    boost_tera_ops: Mapping[str, float] = field(default_factory=dict, hash=False)
    factor: float | None = None
    start_factor: float | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that predict nothing.

        Raises:
            EngineError: an unknown type, or a number that is not above zero (a start may be zero).
        """
        for what in ("tera_ops", "boost_tera_ops"):
            object.__setattr__(self, what, _rates(f"measured {what}", getattr(self, what)))
        for what in ("bandwidth_gb_s", "l2_gb_s", "factor", "start_factor"):
            if getattr(self, what) is not None:
                _above_zero(f"measured {what}", getattr(self, what))
        for what in ("start_us", "product_start_us"):
            if (value := getattr(self, what)) is not None and not (math.isfinite(value) and value >= 0):
                raise EngineError(f"measured {what} is {value}; it must be 0 or more.")

    def __reduce__(self) -> tuple[object, ...]:
        """How to pickle it: a read-only mapping cannot be."""
        return Measured.from_mapping, (self.to_mapping(),)

    def to_mapping(self) -> dict[str, float | dict[str, float]]:
        """What was measured, as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items() if v or v == 0}

    @classmethod
    def from_mapping(cls, values: object) -> Measured:
        """What `to_mapping` gives.

        Raises:
            EngineError: an unknown key, or a value of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise EngineError(f"measured is {values!r}; it must be a mapping of what was measured to numbers.")
        keys = tuple(f.name for f in fields(cls))
        _known(values, keys, "what is measured of a GPU")
        found = {
            k: _rates(f"measured {k}", v) if "ops" in k else _number(f"measured {k}", v) for k, v in values.items()
        }
        return cls(**found)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as in `GPUS`, or the user's own.
        target: what to compile for, like 'sm89'.
        sms: streaming multiprocessors.
        boost_mhz: clock that `tera_ops` holds at.
        base_mhz: clock that it does not fall below under load.
        l2_mb: of the L2 cache, 2^20 bytes.
        bandwidth_gb_s: of its memory, 10^9 bytes a second.
        watts: of the board; None where they are not known.
        tera_ops: data type -> dense rate in 10^12 operations a second at boost, a multiply-add being two. 'float32' is
            TF32 where the GPU has it, 'fp32_cores' is FP32 without tensor cores; 'float16' accumulates in FP32,
            'float16_accumulating' in FP16. A type that is absent runs at the rate of float16, or of float32 for wider.
        accumulation: assumed for FP16 products, 'float16' or 'float32'. On GeForce the former is twice as fast;
            TensorRT uses it there (VGG-16 on an RTX 3090 runs above the other's peak), of TensorRT-RTX it is not known.
        measured: what was measured on one; None where nothing was.
        kind: one of `datasheets.KINDS`, which says what usually compiles for it; None where it is not known.
    """

    name: str
    target: str
    sms: int
    boost_mhz: float
    base_mhz: float
    l2_mb: float
    bandwidth_gb_s: float
    watts: float | None = None
    tera_ops: Mapping[str, float] = field(hash=False)
    accumulation: Accumulation = "float16"
    measured: Measured | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that predict nothing.

        Raises:
            EngineError: an unknown type, kind or accumulation, a number that is not above zero, a base clock above the
                boost clock, or no rate for float32 and float16.
        """
        where = f"GPU {self.name!r}: "
        for what in _NUMBERS:
            if getattr(self, what) is not None:
                _above_zero(f"{where}{what}", getattr(self, what))
        rates = dict(_rates(f"{where}tera_ops", self.tera_ops))
        if missing := [t for t in ("float32", "float16") if t not in rates]:
            raise EngineError(f"{where}tera_ops lacks {missing[0]}; give the dense rate of both float types.")
        rates.setdefault("fp32_cores", rates["float32"])
        rates.setdefault("float16_accumulating", rates["float16"])
        object.__setattr__(self, "tera_ops", MappingProxyType(rates))
        if self.base_mhz > self.boost_mhz:
            raise EngineError(f"{where}base_mhz {self.base_mhz:g} is above boost_mhz {self.boost_mhz:g}.")
        if self.accumulation not in get_args(Accumulation):
            known = " or ".join(get_args(Accumulation))
            raise EngineError(f"{where}accumulation is {self.accumulation!r}; it must be {known}.")
        if self.kind not in (*KINDS.values(), None):
            raise EngineError(f"{where}kind is {self.kind!r}; it must be {', '.join(KINDS.values())}.")

    def __reduce__(self) -> tuple[object, ...]:
        """How to pickle it: a read-only mapping cannot be."""
        return Gpu.from_mapping, (self.to_mapping(),)

    @property
    def tensorrt_only(self) -> bool:
        """Whether TensorRT compiles for it and TensorRT-RTX does not."""
        return self.target in TENSORRT_ONLY

    @property
    def notes(self) -> tuple[str, ...]:
        """What who reads a predicted time of it must know."""
        found = []
        if self.target == "sm75":
            found.append(
                "sm75 is a float target of TensorRT-RTX: it compiles no FP32 matrix product for it, and nearly every "
                "product runs in FP16 whatever is quantized"
            )
        if self.tensorrt_only:
            found.append(f"TensorRT-RTX does not compile for {self.target}, TensorRT does")
        if self.other_accumulation():
            wide, narrow = self.tera_ops["float16"], self.tera_ops["float16_accumulating"]
            found.append(
                f"FP16 products are assumed to accumulate in {'FP16' if self.accumulation == 'float16' else 'FP32'} "
                f"({narrow:g} TFLOP/s in FP16, {wide:g} in FP32)"
            )
        return tuple(found)

    def peak(self, dtype: str) -> float:
        """Operations a microsecond at which products of a type run, by the assumed accumulation."""
        if dtype == "float16" and self.accumulation == "float16":
            dtype = "float16_accumulating"
        other = "float32" if dtype == "bfloat16" or BITS.get(dtype, 32) >= 32 else "float16"
        return self.tera_ops[dtype if dtype in self.tera_ops else other] * 1e6

    def other_accumulation(self) -> Gpu | None:
        """The same GPU under the other assumption for FP16 products; None where their rates are equal."""
        if self.tera_ops["float16"] == self.tera_ops["float16_accumulating"]:
            return None
        return replace(self, accumulation="float32" if self.accumulation == "float16" else "float16")

    def to_mapping(self) -> dict[str, object]:
        """Plain values, as a recipe's `gpu` holds them; `from_mapping` reads them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"tera_ops": dict(self.tera_ops), "measured": self.measured and self.measured.to_mapping()}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Gpu:
        """A user's own GPU from a recipe.

        Args:
            values: the attributes above, `tera_ops` {type: rate} and `measured` {what: number} as mappings; or
                `like`, a name in `GPUS`, and what differs from it: rates follow SMs and clock unless given. With
                neither `like` nor SMs, clocks and L2, the nearest row of the target in rates and bandwidth lends them,
                SMs in proportion to the rate of float16; without such a row they are refused. `launch_us` is the
                former name of `measured: {start_us: ..}`.

        Raises:
            EngineError: an unknown or missing key, or a value of the wrong type.
        """
        keys = tuple(f.name for f in fields(cls))
        _known(values, (*keys, "like", "launch_us"), "a GPU")
        own = {key: value for key, value in values.items() if value is not None}
        given: dict[str, object] = {k: _number(k, own[k]) for k in _NUMBERS if k in own}
        given |= {k: str(own[k]) for k in ("name", "target", "accumulation", "kind") if k in own}
        if "tera_ops" in own:
            given["tera_ops"] = _rates("tera_ops", own["tera_ops"])
        measured = Measured.from_mapping(own["measured"]) if "measured" in own else None
        if "launch_us" in own:
            measured = replace(measured or Measured(), start_us=_number("launch_us", own["launch_us"]))
        completed = _alike(gpu_named(str(own["like"])), given) if "like" in own else _completed(given)
        return cls(**{**completed, "sms": round(cast(float, completed["sms"])), "measured": measured})  # type: ignore[arg-type]


def _known(values: Mapping[str, object], keys: tuple[str, ...], what: str) -> None:
    """Refuses a key that is none of them."""
    for key in values:
        if key not in keys:
            hint = did_you_mean(str(key), keys)
            raise EngineError(f"Unknown key {key!r} of {what}; it has {', '.join(keys)}.{hint}")


def _number(what: str, value: object) -> float:
    """A number as float; text and booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EngineError(f"Cannot read a GPU: {what} is {value!r}, which is no number.")
    return float(value)


def _above_zero(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise EngineError(f"{what} is {value}; it must be above 0.")


def _rates(what: str, values: object) -> Mapping[str, float]:
    """Rates by data type, read-only."""
    if not isinstance(values, Mapping):
        raise EngineError(f"Cannot read a GPU: {what} is {values!r}, which is no mapping of data types to rates.")
    if unknown := sorted(set(map(str, values)) - set(RATES)):
        raise EngineError(f"{what}: unknown data type {unknown[0]!r}; known are {', '.join(RATES)}.")
    rates = {str(kind): _number(f"{what} of {kind}", rate) for kind, rate in values.items()}
    for kind, rate in rates.items():
        _above_zero(f"{what} {kind}", rate)
    return MappingProxyType(rates)


def _alike(row: Gpu, given: Mapping[str, object]) -> dict[str, object]:
    """A row with what is given in its place; rates and base clock that are not given follow SMs and clock."""
    if given.get("target", row.target) != row.target:
        raise EngineError(f"A GPU like {row.name} has the target {row.target}, not {given['target']!r}. Leave one out.")
    values = {**row.to_mapping(), **given}
    clock = cast(float, values["boost_mhz"]) / row.boost_mhz
    size = clock * cast(float, values["sms"]) / row.sms
    rates = {kind: rate * size for kind, rate in row.tera_ops.items()}
    base = given.get("base_mhz", row.base_mhz * min(clock, 1.0))
    return {**values, "base_mhz": base, "tera_ops": {**rates, **cast(Mapping[str, float], given.get("tera_ops", {}))}}


def _completed(given: Mapping[str, object]) -> dict[str, object]:
    """What is given, with what is missing lent by the nearest row of its target.

    Raises:
        EngineError: something is missing that no row can lend.
    """
    if missing := [key for key in ("name", "target", "bandwidth_gb_s", "tera_ops") if key not in given]:
        raise EngineError(
            f"Cannot read a GPU: {missing[0]!r} is missing. Needed: `like` with the name of a known GPU, or name, "
            "target, bandwidth_gb_s and tera_ops, such as {float32: 82.6, float16: 165.2, int8: 660.6}."
        )
    lent = ("sms", "boost_mhz", "base_mhz", "l2_mb")
    if not (missing := [key for key in lent if key not in given]):
        return dict(given)
    rates = cast(Mapping[str, float], given["tera_ops"])
    alike = [row for row in GPUS.values() if row.target == given["target"]]
    if not alike or "float16" not in rates:
        which = (
            f"no GPU of target {given['target']!r} is known to take it from" if not alike else "float16 is missing too"
        )
        raise EngineError(f"Cannot read a GPU: {missing[0]!r} is missing, and {which}. Give {', '.join(lent)} as well.")
    _above_zero("bandwidth_gb_s", cast(float, given["bandwidth_gb_s"]))
    row = min(alike, key=lambda gpu: _distance(gpu, cast(float, given["bandwidth_gb_s"]), rates))
    values = {**row.to_mapping(), **given}
    for key in {"watts", "kind"} - set(given):
        values.pop(key, None)
    if "boost_mhz" in given and "base_mhz" not in given:
        values["base_mhz"] = row.base_mhz * min(1.0, cast(float, given["boost_mhz"]) / row.boost_mhz)
    if "sms" not in given:
        per_sm = row.tera_ops["float16"] / row.sms / row.boost_mhz * cast(float, values["boost_mhz"])
        values["sms"] = max(1, round(rates["float16"] / per_sm))
    share = rates["float16"] / row.tera_ops["float16"]
    filled = {kind: row.tera_ops[kind] * share for kind in ("fp32_cores", "float16_accumulating")}
    return {**values, "tera_ops": {**filled, **rates}}


def _distance(row: Gpu, bandwidth_gb_s: float, rates: Mapping[str, float]) -> float:
    """How far a row is from a user's numbers: the sum of the logarithms of their ratios."""
    pairs = [(row.bandwidth_gb_s, bandwidth_gb_s), *((row.tera_ops[k], rates[k]) for k in rates if k in row.tera_ops)]
    return sum(abs(math.log(a / b)) for a, b in pairs)


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        row.name: Gpu(
            **{f.name: getattr(row, f.name) for f in fields(row) if f.name != "source"},
            accumulation="float16" if row.tera_ops["float16_accumulating"] > row.tera_ops["float16"] else "float32",
        )
        for row in ROWS
    }
)


def gpu_named(name: str) -> Gpu:
    """A row of `GPUS`; case, spaces, '-' and '_' do not matter.

    >>> gpu_named("RTX 4090").target
    'sm89'

    Raises:
        EngineError: not in the table.
    """
    plain = {_plain(known): known for known in GPUS}
    if _plain(name) not in plain:
        hint = did_you_mean(name.lower(), GPUS)
        raise EngineError(f"Unknown GPU {name!r}; known are {', '.join(GPUS)}, or give your own numbers.{hint}")
    return GPUS[plain[_plain(name)]]


def usual_gpu(target: str) -> Gpu | None:
    """The row that stands for a generation where no GPU is named; None for a generation without one."""
    return GPUS.get(USUAL.get(target, ""))


def _plain(name: str) -> str:
    """Letters and digits, without the words that a driver puts around a name ('NVIDIA GeForce RTX 4090 Laptop GPU')."""
    words = re.split(r"[\s_-]+", name.lower())
    return "".join(
        c for word in words if word not in ("nvidia", "geforce", "tesla", "gpu") for c in word if c.isalnum()
    )
