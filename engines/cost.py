"""Predict what an engine costs on a GPU that need not be there: a roofline over its kernels.

    LayerTable -> bytes and type of each kernel; ONNX nodes -> its multiply-adds (as `audit` maps them)
    time = max(bytes / bandwidth, 2 * multiply-adds / peak of the consumed type) + launch
    Cost -> total, dearest kernels, rows for a terminal

A lower bound to compare engines with, not a measurement: real kernels reach 50 to 90 % of either roof, caches and
clocks are not modelled. Must not be printed without the word 'predicted'.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

import onnx

from engines.audit import audit
from engines.compiler import ShapeRange
from engines.errors import EngineError
from engines.layers import BITS, SYNCHRONIZATION, Layer, LayerTable

LAUNCH_US = 2.0  # microseconds per kernel in a stream without CUDA graphs; between 1.5 and 3 on the GPUs below
HEADERS = ("predicted us", "share", "bound", "type", "MB", "GMAC", "kernel", "ONNX nodes")


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
            raise EngineError(
                f"GPU {self.name!r}: tera_ops lacks {missing[0]}; give the dense rate of both float types."
            )
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
                near = difflib.get_close_matches(str(key), keys, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
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
    """One row of the table below."""
    return Gpu(name=name, target=target, bandwidth_gb_s=bandwidth_gb_s, tera_ops=MappingProxyType(tera_ops))


# Dense tensor-core rates with FP32 accumulation where the vendor tells them apart; float32 is TF32, which TensorRT uses
# by default, on T4 (no TF32) the FP32 cores. Datasheets that give rates with sparsity are halved.
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
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
            _row(
                "rtx4090", "sm89", 1008, float32=82.6, float16=165.2, bfloat16=165.2, int8=660.6, fp8=330.3, int4=1321.2
            ),
            # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix: 104.8 TF32, 209.5 FP16 and BF16, 419 FP8 (FP32
            # accumulation), 838 INT8, 1676 FP4, 1792 GB/s
            _row("rtx5090", "sm120", 1792, float32=104.8, float16=209.5, bfloat16=209.5, int8=838, fp8=419, fp4=1676),
        )
    }
)


def gpu_named(name: str) -> Gpu:
    """A row of `GPUS`; case, spaces, '-' and '_' do not matter.

    >>> gpu_named("RTX 4090").target
    'sm89'

    Raises:
        EngineError: not in the table.
    """
    plain = "".join(c for c in name.lower() if c.isalnum())
    if plain not in GPUS:
        near = difflib.get_close_matches(plain, GPUS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise EngineError(f"Unknown GPU {name!r}; known are {', '.join(GPUS)}, or give your own numbers.{hint}")
    return GPUS[plain]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCost:
    """One kernel. `bound` is 'bandwidth', 'compute', or 'launch' where the launch costs more than either."""

    name: str
    kind: str
    us: float
    bytes: int
    macs: int
    dtype: str
    bound: str
    onnx_nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The predicted time of one inference. `unplaced_macs` are of nodes that no kernel names: counted nowhere."""

    gpu: Gpu
    kernels: tuple[KernelCost, ...]
    unplaced_macs: int = 0

    @property
    def total_us(self) -> float:
        """Sum over the kernels."""
        return sum(k.us for k in self.kernels)

    @property
    def bytes(self) -> int:
        """Bytes read and written by all kernels."""
        return sum(k.bytes for k in self.kernels)

    def dearest(self, count: int) -> tuple[KernelCost, ...]:
        """The kernels with the longest predicted time, the dearest first; equal ones in the order of the engine."""
        return tuple(sorted(self.kernels, key=lambda k: -k.us)[:count])


