"""TensorRT's engine of a network with some products in INT8, predicted from TensorRT-RTX's float engine of it.

EngineWork of a float engine -> `TensorRtEngine`; + products in INT8 -> the work of TensorRT's engine, or `Terms`: the
time as a sum over products, groups of products and Q kernels, at the clock and with the weights that an engine has.
Must not know ONNX graphs, nor choose.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec

from engines.backends.layers import Layer
from engines.cost.constants import CONSTANTS
from engines.cost.gpus import Gpu
from engines.cost.kernel import Batch, Kernel
from engines.cost.predict import Cost, EngineWork
from engines.cost.tensorrt import Regions, quantizer
from engines.cost.work import ATTENTION, GROUPED, POINTWISE

_FILLED = 4  # times the multiply-adds: of groups of four channels, padded to eight, they are twice as many


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Microseconds as a function of the set of INT8 products.

        fixed + sum of alone over them - sum of gains of groups that are in the set as a whole
              + sum of costs of groups that have a member in it

    Gains and costs are not below 0, so the function is submodular.

    Attributes:
        fixed: with nothing in INT8.
        alone: product -> what it costs beyond that.
        gains: microseconds and group; each is saved where all of the group are in INT8.
        costs: microseconds and group; each is paid where one of the group is.
    """

    fixed: float
    alone: dict[int, float]
    gains: tuple[tuple[float, frozenset[int]], ...]
    costs: tuple[tuple[float, frozenset[int]], ...]

    def us(self, quantized: Collection[int]) -> float:
        """The time of a set."""
        chosen = frozenset(quantized)
        saved = sum(gain for gain, group in self.gains if group <= chosen)
        paid = sum(cost for cost, group in self.costs if group & chosen)
        return self.fixed + sum(us for i, us in self.alone.items() if i in chosen) - saved + paid


@dataclass(frozen=True)
class TensorRtEngine:
    """A float engine of TensorRT-RTX, as TensorRT would quantize it."""

    work: EngineWork

    @cached_property
    def regions(self) -> Regions:
        """Its tensors by type."""
        return Regions.of(self.work.layers, self.work.kernels)

    @cached_property
    def products(self) -> dict[int, tuple[str, ...]]:
        """Index of each kernel that multiplies, fused attention left out, and its ONNX nodes."""
        kernels = enumerate(zip(self.work.layers, self.work.kernels, strict=True))
        return {i: la.onnx_nodes for i, (la, k) in kernels if k.work.form not in (POINTWISE, ATTENTION)}

    def quantized(self, products: Container[int], *, apart: Container[int], target: str) -> EngineWork:
        """The work of TensorRT's engine.

        Args:
            products: those in INT8.
            apart: those of them whose shortcut reads the float tensor.
            target: that the engine is for, which TensorRT-RTX may not know.
        """
        work, found = self.work, self.regions.of_tensorrt(products, apart=apart)
        return replace(
            work,
            targets=(target,),
            layers=tuple(_derived(work.layers[i], kernel, quantizes=q) for i, kernel, q in found),
            kernels=tuple(kernel for _, kernel, _ in found),
            macs=tuple(0 if q else work.macs[i] for i, _, q in found),
            turns=tuple(work.turns[i] for i, _, _ in found),
        )

    def cost(
        self, gpu: Gpu, products: Container[int] = (), *, apart: Container[int] = ()
    ) -> tuple[Sequence[Layer], Cost]:
        """The layers of TensorRT's engine, and the predicted time of every kernel; arguments as of `quantized`."""
        work = self.quantized(products, apart=apart, target=gpu.target)
        cost, parts = work.on(gpu), zip(work.kernels, work.turns, strict=True)
        sizes = [round(k.work.read + k.work.written + k.work.weights) * turns for k, turns in parts]
        kernels = (replace(k, bytes=size) for k, size in zip(cost.kernels, sizes, strict=True))
        return work.layers, replace(cost, kernels=tuple(kernels))

    def terms(
        self, gpu: Gpu, candidates: Container[int], *, at: Container[int] = (), apart: Container[int] = ()
    ) -> Terms:
        """The time as a sum, for sets of candidates.

        Clock and share of the weights that stay in the L2 depend on the engine as a whole: here they are those of the
        set `at`, so the sum is what `cost` predicts of that set, and nearly so of sets like it.
        """
        regions, times = self.regions, _Times(self, gpu, at, apart)
        products = [i for i in self.products if i in candidates]
        fixed = {i: times(i, kernel) for i, kernel in enumerate(regions.kernels) if i not in regions.gone}
        alone = {i for i in products if i in apart and i in regions.shortcuts}
        halves = {i: times(i, regions.product(i, through=False, apart=i in alone)) for i in products}
        floated = {i: times(i, regions.dequantizer(i)) for i in products if i in regions.shortcuts and i not in alone}
        through = {i: times(i, regions.product(i, through=True)) for i in products}
        moved = {i: times(i, regions.mover(i)) for net in regions.nets for i in net.movers}
        between = {i: times(i, regions.between(i)) for i, ends in regions.pointwise.items() if ends}
        quantizers = {
            (size, elements, readers): times(readers[0], quantizer(size, elements))
            for net in regions.nets
            for size, elements, readers in regions.readers(net, apart)
        }
        us = times.measured()
        half = {i: us[halves[i]] + (us[floated[i]] if i in floated else 0.0) for i in products}
        gains, costs = [], []
        for net in regions.nets:
            paid = [
                (us[quantizers[read]], frozenset(i for i in read[2] if i in candidates))
                for read in regions.readers(net, apart)
            ]
            costs += [(cost, group) for cost, group in paid if group]
            ends = regions.ends(net, apart)
            if ends is not None and all(i in candidates for i in ends):
                written = sum(half[i] - us[through[i]] for i in net.writers)
                carried = sum(us[fixed[i]] - us[moved[i]] for i in net.movers)
                gains.append((written + carried + sum(cost for cost, group in paid if group), ends))
        for i, ends in regions.pointwise.items():
            if ends and i in between and all(j in candidates for j in ends):
                gains.append((us[fixed[i]] - us[between[i]], ends))
        return Terms(
            fixed=sum(us[place] for place in fixed.values()),
            alone={i: half[i] - us[fixed[i]] for i in products},
            gains=tuple((max(gain, 0.0), group) for gain, group in gains),
            costs=tuple(costs),
        )


