"""The time of kernels on GPUs: start, memory, products in waves of tiles, and the clock that the whole engine leaves.

    t      = start + (t_mem^3 + t_mul^3)^(1/3)                                          microseconds
    start  = start_us * s, s = sqrt(1410 MHz / boost), of a product + product_start_us * s, * split where K is split
    t_mem  = max(dram / (bandwidth * GB/s), bytes / (l2_bytes * SMs * clock)) / efficiency of the form, `pointwise` or
             `grouped`
    dram   = activations that do not fit the L2 (none below `kept` of it, all above it) + weights that do not stay there
    t_mul  = least over tiles and splits of K of (ceil(tiles * split / SMs) + fill) * tile / (efficiency * rate / SMs);
             in convolutions the efficiency of a tile to the power of `small_tiles`;
             fused attention computes a head on one SM, at `attention` of the rate;
             grouped convolutions in tiles of each group, or on the FP32 cores
    rate   = dense peak * rate * clock / boost, by type; on sm75 starts and tensor cores take `turing` times as long
    clock  = boost * (1 - clock * (1 - base / boost) * min(1, saturation * u)), u = tensor-core duty of the engine

What was measured on a GPU (`Measured`) takes the place of what is predicted, as the probes of `engines.timing` measure
it: bandwidths by pointwise kernels without products beside them, rates by a product of 4096^3. The kernels of several
engines are computed at once, as arrays. Source: the form of ../shared/docs/cost.md section 4, with `fill`, the clock of
the L2 and the rates of `int8` and of halved units added; constants by tools/bench_cost.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engines.cost.datasheets import HALVED
from engines.cost.gpus import Gpu, Measured
from engines.cost.work import ATTENTION, DEPTHWISE, GROUPED, POINTWISE, Work

Array = npt.NDArray[Any]

# Rows and columns of a tile of the output that one SM computes, and the share of its rate it reaches.
TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6), (64, 32, 0.4), (32, 32, 0.22))
LEAST = 64  # of K that a part costs
SPLITS = (1, 2, 4, 8)  # of K, where there are fewer tiles than SMs; in parts
ROWS = 384  # of one head that an SM computes in fused attention; longer sequences are cut
LARGE = 4096  # rows, columns and length of the sums of the product by which rates are measured
POWER = 3.0  # how far memory and products overlap
_REFERENCE_MHZ = 1410.0
_EFFICIENCY = np.tile([efficiency for _, _, efficiency in TILES], len(SPLITS))[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What is fitted. Shares are of a peak; `start_us` and `product_start_us` at 1410 MHz.

    Attributes:
        start_us: of a kernel that waits for the one before it.
        product_start_us: of a product, beyond that.
        split: factor of the latter where K is split.
        bandwidth: share of the memory's that one kernel reaches.
        l2_bytes: that an SM gets from the L2, per clock.
        kept: share of the L2 below which activations do not reach memory.
        grouped: share of either bandwidth in grouped convolutions.
        pointwise: share of either bandwidth in kernels without a product.
        rate: share of the dense peak; with `int8` or `halved` above 1: until they are loaded, GPUs run above the boost
            clock of their datasheet.
        attention: rate of fused attention, relative: exponents stand between its products.
        fp32_rate: share of the FP32 cores' peak in grouped convolutions.
        small_tiles: power of the efficiency of tiles in convolutions, whose windows they cut.
        fill: tile times that a product takes beyond its waves.
        clock: share of the way from boost to base clock that a fully busy engine falls.
        saturation: factor of the duty at which it has fallen.
        int8: rate of INT8 products, relative.
        halved: rate of products at half rate (GeForce with FP32 accumulation), relative: their operands keep up.
        grouped_int8: time of grouped convolutions in INT8, relative.
        turing: time of sm75, which copies no operands for its tensor cores while they multiply, relative.
    """

    start_us: float
    product_start_us: float
    split: float
    bandwidth: float
    l2_bytes: float
    kept: float
    grouped: float
    pointwise: float
    rate: float
    attention: float
    fp32_rate: float
    small_tiles: float
    fill: float
    clock: float
    saturation: float
    int8: float
    halved: float
    grouped_int8: float
    turing: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The work of one kernel, the type in which it multiplies, and how many such there are in the engine."""

    work: Work
    dtype: str
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Microseconds of each kernel: in all, and its parts as they would be alone; `start` is also that of a product."""

    total: Array
    start: Array
    memory: Array
    compute: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """The kernels of some engines, one after the other, each array with one value per kernel.

    Attributes:
        engine: which engine a kernel is of.
        engines: how many there are.
        count: how many such kernels the engine has.
        activations: bytes that it reads and writes, without weights.
        weights: bytes of constants.
        engine_weights: bytes of constants of the whole engine.
        macs: multiply-adds.
        waves: (tiles x splits, kernels) waves of tiles; infinite where a split is none.
        tiles: (tiles x splits, kernels) microseconds of one at the peak.
        peak: operations a microsecond of its type.
        flags: name -> whether.
        gpu: name -> value of the kernel's GPU; what was not measured is nan.
    """

    engine: Array
    engines: int
    count: Array
    activations: Array
    weights: Array
    engine_weights: Array
    macs: Array
    waves: Array
    tiles: Array
    peak: Array
    flags: dict[str, Array]
    gpu: dict[str, Array]

    @classmethod
    def of(cls, engines: Sequence[tuple[Sequence[Kernel], Gpu]]) -> Batch:
        """The kernels of engines, each on its GPU."""
        pairs = [(k, gpu) for kernels, gpu in engines for k in kernels]
        works, types = [k.work for k, _ in pairs], [k.dtype for k, _ in pairs]
        index = np.repeat(np.arange(len(engines)), [len(kernels) for kernels, _ in engines])
        m, n, k, batch = (np.array([getattr(w, axis) for w in works], float) for axis in ("m", "n", "k", "batch"))
        groups = np.array([w.groups for w in works], float)
        weights = np.array([w.weights for w in works], float)
        count = np.array([k.count for k, _ in pairs], float)
        rows = [_values(gpu) for _, gpu in engines]
        gpu = {name: np.array([row[name] for row in rows], float)[index] for name in rows[0]}
        peak = np.array([g.peak(t) for t, (_, g) in zip(types, pairs, strict=True)], float)
        rates = ("tera_ops", "boost_tera_ops")
        gpu |= {what: np.array([_rate(g, what, t) for t, (_, g) in zip(types, pairs, strict=True)]) for what in rates}
        attention = np.array([w.form == ATTENTION for w in works], bool)
        waves, tiles = _tiling(m / batch, n / groups, k, batch * groups, gpu["sms"], peak)
        heads = _heads(m, n, k, batch, gpu["sms"], peak)
        waves, tiles = (np.where(attention, own, usual) for own, usual in zip(heads, (waves, tiles), strict=True))
        flags = {
            "grouped": np.array([w.form in (GROUPED, DEPTHWISE) for w in works], bool),
            "pointwise": np.array([w.form == POINTWISE for w in works], bool),
            "convolution": np.array([w.spatial > 0 for w in works], bool),
            "attention": attention,
            "product": k > 0,
            "int8": np.array([t in ("int8", "uint8") for t in types], bool),
            "fp32": np.array([t in ("float32", "bfloat16") for t in types], bool),
            "halved": np.array([_halved(g, t) for t, (_, g) in zip(types, pairs, strict=True)], bool),
            "turing": np.array([g.target == "sm75" for _, g in pairs], bool),
        }
        return cls(
            engine=index,
            engines=len(engines),
            count=count,
            activations=np.array([w.read + w.written for w in works], float),
            weights=weights,
            engine_weights=np.bincount(index, weights * count, len(engines))[index],
            macs=m * n * k,
            waves=waves,
            tiles=tiles,
            peak=peak,
            flags=flags,
            gpu=gpu,
        )

    def sums(self, values: Array) -> Array:
        """The sum of a value over the kernels of each engine."""
        return np.bincount(self.engine, values * self.count, self.engines)

    def times(self, constants: Constants) -> Times:
        """The time of every kernel, at the clock that its engine leaves the GPU."""
        whole = self.sums(self._times(constants, np.zeros(len(self.engine))).total)
        ideal = self.sums(np.where(self.flags["product"], 2 * self.macs / self.peak, 0.0))
        duty = np.clip(ideal / np.maximum(whole, 1e-9), 0.0, 1.0)
        return self._times(constants, np.minimum(1.0, constants.saturation * duty)[self.engine])

    def _times(self, c: Constants, load: Array) -> Times:
        """The time of every kernel under a load from 0 (boost clock) to 1."""
        flags, gpu = self.flags, self.gpu
        clock = 1 - c.clock * (1 - gpu["base_mhz"] / gpu["boost_mhz"]) * load
        old = np.where(flags["turing"], c.turing, 1.0)
        slow = np.sqrt(_REFERENCE_MHZ / gpu["boost_mhz"]) * old
        begin = _known(gpu["product_start_us"], c.product_start_us * slow)
        start = _known(gpu["start_us"], c.start_us * slow)
        factor = _known(gpu["factor"], 1.0)
        start_factor = _known(gpu["start_factor"], factor)
        memory = self._memory(c, clock)
        compute = np.where(flags["product"], self._compute(c, clock, load, old, begin), 0.0)
        total = start + (memory**POWER + compute**POWER) ** (1 / POWER)
        begun = np.where(flags["product"], np.minimum(begin, compute), 0.0)
        first = (start + begun) * start_factor
        return Times(
            total=(total - start - begun) * factor + first,
            start=first,
            memory=memory * factor,
            compute=(compute - begun) * factor,
        )

    def _memory(self, c: Constants, clock: Array) -> Array:
        """Of the slower of memory and L2."""
        gpu, flags = self.gpu, self.flags
        l2 = gpu["l2_bytes"]
        out = np.clip((self.activations - c.kept * l2) / ((1 - c.kept) * l2), 0.0, 1.0)
        stay = np.clip(1.5 - self.engine_weights / (0.5 * l2), 0.0, 1.0)
        dram = self.activations * out + self.weights * (1 - stay)
        form = np.where(flags["grouped"], c.grouped, 1.0)
        form = np.where(flags["grouped"] & flags["int8"], form / c.grouped_int8, form)
        near = self._reached(c, gpu["l2_gb_s"] * 1e3, c.l2_bytes * gpu["sms"] * gpu["boost_mhz"]) * clock
        far = self._reached(c, gpu["measured_gb_s"] * 1e3, c.bandwidth * gpu["bandwidth_gb_s"] * 1e3)
        result: Array = np.maximum(dram / far, (self.activations + self.weights) / near) / form
        return result

    def _reached(self, c: Constants, measured: Array, predicted: Array) -> Array:
        """Bytes a microsecond of either bandwidth, which is measured by a pointwise kernel.

        Such kernels reach what was measured; products what is predicted of them, but no less than the former, and no
        more than what was measured lets expect of them.
        """
        pointwise = self.flags["pointwise"]
        usual = predicted * np.where(pointwise, c.pointwise, 1.0)
        products = np.clip(predicted, measured, measured / c.pointwise)
        return _known(np.where(pointwise, measured, products), usual)

    def _compute(self, c: Constants, clock: Array, load: Array, old: Array, begin: Array) -> Array:
        """Of products; with their start."""
        flags, gpu = self.flags, self.gpu
        share = c.rate * np.where(flags["int8"], c.int8, 1.0) * np.where(flags["halved"], c.halved, 1.0)
        fed = np.where(flags["fp32"], 1.0, old)  # the FP32 cores need few operands
        share = share * np.where(flags["attention"], c.attention, 1.0) / fed
        lost = _large(gpu["sms"], c) / np.where(flags["attention"], c.attention, 1.0)
        quick, steady = (gpu[name] * 1e6 / lost for name in ("boost_tera_ops", "tera_ops"))
        boost = _known(quick, np.fmax(share * self.peak, steady))
        sustained = _known(steady, boost * clock)
        rate = np.where(np.isnan(steady), sustained, boost + (np.fmin(sustained, boost) - boost) * load)
        smaller = np.where(flags["convolution"], _EFFICIENCY ** (1 - c.small_tiles), 1.0)
        tiles = (self.waves + c.fill) * self.tiles * smaller * self.peak / rate
        one = len(TILES)
        whole, parts = tiles[:one].min(axis=0) + begin, tiles[one:].min(axis=0, initial=math.inf) + begin * c.split
        tiled = np.minimum(whole, parts)
        cores = 2 * self.macs / (gpu["fp32_ops"] * c.fp32_rate * clock)
        result: Array = np.where(flags["grouped"], np.minimum(cores, tiled), tiled)
        return result


