"""Models of time that are held against published latencies: the roofline of before, the reference, and ours.

Rows -> a `Model`: constants -> predicted microseconds of every row. What does not depend on constants is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from costs.published import Row
from engines.cost.kernel import SPLITS, TILES, Batch, Constants, Kernel

SHORT = 160  # a grouped convolution with a shorter sum runs on the FP32 cores
Array = npt.NDArray[Any]
Values = Mapping[str, float]


class Model(Protocol):
    """Predicts rows by constants; `priors` are their value and the spread of its logarithm before any row is seen."""

    priors: Mapping[str, tuple[float, float]]

    def __call__(self, values: Values) -> Array:
        """Microseconds of each row."""


class Started(Model, Protocol):
    """A model that tells starts from all else."""

    def starts(self, values: Values) -> Array:
        """What of each row's microseconds are starts of kernels and products."""


class Roofline:
    """Bytes over bandwidth or operations over peak, and 2 us: the model before this one; nothing is fitted."""

    priors: Mapping[str, tuple[float, float]] = {}

    def __init__(self, rows: Sequence[Row]) -> None:
        """INT8 by TensorRT-RTX's own kernels where their table is known; multiply-adds as they were counted then."""
        self._us = np.array([_roofline(row) for row in rows])

    def __call__(self, values: Values) -> Array:
        """The same for any constants."""
        return self._us


def _roofline(row: Row) -> float:
    if row.own is not None:
        table, scale = row.own, row.own_scale
        pairs = [(k.work, macs) for k, macs in zip(table.kernels, table.counted, strict=True)]
        dtype = {"fp32": "float32", "fp16": "float16", "int8": "int8"}[row.precision]
    else:
        pairs, scale, dtype = [(k.work, k.work.macs) for k in row.plain for _ in range(k.count)], 1.0, "int8"
    moved = [(w.read + w.written) * scale + w.weights for w, _ in pairs]
    products = [2 * macs * scale / (row.gpu.tera_ops[dtype] * 1e6) for _, macs in pairs]
    return sum(max(b / row.gpu.bandwidth_gb_s / 1e3, p) + 2.0 for b, p in zip(moved, products, strict=True))


class Reference:
    """The model of ../shared/docs/cost.md section 4 (tools/cost_reference.py there), its thirteen constants free."""

    priors: Mapping[str, tuple[float, float]] = {
        "start": (3.0, 0.25),
        "product_start": (2.5, 0.25),
        "split": (1.5, 0.25),
        "bandwidth": (0.85, 0.25),
        "l2": (13.0, 0.25),
        "grouped": (0.4, 0.25),
        "pointwise": (0.85, 0.25),
        "rate": (0.9, 0.25),
        "fp32_rate": (0.3, 0.25),
        "fall": (0.7, 0.25),
        "saturation": (1.6, 0.25),
        "kept": (0.25, 0.25),
        "stay": (0.5, 0.25),
    }

    def __init__(self, rows: Sequence[Row]) -> None:
        """The kernels as the float table has them, grouped and side by side as if they were one product."""
        self._batch = batch = Batch.of([([_whole(k) for k in row.plain], row.gpu) for row in rows])
        k = np.array([kernel.work.k for row in rows for kernel in row.plain])
        self._short = batch.flags["grouped"] & (k < SHORT)
        one = len(TILES)
        parts = np.repeat(SPLITS, one)[:, None]
        times = np.where((parts > 1) & (k / parts < 64), np.inf, batch.waves * batch.tiles)
        self._whole, self._parts = times[:one].min(axis=0), times[one:].min(axis=0)

    @property
    def kernels(self) -> Array:
        """How many each row has."""
        return self._batch.sums(np.ones(len(self._batch.engine)))

    def __call__(self, values: Values) -> Array:
        """Microseconds of each row."""
        b, gpu, v = self._batch, self._batch.gpu, values
        slow = np.sqrt(1410 / gpu["boost_mhz"])
        l2 = gpu["l2_bytes"]
        stay = np.clip(1.5 - b.engine_weights / (v["stay"] * l2), 0, 1) * (b.engine_weights < l2)
        out = np.clip((b.activations - v["kept"] * l2) / ((1 - v["kept"]) * l2), 0, 1)
        dram = (b.activations * out + b.weights * (1 - stay)) / (gpu["bandwidth_gb_s"] * 1e3 * v["bandwidth"])
        near = (b.activations + b.weights) / (gpu["sms"] * gpu["boost_mhz"] * v["l2"])
        product, grouped = b.flags["product"], b.flags["grouped"]
        memory = np.maximum(dram, near) / np.where(grouped, v["grouped"], np.where(product, 1, v["pointwise"]))
        begin = slow * v["product_start"]

        def times(clock: Array) -> Array:
            rate = v["rate"] * clock
            tiled = np.minimum(self._whole / rate + begin, self._parts / rate + begin * v["split"])
            short = 2 * b.macs / (gpu["fp32_ops"] * v["fp32_rate"] * clock)
            compute = np.where(product, np.where(self._short, short, tiled), 0)
            result: Array = v["start"] * slow + (memory**3 + compute**3) ** (1 / 3)
            return result

        whole = b.sums(times(np.ones(len(slow))))
        duty = np.clip(b.sums(np.where(product, 2 * b.macs / b.peak, 0)) / whole, 0, 1)[b.engine]
        clock = 1 - (1 - gpu["base_mhz"] / gpu["boost_mhz"]) * np.minimum(1, v["saturation"] * duty) * v["fall"]
        return b.sums(times(clock))


