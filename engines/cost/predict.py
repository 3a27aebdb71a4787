"""Predict what an engine costs on a GPU that need not be there, kernel by kernel.

    LayerTable -> work of each kernel (its own tensors; multiply-adds as `audit` maps them where those do not tell)
    work, GPU -> microseconds (`engines.cost.kernel`, constants fitted on published latencies)
    Cost -> total, family, how true that is, dearest kernels, rows for a terminal

A prediction, not a measurement, for an engine whose launches a CUDA graph replays. The expected errors are of
TensorRT's engines on GPUs that no constant comes from; of TensorRT-RTX, no latency is published. Must not be printed
without the word 'predicted'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from engines.backends.compiler import ShapeRange
from engines.backends.layers import SYNCHRONIZATION, Layer, LayerTable
from engines.core.errors import EngineError
from engines.core.quantizers import LOW
from engines.cost.constants import CONSTANTS, EXPECTED
from engines.cost.family import Expected, family_of
from engines.cost.gpus import Gpu, gpu_named
from engines.cost.kernel import Batch, Kernel
from engines.cost.work import POINTWISE, Work, work_of
from engines.verify.audit import audit
from engines.verify.kernels import consumed_dtype

FEWEST = 15  # kernels of the smallest network whose latency is published, VGG-11; of smaller ones no error is known
HEADERS = ("predicted us", "share", "bound", "type", "MB", "GMAC", "kernel", "ONNX nodes")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCost:
    """One kernel. `bound` is 'bandwidth' (of memory or L2), 'compute', or 'start' where that costs more than either.

    `start_us` is what of `us` are starts.
    """

    name: str
    kind: str
    us: float
    start_us: float
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
        family: kind of network, as in `engines.cost.family.FAMILIES`.
        unplaced_macs: multiply-adds of nodes whose kernel is not known: counted nowhere.
        uncounted: the nodes whose multiply-adds are not known.
    """

    gpu: Gpu
    kernels: tuple[KernelCost, ...]
    family: str
    unplaced_macs: int = 0
    uncounted: tuple[str, ...] = ()

    @property
    def total_us(self) -> float:
        """Sum over the kernels."""
        return sum(k.us for k in self.kernels)

    @property
    def start_us(self) -> float:
        """What of that are starts of kernels and products."""
        return sum(k.start_us for k in self.kernels)

    @property
    def bytes(self) -> int:
        """Bytes read and written by all kernels."""
        return sum(k.bytes for k in self.kernels)

    @property
    def _known(self) -> Expected:
        found = EXPECTED[self.family]
        return found if len(self.kernels) >= FEWEST else replace(found, time=None, ratio=None)

    @property
    def error(self) -> float | None:
        """Relative error of the total that two of three networks of the family keep to; None where it is not known."""
        return self._known.time

    @property
    def ratio_error(self) -> float | None:
        """The same of the ratio of two types of one network on one GPU, in which most of the error falls out."""
        return self._known.ratio

    @property
    def text(self) -> str:
        """The total and how true it is: '1.9 ms, within 20 %'; 'predicted' is for the caller to say."""
        us = self.total_us
        size = f"{us:.1f} us" if us < 1000 else f"{us / 1000:.3g} ms"
        return f"{size}, " + ("error unknown" if self.error is None else f"within {self.error * 100:.0f} %")

    @property
    def notes(self) -> tuple[str, ...]:
        """What who reads the figure must know: how true it is, and what is assumed of the GPU."""
        known = self._known
        where = f"of {self.family}, {known.rows} latencies are published"
        if len(self.kernels) < FEWEST:
            where = f"no network of as few kernels as {len(self.kernels)} has a published latency"
        if known.time is None:
            true = f"the error of the predicted time is unknown: {where}"
        else:
            true = f"two of three predicted times keep to {known.time:.0%} on a GPU that was left out: {where}"
        low = any(k.macs and k.dtype in LOW for k in self.kernels)
        own = ("of TensorRT-RTX's kernels below 16 bits no latency is published",) if low else ()
        return (true, *own, *self.gpu.notes)

    def dearest(self, count: int) -> tuple[KernelCost, ...]:
        """The kernels with the longest predicted time, the dearest first; equal ones in the order of the engine."""
        return tuple(sorted(self.kernels, key=lambda k: -k.us)[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWork:
    """What an engine has to do, on whatever GPU of its targets.

    Attributes:
        targets: that it is compiled for.
        layers: its kernels, in its order; waiting for another stream is none.
        kernels: the work of each, in one turn.
        macs: multiply-adds of each as the audit places them, in all turns.
        turns: how often each runs.
        family, unplaced_macs, uncounted: as of `Cost`.
        weight_bytes, activation_bytes: as of its layer table.
    """

    targets: tuple[str, ...]
    layers: tuple[Layer, ...]
    kernels: tuple[Kernel, ...]
    macs: tuple[int, ...]
    turns: tuple[int, ...]
    family: str
    unplaced_macs: int
    uncounted: tuple[str, ...]
    weight_bytes: int = 0
    activation_bytes: int = 0

    def on(self, gpu: Gpu) -> Cost:
        """The predicted time of every kernel, and what bounds it.

        Raises:
            EngineError: the engine is for other targets.
        """
        if gpu.target not in self.targets:
            raise EngineError(
                f"The engine is compiled for {', '.join(self.targets)}, but {gpu.name} is {gpu.target}: its kernels "
                f"would be others. Compile with --target {gpu.target}."
            )
        times = Batch.of([(self.kernels, gpu)]).times(CONSTANTS)
        figures = zip(times.total, times.start, times.memory, times.compute, strict=True)
        parts = zip(self.layers, self.kernels, self.macs, self.turns, figures, strict=True)
        kernels = tuple(
            KernelCost(
                name=layer.name,
                kind=layer.kind,
                us=float(us) * often,
                start_us=float(start) * often,
                bytes=(layer.bytes_moved or 0) * often,
                macs=counted or round(kernel.work.macs) * often,
                dtype=kernel.dtype,
                bound="start" if start >= max(memory, compute) else "compute" if compute > memory else "bandwidth",
                onnx_nodes=layer.onnx_nodes,
            )
            for layer, kernel, counted, often, (us, start, memory, compute) in parts
        )
        return Cost(
            gpu=gpu,
            kernels=kernels,
            family=self.family,
            unplaced_macs=self.unplaced_macs,
            uncounted=self.uncounted,
        )


def predict(
    model: Path | str | onnx.ModelProto,
    table: LayerTable,
    gpu: Gpu | str,
    *,
    shapes: Mapping[str, ShapeRange] | None = None,
) -> Cost:
    """Predicted time of every kernel of an engine, in its order; waiting for another stream is none.

    Args:
        gpu: a name in `GPUS`, or numbers of one's own; of the generation that the engine is compiled for.
        model, table, shapes: as of `engine_work`.

    Raises:
        EngineError: an unknown GPU, an engine for other targets, or one whose sizes are decided at run time.
    """
    known = gpu if isinstance(gpu, Gpu) else gpu_named(gpu)
    return engine_work(model, table, shapes=shapes).on(known)


def engine_work(
    model: Path | str | onnx.ModelProto, table: LayerTable, *, shapes: Mapping[str, ShapeRange] | None = None
) -> EngineWork:
    """The work of every kernel of an engine, for who predicts its time on several GPUs.

    Args:
        model: the model that the engine was built from; external data is not needed.
        table: its layers, compiled with fixed shapes (min = opt = max).
        shapes: the fixed shape of each dynamic input.

    Raises:
        EngineError: sizes of the engine are decided at run time.
    """
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
    counted = [products.pop(layer.name, (0, "")) for layer in layers]
    # Without a jump, the turns of a loop are kernels each.
    jumps = any(layer.kind == "cjmp" for layer in table.layers)
    turns = _turns(layers, {node.node: node.turns or 1 for node in nodes} if jumps else {})
    works = [work_of(la, macs // n or None) for la, (macs, _), n in zip(layers, counted, turns, strict=True)]
    found = sum(max(0, round(w.macs) * n - macs) for w, (macs, _), n in zip(works, counted, turns, strict=True))
    told = {layer.name for layer, work in zip(layers, works, strict=True) if work.macs}
    return EngineWork(
        targets=table.targets,
        layers=tuple(layers),
        kernels=tuple(
            Kernel(work=w, dtype=_dtype(la, w, consumed))
            for la, w, (_, consumed) in zip(layers, works, counted, strict=True)
        ),
        macs=tuple(macs for macs, _ in counted),
        turns=tuple(turns),
        family=family_of(works),
        unplaced_macs=max(0, unplaced - found),  # what the audit places nowhere may be in kernels that tell
        uncounted=tuple(n.node for n in nodes if not n.counted and (n.macs is not None or n.kernel not in told)),
        weight_bytes=table.weight_bytes,
        activation_bytes=table.activation_bytes,
    )


def _turns(layers: list[Layer], turns: Mapping[str, int]) -> list[int]:
    """How often each kernel runs: as often as the nodes that it names."""
    return [max((turns.get(name, 1) for name in layer.onnx_nodes), default=1) for layer in layers]


def _dtype(layer: Layer, work: Work, consumed: str) -> str:
    """The type that a kernel multiplies in, as the audit or its tensors tell; else that of the first tensor."""
    first = next((t.dtype for t in (*layer.inputs, *layer.constants, *layer.outputs)), "float32")
    if consumed or work.form == POINTWISE:
        return consumed or first
    found = consumed_dtype(layer)
    return first if found == "unknown" else found


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
