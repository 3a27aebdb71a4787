"""GPUs that times are predicted for: one row each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from engines.backends.layers import BITS
from engines.core.errors import EngineError, did_you_mean

LAUNCH_US = 2.0  # microseconds per kernel in a stream without CUDA graphs; between 1.5 and 3 on the GPUs below


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The roofs of one GPU.

    Attributes:
        name: as in `GPUS`, or the user's own.
        target: what to compile for, like 'sm89'.
        bandwidth_gb_s: of its memory, 10^9 bytes a second.
        tera_ops: data type -> dense rate in 10^12 operations a second, a multiply-add being two; a type that is absent
            runs at the rate of float16, or of float32 for bfloat16.
        launch_us: of one kernel.
    """

    name: str
    target: str
    bandwidth_gb_s: float
    tera_ops: Mapping[str, float] = field(hash=False)
    launch_us: float = LAUNCH_US

    def __post_init__(self) -> None:
        """Refuses numbers that predict nothing.

        Raises:
            EngineError: an unknown type, a rate that is not above zero, or no rate for float32 and float16.
        """
        if unknown := sorted(set(self.tera_ops) - set(BITS)):
            raise EngineError(f"GPU {self.name!r}: unknown data type {unknown[0]!r}; known are {', '.join(BITS)}.")
        needed = {"bandwidth_gb_s": self.bandwidth_gb_s, **{f"tera_ops {k}": v for k, v in self.tera_ops.items()}}
        for what, value in needed.items():
            if not (math.isfinite(value) and value > 0):
                raise EngineError(f"GPU {self.name!r}: {what} is {value}; it must be above 0.")
        if missing := [t for t in ("float32", "float16") if t not in self.tera_ops]:
            what = f"tera_ops lacks {missing[0]}"
            raise EngineError(f"GPU {self.name!r}: {what}; give the dense rate of both float types.")
        if not self.launch_us >= 0:
            raise EngineError(f"GPU {self.name!r}: launch_us is {self.launch_us}; it must be 0 or more.")

    def __reduce__(self) -> tuple[object, ...]:
        """How to pickle it: a read-only mapping cannot be."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Gpu.from_mapping, ({**values, "tera_ops": dict(self.tera_ops)},)

    def peak(self, dtype: str) -> float:
        """Operations a microsecond at which products of a type run."""
        other = "float32" if dtype == "bfloat16" or BITS.get(dtype, 32) >= 32 else "float16"
        return self.tera_ops.get(dtype, self.tera_ops[other]) * 1e6

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Gpu:
        """A user's own GPU from a recipe: name, target, bandwidth_gb_s, tera_ops {type: rate}, launch_us.

        Raises:
            EngineError: an unknown or missing key, or a value of the wrong type.
        """
        keys = ("name", "target", "bandwidth_gb_s", "tera_ops", "launch_us")
        for key in values:
            if key not in keys:
                hint = did_you_mean(str(key), keys)
                raise EngineError(f"Unknown key {key!r} of a GPU; it has {', '.join(keys)}.{hint}")
        try:
            rates = values["tera_ops"]
            if not isinstance(rates, Mapping):
                raise TypeError("tera_ops is no mapping of data types to rates")
            return cls(
                name=str(values["name"]),
                target=str(values["target"]),
                bandwidth_gb_s=_number(values["bandwidth_gb_s"]),
                tera_ops=MappingProxyType({str(k): _number(v) for k, v in rates.items()}),
                launch_us=_number(values.get("launch_us", LAUNCH_US)),
            )
        except (KeyError, TypeError) as error:
            raise EngineError(
                f"Cannot read a GPU: {error}. Needed: name, target, bandwidth_gb_s and tera_ops, such as "
                "{float32: 82.6, float16: 165.2, int8: 660.6}."
            ) from error


def _number(value: object) -> float:
    """A number as float; text and booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _row(name: str, target: str, bandwidth_gb_s: float, **tera_ops: float) -> Gpu:
    return Gpu(name=name, target=target, bandwidth_gb_s=bandwidth_gb_s, tera_ops=MappingProxyType(tera_ops))


# Dense tensor-core rates with FP32 accumulation where the vendor tells them apart; float32 is TF32, which TensorRT uses
# by default, on T4 (no TF32) the FP32 cores. Datasheets that give rates with sparsity are halved.
_ROWS = (
    # NVIDIA T4 datasheet (2019): 8.1 FP32, 65 FP16, 130 INT8, 260 INT4, 320 GB/s
    _row("t4", "sm75", 320, float32=8.1, float16=65, int8=130, int4=260),
    # NVIDIA A10 datasheet (2021): 62.5 TF32, 125 FP16 and BF16, 250 INT8, 500 INT4, 600 GB/s
    _row("a10", "sm86", 600, float32=62.5, float16=125, bfloat16=125, int8=250, int4=500),
    # NVIDIA A100 40 GB datasheet (2020): 156 TF32, 312 FP16 and BF16, 624 INT8, 1248 INT4, 1555 GB/s
    _row("a100", "sm80", 1555, float32=156, float16=312, bfloat16=312, int8=624, int4=1248),
    # NVIDIA L4 datasheet (2023), halved: 120 TF32, 242 FP16 and BF16, 485 INT8 and FP8 with sparsity, 300 GB/s
    _row("l4", "sm89", 300, float32=60, float16=121, bfloat16=121, int8=242.5, fp8=242.5),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: 82.6 TF32, 165.2 FP16 and BF16, 330.3 FP8 (FP32
    # accumulation), 660.6 INT8, 1321.2 INT4, 1008 GB/s
    _row("rtx4090", "sm89", 1008, float32=82.6, float16=165.2, bfloat16=165.2, int8=660.6, fp8=330.3, int4=1321.2),
    # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix: 104.8 TF32, 209.5 FP16 and BF16, 419 FP8 (FP32
    # accumulation), 838 INT8, 1676 FP4, 1792 GB/s
    _row("rtx5090", "sm120", 1792, float32=104.8, float16=209.5, bfloat16=209.5, int8=838, fp8=419, fp4=1676),
)
GPUS: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _ROWS})


def gpu_named(name: str) -> Gpu:
    """A row of `GPUS`; case, spaces, '-' and '_' do not matter.

    >>> gpu_named("RTX 4090").target
    'sm89'

    Raises:
        EngineError: not in the table.
    """
    plain = "".join(c for c in name.lower() if c.isalnum())
    if plain not in GPUS:
        hint = did_you_mean(plain, GPUS)
        raise EngineError(f"Unknown GPU {name!r}; known are {', '.join(GPUS)}, or give your own numbers.{hint}")
    return GPUS[plain]
