"""Predict what an engine costs on a GPU that need not be there: a roofline over its kernels.

    LayerTable -> bytes and type of each kernel; ONNX nodes -> its multiply-adds (as `audit` maps them)
    time = max(bytes / bandwidth, 2 * multiply-adds / peak of the consumed type) + launch
    Cost -> total, dearest kernels, rows for a terminal

A lower bound to compare engines with, not a measurement: real kernels reach 50 to 90 % of either roof, caches and
clocks are not modelled. Must not be printed without the word 'predicted'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from engines.backends.compiler import ShapeRange
from engines.backends.layers import SYNCHRONIZATION, Layer, LayerTable
from engines.core.errors import EngineError
from engines.cost.gpus import Gpu, gpu_named
from engines.verify.audit import audit

HEADERS = ("predicted us", "share", "bound", "type", "MB", "GMAC", "kernel", "ONNX nodes")


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
    """The predicted time of one inference.

    Attributes:
        gpu: that it is predicted for.
        kernels: in the order of the engine.
        unplaced_macs: multiply-adds of nodes whose kernel is not known: counted nowhere.
        uncounted: the nodes whose multiply-adds are not known.
    """

    gpu: Gpu
    kernels: tuple[KernelCost, ...]
    unplaced_macs: int = 0
    uncounted: tuple[str, ...] = ()

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
    """Predicted time of every kernel of an engine, in its order; waiting for another stream is none.

    Args:
        model: the model that the engine was built from; external data is not needed.
        table: its layers, compiled with fixed shapes (min = opt = max) for a target of the GPU's generation.
        gpu: a name in `GPUS`, or numbers of one's own.
        shapes: the fixed shape of each dynamic input.

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
        what = "The engine has dynamic shapes, so its kernels' sizes are not known"
        raise EngineError(f"{what}. Compile with min = opt = max.")
    products: dict[str, tuple[int, str]] = {}
    nodes = audit(model, table, shapes=shapes).nodes
    for node in nodes:
        macs, _ = products.get(node.kernel, (0, ""))
        products[node.kernel] = (macs + (node.macs or 0), "" if node.consumed == "unknown" else node.consumed)
    unplaced, _ = products.pop("", (0, ""))
    layers = [layer for layer in table.layers if layer.kind not in SYNCHRONIZATION]
    # A name that comes twice multiplies once.
    # Without a jump, the turns of a loop are kernels each.
    turns = {node.node: node.turns or 1 for node in nodes} if any(la.kind == "cjmp" for la in table.layers) else {}
    kernels = tuple(_kernel(layer, gpu, *products.pop(layer.name, (0, "")), _turns(layer, turns)) for layer in layers)
    uncounted = tuple(node.node for node in nodes if not node.counted)
    return Cost(gpu=gpu, kernels=kernels, unplaced_macs=unplaced, uncounted=uncounted)


def _turns(layer: Layer, turns: Mapping[str, int]) -> int:
    """How often a kernel runs: as often as the nodes that it names."""
    return max((turns.get(name, 1) for name in layer.onnx_nodes), default=1)


def _kernel(layer: Layer, gpu: Gpu, macs: int, dtype: str, turns: int) -> KernelCost:
    """The roofline of one kernel, in all its turns."""
    moved = (layer.bytes_moved or 0) * turns
    first = next((t.dtype for t in (*layer.inputs, *layer.constants, *layer.outputs)), "float32")
    dtype = dtype or first
    transfer, compute = moved / gpu.bandwidth_gb_s / 1e3, 2 * macs / gpu.peak(dtype)
    work = max(transfer, compute)
    bound = "launch" if gpu.launch_us * turns > work else "compute" if compute > transfer else "bandwidth"
    return KernelCost(
        name=layer.name,
        kind=layer.kind,
        us=work + gpu.launch_us * turns,
        bytes=moved,
        macs=macs,
        dtype=dtype,
        bound=bound,
        onnx_nodes=layer.onnx_nodes,
    )


def rows(cost: Cost, count: int = 10) -> list[tuple[str, ...]]:
    """The `count` dearest kernels as text, a row for the others and one for the total; columns are `HEADERS`."""
    total = cost.total_us or 1.0
    shown = cost.dearest(count)

    def cells(us: float, moved: int, macs: int, *texts: str) -> tuple[str, ...]:
        bound, dtype, name, nodes = texts
        return (f"{us:.1f}", f"{us / total:.0%}", bound, dtype, f"{moved / 1e6:.2f}", f"{macs / 1e9:.3f}", name, nodes)

    table = [cells(k.us, k.bytes, k.macs, k.bound, k.dtype, f"{k.kind} {k.name}", _some(k.onnx_nodes)) for k in shown]
    if rest := cost.dearest(len(cost.kernels))[count:]:
        sums = sum(k.us for k in rest), sum(k.bytes for k in rest), sum(k.macs for k in rest)
        table.append(cells(*sums, "", "", f"{len(rest)} others", ""))
    whole = cost.total_us, cost.bytes, sum(k.macs for k in cost.kernels)
    table.append(cells(*whole, "", "", f"{len(cost.kernels)} kernels on {cost.gpu.name}", ""))
    if cost.unplaced_macs:
        table.append(("", "", "", "", "", f"{cost.unplaced_macs / 1e9:.3f}", "in no known kernel: not in the time", ""))
    if cost.uncounted:
        table.append(("", "", "", "", "", "unknown", "sizes are not known: not in the time", _some(cost.uncounted)))
    return table


def _some(names: tuple[str, ...]) -> str:
    """Up to three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