def _values(gpu: Gpu) -> dict[str, float]:
    """What a GPU's kernels need to know of it; what was not measured is nan."""
    measured = gpu.measured or Measured()
    found = {
        "start_us": measured.start_us,
        "product_start_us": measured.product_start_us,
        "measured_gb_s": measured.bandwidth_gb_s,
        "l2_gb_s": measured.l2_gb_s,
        "factor": measured.factor,
        "start_factor": measured.start_factor,
    }
    return {
        "sms": gpu.sms,
        "boost_mhz": gpu.boost_mhz,
        "base_mhz": gpu.base_mhz,
        "l2_bytes": gpu.l2_mb * 2**20,
        "bandwidth_gb_s": gpu.bandwidth_gb_s,
        "fp32_ops": gpu.tera_ops["fp32_cores"] * 1e6,
        **{name: math.nan if value is None else value for name, value in found.items()},
    }


def _rate(gpu: Gpu, what: str, dtype: str) -> float:
    """A measured rate of a type, in 10^12 operations a second, or nan; of float16 that of the assumed accumulation."""
    rates = getattr(gpu.measured, what) if gpu.measured else {}
    accumulating = dtype == "float16" and gpu.accumulation == "float16" and "float16_accumulating" in rates
    return float(rates.get("float16_accumulating" if accumulating else dtype, math.nan))