def _whole(kernel: Kernel) -> Kernel:
    return replace(kernel, work=replace(kernel.work, groups=1.0, batch=1.0))


class Ours:
    """`engines.cost.kernel`; what was known before any row: NVIDIA's and others' micro-benchmarks, rounded."""

    priors: Mapping[str, tuple[float, float]] = {
        "start_us": (3.0, 0.2),
        "product_start_us": (2.5, 0.2),
        "split": (1.5, 0.1),
        "bandwidth": (0.85, 0.07),
        "l2_bytes": (16.0, 0.2),
        "kept": (0.25, 0.2),
        "grouped": (0.45, 0.3),
        "pointwise": (0.8, 0.15),
        "rate": (0.9, 0.07),
        "attention": (0.5, 0.35),
        "fp32_rate": (0.25, 0.35),
        "small_tiles": (1.0, 0.4),
        "fill": (0.3, 0.35),
        "clock": (0.8, 0.2),
        "saturation": (1.6, 0.2),
        "int8": (1.0, 0.1),
        "halved": (1.1, 0.15),
        "grouped_int8": (1.3, 0.15),
        "turing": (1.2, 0.2),
    }

    def __init__(self, rows: Sequence[Row], kernels: Sequence[Sequence[Kernel]] | None = None) -> None:
        """The kernels as TensorRT has them, or others."""
        chosen = kernels or [row.tensorrt for row in rows]
        self._batch = Batch.of([(some, row.gpu) for some, row in zip(chosen, rows, strict=True)])

    @property
    def kernels(self) -> Array:
        """How many each row has."""
        return self._batch.sums(np.ones(len(self._batch.engine)))

    def __call__(self, values: Values) -> Array:
        """Microseconds of each row."""
        return self._batch.sums(self._batch.times(Constants(**values)).total)

    def starts(self, values: Values) -> Array:
        """What of that are starts of kernels and products."""
        return self._batch.sums(self._batch.times(Constants(**values)).start)


class Launched:
    """A model of kernels, and what rows without a CUDA graph cost beyond it: time between kernels, of their host.

    Launches count as starts.
    """

    def __init__(self, model: Reference | Ours, rows: Sequence[Row]) -> None:
        """Rows of the model."""
        self.priors = {**model.priors, "launch_us": (1.0, 0.7)}
        self._model = model
        self._launches = np.where([row.launched for row in rows], model.kernels, 0.0)

    def __call__(self, values: Values) -> Array:
        """Microseconds of each row."""
        own = {name: value for name, value in values.items() if name != "launch_us"}
        result: Array = self._model(own) + values["launch_us"] * self._launches
        return result

    def starts(self, values: Values) -> Array:
        """What of that are starts and launches."""
        if isinstance(self._model, Reference):
            raise NotImplementedError("The reference does not tell starts from all else.")
        own = {name: value for name, value in values.items() if name != "launch_us"}
        result: Array = self._model.starts(own) + values["launch_us"] * self._launches
        return result


@dataclass(frozen=True)
class Held:
    """A model with some constants held at a value that switches their part off."""

    model: Model
    held: Values

    @property
    def priors(self) -> Mapping[str, tuple[float, float]]:
        """Those that are free."""
        return {name: prior for name, prior in self.model.priors.items() if name not in self.held}

    def __call__(self, values: Values) -> Array:
        """Microseconds of each row."""
        return self.model({**values, **self.held})
