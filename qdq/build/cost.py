"""What a compiled model is predicted to cost, kernel by kernel, who says so, and what difference of two is none.

Models -> `CostModel` -> Price each; two prices -> whether they tie. It must not know a compiler.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qdq.model.model import Model

TIE = 0.01
"""Two predictions tie if they differ by less than this share of the time of the kernels in which they differ.

Kernels that both models have are predicted alike, so only the others count. Latencies of one engine vary by 1 % from
run to run: a smaller gain is one that nobody can measure."""

TIE_US = 1.0
"""Two predictions tie below these microseconds too: under a third of what the start of one kernel costs (3.3 us at
1.41 GHz), so between models of as many kernels it is the rounding of the prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel: predicted microseconds, multiply-adds, bytes, the ONNX nodes in it, and what it reads and writes.

    For who reads of it: the compiler's word for its kind, the type it multiplies in, and what bounds its time.
    """

    us: float
    macs: int
    bytes: int
    nodes: tuple[str, ...]
    signature: str
    kind: str = ""
    dtype: str = ""
    bound: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What the compiled model is predicted to cost; infinite, without kernels, if it does not compile.

    Attributes:
        us: predicted microseconds.
        error: relative error of the time that two of three predictions keep to; None where it is not known.
        ratio_error: the same of the ratio of two forms of one network on one GPU, in which most of it falls out.
        refusal: what the compiler said of a model that does not compile.
        other: the price if FP16 products accumulate in the other type than is assumed; None where there is no other.
        weight_bytes: of the weights in the engine, the largest of its targets'; 0 where no engine is compiled.
        memory_bytes: of those and of what it computes, likewise.
        each: microseconds on each GPU, of which `us` is the mean.
    """

    us: float
    kernels: tuple[Kernel, ...] = ()
    error: float | None = None
    ratio_error: float | None = None
    refusal: str = ""
    other: Price | None = None
    weight_bytes: int = 0
    memory_bytes: int = 0
    each: tuple[float, ...] = ()

    def gains_on(self, before: Price) -> bool:
        """Whether it is predicted faster by more than a tie."""
        return self.us < before.us and before.us - self.us > self.tie(before)

    def ties(self, other: Price) -> bool:
        """Whether neither is predicted faster; what does not compile ties with nothing."""
        return math.isfinite(self.us + other.us) and abs(self.us - other.us) <= self.tie(other)

    def tie(self, other: Price) -> float:
        """Microseconds up to which a difference of the two is none, by `TIE` and `TIE_US`."""
        return max(TIE * self.apart_us(other), TIE_US)

    def apart_us(self, other: Price) -> float:
        """Microseconds of the kernels in which the two differ, of the one with more of them."""
        return max(_exclusive(self.kernels, other.kernels), _exclusive(other.kernels, self.kernels))


class PricedGpu(Protocol):
    """A GPU that times are predicted for, as far as a reader must know of it; see `engines.cost.gpus.Gpu`."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def accumulation(self) -> str:
        """Assumed of FP16 products: 'float16' or 'float32'."""

    @property
    def notes(self) -> Sequence[str]:
        """What who reads a predicted time of it must know."""

    def other_accumulation(self) -> PricedGpu | None:
        """The same under the other assumption, if that is another."""


class CostModel(Protocol):
    """Compiles and prices models."""

    @property
    def width(self) -> int:
        """How many are best priced at a time."""

    def many(self, models: Sequence[Model]) -> list[Price]:
        """The price of each."""

    def begin(self, model: Model) -> None:
        """Compile a model beside what follows, if there is a process for it; `many` waits for it then."""


def _exclusive(kernels: Sequence[Kernel], others: Sequence[Kernel]) -> float:
    """Microseconds of the kernels that are not among others."""
    left, alone = Counter(k.signature for k in others), []
    for kernel in kernels:
        if left[kernel.signature]:
            left[kernel.signature] -= 1
        else:
            alone.append(kernel.us)
    return math.fsum(alone)