def _halved(gpu: Gpu, dtype: str) -> bool:
    """Whether products of a type run at half of what the tensor cores do with the same operands."""
    if dtype == "float16":
        dtype = "" if gpu.accumulation == "float16" else dtype
    wide = ("float16",) if gpu.target == "sm75" else HALVED  # sm75 computes the others on its FP32 cores
    return dtype in wide and gpu.other_accumulation() is not None


def _known(measured: Array, predicted: Array | float) -> Array:
    return np.where(np.isnan(measured), predicted, measured)


def splits(work: Work, sms: int, tera_ops: float, begin_us: float, constants: Constants) -> bool:
    """Whether the sum of a product is split on a GPU with a measured rate, where one that is not begins in some us."""
    rate = tera_ops * 1e6 / _large(np.array([sms], float), constants)
    axes = (work.m / work.batch, work.n / work.groups, work.k, work.batch * work.groups, sms)
    m, n, k, batch, count = (np.array([axis], float) for axis in axes)
    waves, tiles = _tiling(m, n, k, batch, count, rate)
    power = constants.small_tiles if work.spatial else 1.0
    times = (waves + constants.fill) * tiles * _EFFICIENCY ** (1 - power)
    one = len(TILES)
    return bool(times[one:].min() + begin_us * constants.split < times[:one].min() + begin_us)


