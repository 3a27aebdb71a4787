"""A GPU by its figures alone, as a `Timer` and a compiler: what the probes must find again.

A graph is its weighted and pooling nodes; their time follows the figures, with noise and a clock that falls under load.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest

from engines.backends.backend import Backend, backend_named
from engines.backends.compiler import Engine
from engines.backends.layers import KernelTensor, Layer, LayerTable
from engines.core.documents import replace
from engines.core.errors import BuildError
from engines.cost.constants import CONSTANTS
from engines.cost.gpus import GPUS
from engines.timing import measure, probes
from engines.timing.driver import Card
from engines.timing.timer import Arrays, Load, Timing

RTX4090 = Card(
    name="NVIDIA GeForce RTX 4090",
    target="sm89",
    sms=128,
    boost_mhz=2520,
    l2_bytes=72 << 20,
    bandwidth_gb_s=1008,
    memory_bytes=24 << 30,
    bus="00000000:65:00.0",
    cuda="13.0",
)
# An RTX 4090 with a thousandth of its rates, so that products of 512 x 512 take as long as its largest.
RATES = {"float32": 0.08, "float16": 0.31, "bfloat16": 0.16, "int8": 0.6, "fp8": 0.32}
ROW = dataclasses.replace(
    GPUS["rtx4090"], tera_ops={kind: rate / 1e3 for kind, rate in GPUS["rtx4090"].tera_ops.items()}
)
SMALL = 64 * 14 * 14  # elements of what small convolutions read
_NAMES = {1: "float32", 10: "float16", 16: "bfloat16", 3: "int8", 17: "fp8"}


def small_products(monkeypatch: pytest.MonkeyPatch, size: int = 512) -> None:
    """Matrices of the probes that are built at once."""
    for module in (probes, measure):
        monkeypatch.setattr(module, "SIZE", size)


def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs whose weights have shapes alone, which is all that a simulated GPU reads."""

    def weight(self: probes.Graph, name: str, shape: Sequence[int], dtype: str, **_: Any) -> str:
        codes = dtype in ("int8", "fp8")
        self.weights.append(onnx.TensorProto(name=f"{name}_codes" if codes else name, dims=list(shape)))
        return self.dequantized(f"{name}_codes", name, 1.0) if codes else name

    monkeypatch.setattr(probes.Graph, "weight", weight)


def compiler(change: Callable[[onnx.ModelProto, LayerTable], LayerTable] = lambda model, table: table) -> Backend:
    """A backend whose engines hold what their graph does; `change` makes other tables of some, or raises."""

    def build(model: onnx.ModelProto, **_: Any) -> Engine:
        kinds = {v.name: _NAMES[v.type.tensor_type.elem_type] for v in model.graph.input}
        dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
        weights = {w.name: list(w.dims) for w in model.graph.initializer}
        produced = {node.output[0]: node for node in model.graph.node}
        work, layers = [], []
        for node in model.graph.node:
            if node.op_type not in ("Conv", "MatMul", "MaxPool", "Add") or node.name.startswith("add"):
                continue
            x, dtype = next(iter(dims.values())), next(iter(kinds.values()))
            step = {"op": node.op_type, "dtype": dtype, "elements": math.prod(x), "macs": 0, "weights": 0}
            tensor = KernelTensor(name="t", dtype=dtype, shape=tuple(x))
            if node.op_type in ("Conv", "MatMul"):
                weight = weights[node.input[1] if node.input[1] in weights else produced[node.input[1]].input[0]]
                inputs = math.prod(weight[1:]) if node.op_type == "Conv" else weight[0]
                step |= {"macs": math.prod(x) * inputs, "weights": math.prod(weight)}
            work.append(step)
            layers.append(
                Layer(
                    name=f"{node.name}_myl0_1",
                    kind="gemm" if step["macs"] else "maxpool",
                    inputs=(tensor,),
                    constants=(tensor,) if step["macs"] else (),
                    outputs=(tensor,),
                    tactic="",
                    onnx_nodes=(node.name,),
                )
            )
        table = LayerTable(
            layers=tuple(layers),
            backend="rtx",
            version="1.7.1",
            targets=("sm89",),
            engine_bytes=1,
            weight_bytes=0,
            activation_bytes=0,
        )
        return Engine(data=json.dumps(work).encode(), table=change(model, table))

    return dataclasses.replace(backend_named("rtx"), build=build)


