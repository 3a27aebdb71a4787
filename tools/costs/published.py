"""Published latencies, each with the kernels that its network compiles to.

published_latencies.csv, kernel_tables.json.gz -> `Row`s
Where a table of the row's batch or size is missing, the nearest one is scaled: activations and positions grow, weights
do not. The multiply-adds in the tables have faults (1x1 convolutions as GEMM have none), so `work_of` derives them from
the kernels' tensors. INT8 rows have two lists of kernels: TensorRT's, derived from the FP16 table, and TensorRT-RTX's.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from engines.backends.layers import KernelTensor, Layer
from engines.core.errors import EngineError
from engines.cost.family import TRANSFORMERS, family_of
from engines.cost.gpus import Gpu, gpu_named
from engines.cost.kernel import Kernel
from engines.cost.tensorrt import Regions
from engines.cost.work import ATTENTION, POINTWISE, work_of

TYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
NAMES = {"rtx3080": "rtx3080-12gb"}  # names of the rows' GPUs that mean another than ours


@dataclass(frozen=True, eq=False)
class Table:
    """The kernels of one compiled network."""

    model: str
    precision: str
    target: str
    size: int
    layers: tuple[Layer, ...]
    counted: tuple[int, ...]

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """The work of each; a fusion that reads a matrix is a product also where nothing was counted."""
        works = [work_of(layer, macs) for layer, macs in zip(self.layers, self.counted, strict=True)]
        return tuple(Kernel(work=work, dtype=TYPES[self.precision]) for work in works)

    @cached_property
    def regions(self) -> Regions:
        """What TensorRT makes of them; the published INT8 transformers have an INT8 attention (demo/BERT's plugin)."""
        return Regions.of(linked(self.layers), self.kernels, attention=True)

    @cached_property
    def family(self) -> str:
        """As the kernels tell."""
        return family_of([kernel.work for kernel in self.kernels])


@dataclass(frozen=True, eq=False)
class Row:
    """One published latency.

    `table` is of its network in its type, or in float16 for INT8; `own` is TensorRT-RTX's INT8 table where there is
    one. `scale` is how much larger the batch or the area is than the table's. `launched` says that the host launched
    every kernel: trtexec without a CUDA graph.
    """

    gpu: Gpu
    gpu_name: str
    model: str
    precision: str
    quality: str
    measured_us: float
    launched: bool
    pair: tuple[str, ...]
    table: Table
    scale: float
    own: Table | None
    own_scale: float

    @property
    def family(self) -> str:
        """Of its network."""
        return self.table.family

    @property
    def group(self) -> str:
        """Its GPU and family."""
        return f"{self.gpu_name}, {self.family}"

    @cached_property
    def tensorrt(self) -> list[Kernel]:
        """What TensorRT makes of it."""
        table = self.table
        int8 = self.precision == "int8"
        products = [i for i, k in enumerate(table.kernels) if int8 and k.work.form not in (POINTWISE, ATTENTION)]
        kernels = table.regions.of_tensorrt(frozenset(products))
        return merged(replace(k, work=k.work.scaled(self.scale)) for _, k, _ in kernels)

    @cached_property
    def plain(self) -> list[Kernel]:
        """The same as cost.md section 3 derives it: no kernel is dropped, a CNN's pointwise kernels carry half."""
        share = 0.75 if self.family == TRANSFORMERS else 0.5
        return merged(self._plain(kernel, share) for kernel in self.table.kernels)

    def _plain(self, kernel: Kernel, share: float) -> Kernel:
        work = kernel.work.scaled(self.scale)
        if self.precision != "int8" or work.form == ATTENTION:
            return replace(kernel, work=work)
        product = work.form != POINTWISE
        part = 0.5 if product else share
        lighter = replace(work, read=work.read * part, written=work.written * part)
        weights = work.weights * (0.5 if product else 1)
        return Kernel(work=replace(lighter, weights=weights), dtype="int8" if product else kernel.dtype)


def linked(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with names of tensors, which the tables lack: what an input is, its size tells.

    It is the last tensor written that fits: of its shape, or of as many elements, or larger (a slice), those first that
    nobody has read in full; no kernel reads one tensor twice. What fits none is an input of the network.
    """
    found = list[Layer]()
    written: dict[str, tuple[KernelTensor, int]] = {}  # with the elements not read so far
    for index, layer in enumerate(layers):
        inputs = list[KernelTensor]()
        for place, tensor in enumerate(layer.inputs):
            source = _source(tensor, written, {t.name for t in inputs})
            inputs.append(_named(tensor, source or f"input {index}.{place}"))
            if source:
                known, left = written[source]
                written[source] = known, left - math.prod(tensor.shape)
        outputs = [_named(tensor, f"{index}.{place}") for place, tensor in enumerate(layer.outputs)]
        written = {t.name: (t, math.prod(t.shape)) for t in reversed(outputs)} | written
        found.append(msgspec.structs.replace(layer, inputs=tuple(inputs), outputs=tuple(outputs)))
    return found


def _source(tensor: KernelTensor, written: Mapping[str, tuple[KernelTensor, int]], taken: Container[str]) -> str | None:
    """The name of the tensor that an input is; `written` has the last one first."""
    size = math.prod(tensor.shape)
    free = [(t, left >= size) for t, left in written.values() if t.dtype == tensor.dtype and t.name not in taken]
    for whole in (True, False):
        fits = [t for t, unread in free if unread == whole]
        same = [t for t in fits if math.prod(t.shape) == size]
        slices = [t for t in fits if size > 1 and math.prod(t.shape) % size == 0]
        if best := [*(t for t in same if t.shape == tensor.shape), *same, *slices]:
            return best[0].name
    return None


def _named(tensor: KernelTensor, name: str) -> KernelTensor:
    return KernelTensor(name=name, dtype=tensor.dtype, shape=tensor.shape)


def merged(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Equal kernels as one, with their number."""
    return [replace(kernel, count=count) for kernel, count in Counter(kernels).items()]


def read_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """The rows that a table of kernels is known for, and why each of the others is left out."""
    with gzip.open(folder / "kernel_tables.json.gz") as file:
        tables = [_table(entry) for entry in json.load(file)]
    known: dict[tuple[str, str], list[Table]] = {}
    for table in tables:
        known.setdefault((table.model, table.precision), []).append(table)
    with (folder / "published_latencies.csv").open() as file:
        found = [_row(values, known) for values in csv.DictReader(file)]
    return [row for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, str)]


def _row(values: dict[str, str], known: dict[tuple[str, str], list[Table]]) -> Row | str:
    """A row, or why it is none."""
    model, precision = values["model"], values["precision"]
    size = int(values["batch"])
    if any("x" in values["shape"] and t.size > 1000 for t in known.get((model, "fp16"), ())):
        size *= math.prod(map(int, values["shape"].split("x")))
    table = _nearest(known.get((model, "fp16" if precision == "int8" else precision), ()), values["sm"], size)
    own = _nearest(known.get((model, precision), ()), values["sm"], size)
    if table is None:
        return f"no kernels of {model}"
    try:
        gpu = gpu_named(NAMES.get(values["gpu"], values["gpu"]))
    except EngineError:
        return f"unknown GPU {values['gpu']}"
    return Row(
        gpu=gpu,
        gpu_name=values["gpu"],
        model=model,
        precision=precision,
        quality=values["quality"],
        measured_us=float(values["measured_ms"]) * 1e3,
        launched="trtexec" in values["tool_version"] and "CUDA graph" not in values["tool_version"],
        pair=(
            *(values[k] for k in ("source_url", "gpu", "model", "shape", "batch")),
            values["tool_version"].split(",")[0],
        ),
        table=table,
        scale=size / table.size,
        own=own,
        own_scale=size / own.size if own else 1.0,
    )


def _nearest(tables: Sequence[Table], target: str, size: int) -> Table | None:
    """The table whose kernels are most like: of sm75 where the row is, then of that size, target, or near in size."""

    def far(table: Table) -> tuple[bool, bool, bool, float]:
        return (
            target == "sm75" and table.target != "sm75",
            table.size != size,
            table.target != target,
            abs(math.log(table.size / size)),
        )

    return min(tables, key=far, default=None)


def _table(entry: dict[str, Any]) -> Table:
    sizes = [int(part) for part in entry["batch_and_size"].split("x")]
    return Table(
        model=entry["model"],
        precision=entry["precision"],
        target=entry["target"],
        size=math.prod(sizes),
        layers=tuple(map(_layer, entry["kernels"])),
        counted=tuple(kernel["macs"] for kernel in entry["kernels"]),
    )


def _layer(kernel: dict[str, Any]) -> Layer:
    ends = ("inputs", "constants", "outputs")
    tensors = {e: tuple(KernelTensor(name="", dtype=t, shape=tuple(s)) for t, s in kernel[e]) for e in ends}
    return Layer(name=kernel["name"], kind=kernel["kind"], tactic="", onnx_nodes=(), **tensors)
