"""Engines that TensorRT-RTX really compiled, as a fake runtime on a fake GPU runs them.

model -> the real compiler -> engine, whose kernels take what a test says; ONNX Runtime computes its outputs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import FakeCuda, FakeEngine, FakeKernel, fake_runtime, install

from engines.backends import rtx, trt
from engines.backends.compiler import Engine
from engines.backends.layers import SYNCHRONIZATION, Layer, LayerTable
from engines.core import onnx_runtime as ort
from engines.core.documents import replace
from engines.core.load import load_graph
from engines.cost.gpus import GPUS
from engines.cost.predict import predict
from engines.timing import events

Times = Callable[[Layer, float], float | Callable[[float], float]]
"""(kernel, its predicted microseconds on an RTX 4090) -> its microseconds, or these by the time in seconds."""


class Loadable(dict[bytes, FakeEngine]):
    """The engines by their bytes; each is made when it is first loaded."""

    def __init__(self, times: Times) -> None:
        super().__init__()
        self.times = times
        self._made: dict[bytes, Callable[[], FakeEngine]] = {}

    def add(self, made: Engine, model: onnx.ModelProto, shapes: Mapping[str, Any]) -> None:
        """An engine and what it was compiled from."""
        self._made[made.data] = lambda: self._engine(made.table, model, shapes)

    def __contains__(self, data: object) -> bool:
        return data in self._made

    def __missing__(self, data: bytes) -> FakeEngine:
        self[data] = self._made[data]()
        return self[data]

    def _engine(self, table: LayerTable, model: onnx.ModelProto, shapes: Mapping[str, Any]) -> FakeEngine:
        session = ort.session(model)
        declared = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.input}
        sizes = declared | {name: tuple(shape.opt) for name, shape in shapes.items()}
        (outputs,) = ort.run(session, [{n: np.zeros(s, np.float32) for n, s in sizes.items()}])
        tensors = {name: (shape, "FLOAT", True) for name, shape in sizes.items()}
        tensors |= {name: (a.shape, "FLOAT", False) for name, a in outputs.items()}
        cost = predict(model, table, GPUS["rtx4090"], shapes=shapes)
        layers = [layer for layer in table.layers if layer.kind not in SYNCHRONIZATION]
        kernels = []
        for layer, predicted in zip(layers, cost.kernels, strict=True):
            us = self.times(layer, predicted.us)
            kernels.append(FakeKernel(layer.name, us if callable(us) else lambda _, us=us: us))  # type: ignore[misc]

        def compute(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            try:
                return next(iter(ort.run(session, [{n: arrays[n] for n in sizes}])))
            except ort.failures():
                return {}

        return FakeEngine(kernels, tensors=tensors, compute=compute)


def fake_clock(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> FakeCuda:
    """A fake driver in the place of this machine's, with clocks of its own."""
    install(monkeypatch, fake)
    clock = SimpleNamespace(perf_counter=lambda: fake.host_us / 1e6, sleep=lambda seconds: None)
    monkeypatch.setattr(events, "time", clock)
    return fake


def rtx_engines(monkeypatch: pytest.MonkeyPatch, times: Times) -> tuple[FakeCuda, Loadable]:
    """An RTX 4090 that runs what TensorRT-RTX compiles in this process."""
    pytest.importorskip("tensorrt_rtx")
    cuda, engines, real = fake_clock(monkeypatch, FakeCuda()), Loadable(times), rtx.BACKEND

    def build(model: Any, **options: Any) -> Engine:
        made = real.build(model, **options)
        engines.add(made, load_graph(model), options["shapes"] or {})
        return made

    monkeypatch.setattr(rtx, "BACKEND", dataclasses.replace(real, build=build))
    runtime = sys.modules["tensorrt_rtx"]
    for name, value in vars(fake_runtime(cuda, engines)).items():
        if name in ("IProfiler", "Runtime", "CudaGraphStrategy", "TensorIOMode"):
            monkeypatch.setattr(runtime, name, value)
    return cuda, engines


def trt_engines(monkeypatch: pytest.MonkeyPatch, times: Times) -> tuple[FakeCuda, Loadable]:
    """An RTX 4090 with a TensorRT whose engines hold the layers of TensorRT-RTX, by names of its own."""
    pytest.importorskip("tensorrt_rtx")
    cuda, engines = fake_clock(monkeypatch, FakeCuda()), Loadable(times)

    def build(model: Any, **options: Any) -> Engine:
        made = rtx.BACKEND.build(model, **{**options, "targets": ("sm89",)})
        layers = tuple(replace(x, name=f"trt {x.name}", kind=f"Cask{x.kind}") for x in made.table.layers)
        made = Engine(
            data=b"trt" + made.data, table=replace(made.table, layers=layers, backend="trt", version="11.4.0")
        )
        engines.add(made, load_graph(model), options["shapes"] or {})
        return made

    monkeypatch.setattr(trt, "BACKEND", dataclasses.replace(trt.BACKEND, build=build))
    runtime = fake_runtime(cuda, engines, rtx=False)
    runtime.__version__ = "11.4.0"
    monkeypatch.setitem(sys.modules, "tensorrt", runtime)
    return cuda, engines