def refuse(name: str) -> Callable[[onnx.ModelProto, LayerTable], LayerTable]:
    """A compiler that refuses graphs whose input is of a type."""

    def change(model: onnx.ModelProto, table: LayerTable) -> LayerTable:
        if _NAMES[model.graph.input[0].type.tensor_type.elem_type] == name:
            raise BuildError(f"Cannot compile for target(s), because the model contains HW-specific datatypes: {name}.")
        return table

    return change


def fuse_pools(model: onnx.ModelProto, table: LayerTable) -> LayerTable:
    """A compiler that makes one kernel of all pools."""
    if all(layer.kind != "maxpool" for layer in table.layers) or len(table.layers) < 2:
        return table
    names = tuple(name for layer in table.layers for name in layer.onnx_nodes)
    return replace(table, layers=(replace(table.layers[0], onnx_nodes=names),))


@dataclass
class SimulatedTimer:
    """A GPU's figures as a `Timer`. `slow` is how wrong its clock is; `accumulates` how FP16 products add up.

    Small convolutions split their sums, as `engines.cost.kernel` has it of so slow a GPU, and start that much later.
    """

    start_us: float = 3.0
    product_start_us: float = 2.5
    bandwidth_gb_s: float = 820.0
    l2_gb_s: float = 4000.0
    boost: dict[str, float] = field(default_factory=lambda: dict(RATES))
    sustained: float = 0.7
    noise: float = 0.01
    outliers: float = 0.02
    slow: float = 1.0
    accumulates: str = "float16"
    l2_bytes: int = 72 << 20
    seed: int = 0
    overhead_us: float = 6.0

    def times(self, loads: Sequence[Load], *, seconds: float, rest_s: float = 0.0) -> list[Timing]:
        rng, found = np.random.default_rng(self.seed), []
        for load in loads:
            at = np.linspace(0, seconds, 200)
            us = np.array([self._us(json.loads(load.engine.data), t, load.repeats) for t in at])
            us *= 1 + self.noise * rng.standard_normal(len(at))
            us[rng.random(len(at)) < self.outliers] *= 3
            found.append(Timing(us=tuple(us * self.slow), at_s=tuple(at)))
        return found

    def _us(self, work: list[dict[str, Any]], at_s: float, repeats: int) -> float:
        clock = self.sustained + (1 - self.sustained) * math.exp(-max(at_s - 0.05, 0) / 0.3)
        total = self.overhead_us / repeats
        for step in work:
            nbytes = {"Add": 6, "MaxPool": 4}.get(step["op"], 0) * step["elements"]
            memory = nbytes / (self.l2_gb_s if nbytes <= self.l2_bytes / 4 else self.bandwidth_gb_s) / 1e3
            product = 2 * step["macs"] / (self.boost[step["dtype"]] * clock * 1e6)
            split = CONSTANTS.split if step["elements"] == SMALL else 1.0
            total += self.start_us + (self.product_start_us * split if step["macs"] else 0) + max(memory, product)
        return total

    def outputs(self, engine: Engine, inputs: Arrays) -> dict[str, np.ndarray]:
        """The sums of the pattern, with weights of one: in chunks of 16, as tensor cores add."""
        (x,) = inputs.values()
        rows, taps = (x[0], 1) if x.ndim == 2 else (x[0, :, 0, 0], 9)
        total = np.float32(0)
        for chunk in np.tile(rows, taps).astype(np.float32).reshape(-1, 16):
            total = total + chunk.sum()
            total = np.float32(np.float16(total)) if self.accumulates == "float16" else total
        return {"y": np.full((1, probes.CHANNELS, *x.shape[2:]) if taps == 9 else (1, probes.SIZE), np.float16(total))}