def fills_groups(work: EngineWork) -> bool:
    """Whether a convolution multiplies channels of other groups by zeros, as TensorRT-RTX's for sm75 do.

    There its depthwise convolutions in float16 are grouped ones of eight channels, behind a copy that makes eight of
    each channel; TensorRT has a kernel of its own (../shared/docs/tensorrt_int8.md, 1.1).
    """
    products = zip(work.kernels, work.macs, work.turns, strict=True)
    return any(k.work.form == GROUPED and 0 < _FILLED * n <= k.work.macs * turns for k, n, turns in products)


class _Times:
    """Microseconds of kernels that an engine may have, at the clock of one that it has."""

    def __init__(self, engine: TensorRtEngine, gpu: Gpu, at: Container[int], apart: Container[int]) -> None:
        self._own = [kernel for _, kernel, _ in engine.regions.of_tensorrt(at, apart=apart)]
        self._engine, self._gpu, self._others, self._turns = engine, gpu, list[Kernel](), list[int]()

    def __call__(self, index: int, kernel: Kernel) -> int:
        """Note a kernel, in place of or before that of an index; returns its place."""
        self._others.append(replace(kernel, count=0))
        self._turns.append(self._engine.work.turns[index])
        return len(self._others) - 1

    def measured(self) -> Sequence[float]:
        """The times of all that was noted, in all turns."""
        total = Batch.of([([*self._own, *self._others], self._gpu)]).times(CONSTANTS).total[len(self._own) :]
        return [float(us) * turns for us, turns in zip(total, self._turns, strict=True)]


def _derived(layer: Layer, kernel: Kernel, *, quantizes: bool) -> Layer:
    """A layer as TensorRT has it, or the Q kernel before it; its kind tells what it multiplies in and carries."""
    carried = f"{kernel.dtype}, {round(kernel.work.read)} and {round(kernel.work.written)} bytes"
    if not quantizes:
        return msgspec.structs.replace(layer, kind=f"{layer.kind} ({carried})")
    return Layer(
        name=f"quantizer before {layer.name}",
        kind=f"quantize ({carried})",
        inputs=layer.inputs[:1],
        constants=(),
        outputs=(),
        tactic="",
        onnx_nodes=(),
    )