def predict(
    model: Path | str | onnx.ModelProto,
    table: LayerTable,
    gpu: Gpu | str,
    *,
    shapes: Mapping[str, ShapeRange] | None = None,
) -> Cost:
    """Predicted time of every kernel of an engine.

    Args:
        model: the model that the engine was built from; external data is not needed.
        table: its layers, compiled with fixed shapes (min = opt = max) for a target of the GPU's generation.
        gpu: a name in `GPUS`, or numbers of one's own.
        shapes: the fixed shape of each dynamic input.

    Returns:
        One row per kernel in the order of the engine; waiting for another stream is none.

    Raises:
        EngineError: an unknown GPU, an engine for other targets, or one whose sizes are decided at run time.
    """
    gpu = gpu if isinstance(gpu, Gpu) else gpu_named(gpu)
    if gpu.target not in table.targets:
        raise EngineError(
            f"The engine is compiled for {', '.join(table.targets)}, but {gpu.name} is {gpu.target}: its kernels would "
            f"be others. Compile with --target {gpu.target}."
        )
    if table.bytes_moved is None:
        raise EngineError(
            "The engine has dynamic shapes, so its kernels' sizes are not known. Compile with min = opt = max."
        )
    products: dict[str, tuple[int, str]] = {}
    nodes = audit(model, table, shapes=shapes).nodes
    for node in nodes:
        macs, _ = products.get(node.kernel, (0, ""))
        products[node.kernel] = (macs + node.macs, node.consumed)
    unplaced, _ = products.pop("", (0, ""))
    kernels = tuple(
        _kernel(layer, gpu, *products.pop(layer.name, (0, "")))  # a name that comes twice multiplies once
        for layer in table.layers
        if layer.kind not in SYNCHRONIZATION
    )
    return Cost(gpu=gpu, kernels=kernels, unplaced_macs=unplaced)


def _kernel(layer: Layer, gpu: Gpu, macs: int, dtype: str) -> KernelCost:
    """The roofline of one kernel."""
    moved = layer.bytes_moved or 0
    first = next((t.dtype for t in (*layer.inputs, *layer.constants, *layer.outputs)), "float32")
    dtype = dtype or first
    transfer = moved / gpu.bandwidth_gb_s / 1e3
    compute = 2 * macs / gpu.peak(dtype)
    work = max(transfer, compute)
    bound = "launch" if gpu.launch_us > work else "compute" if compute > transfer else "bandwidth"
    return KernelCost(
        name=layer.name,
        kind=layer.kind,
        us=work + gpu.launch_us,
        bytes=moved,
        macs=macs,
        dtype=dtype,
        bound=bound,
        onnx_nodes=layer.onnx_nodes,
    )


def rows(cost: Cost, count: int = 10) -> list[tuple[str, ...]]:
    """The dearest kernels as text, a row for the others and one for the total; columns are `HEADERS`.

    Args:
        cost: of an engine.
        count: kernels to name.

    Returns:
        Rows of eight cells. A kernel of many nodes names three and how many more.
    """
    total = cost.total_us or 1.0
    shown = cost.dearest(count)

    def cells(us: float, moved: int, macs: int, *texts: str) -> tuple[str, ...]:
        bound, dtype, name, nodes = texts
        return (
            f"{us:.1f}",
            f"{us / total:.0%}",
            bound,
            dtype,
            f"{moved / 1e6:.2f}",
            f"{macs / 1e9:.3f}",
            name,
            nodes,
        )

    table = [cells(k.us, k.bytes, k.macs, k.bound, k.dtype, f"{k.kind} {k.name}", _some(k.onnx_nodes)) for k in shown]
    rest = sorted(cost.kernels, key=lambda k: -k.us)[count:]
    if rest:
        sums = sum(k.us for k in rest), sum(k.bytes for k in rest), sum(k.macs for k in rest)
        table.append(cells(*sums, "", "", f"{len(rest)} others", ""))
    whole = cost.total_us, cost.bytes, sum(k.macs for k in cost.kernels)
    table.append(cells(*whole, "", "", f"{len(cost.kernels)} kernels on {cost.gpu.name}", ""))
    return table


def _some(names: tuple[str, ...]) -> str:
    """Up to three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