def _large(sms: Array, constants: Constants) -> Array:
    """What share of the SMs' rate the product reaches that their rate is measured by."""
    side, one = np.full(sms.shape, float(LARGE)), np.ones(sms.shape)
    waves, tiles = _tiling(side, side, side, one, sms, one)
    result: Array = 2 * side**3 / ((waves + constants.fill) * tiles)[: len(TILES)].min(axis=0)
    return result


def _tiling(m: Array, n: Array, k: Array, batch: Array, sms: Array, peak: Array) -> tuple[Array, Array]:
    """Waves of tiles over the SMs and microseconds of one tile at the peak, of each tile size and each split of K."""
    waves, tiles = [], []
    for split in SPLITS:
        for rows, columns, efficiency in TILES:
            count = batch * np.ceil(m / rows) * np.ceil(n / columns)
            none = (split > 1) & (count >= sms)
            part = np.maximum(k / split, LEAST) if split > 1 else k
            waves.append(np.where(none, math.inf, np.ceil(count * split / sms)))
            tiles.append(np.maximum(2 * rows * columns * part * sms / (peak * efficiency), 1e-30))
    return np.array(waves), np.array(tiles)


def _heads(m: Array, n: Array, k: Array, batch: Array, sms: Array, peak: Array) -> tuple[Array, Array]:
    """The same of fused attention: one tile size, K is not split."""
    rows = np.minimum(m / batch, ROWS)
    count = batch * np.ceil(m / batch / ROWS)
    none = np.full((len(TILES) * len(SPLITS) - 1, len(m)), math.inf)
    tile = np.maximum(2 * rows * n * k * sms / peak, 1e-30)
    return np.vstack([np.ceil(count / sms), none]), np.broadcast_to(tile, (len(none) + 1, len(m)))
