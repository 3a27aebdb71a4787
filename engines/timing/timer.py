"""What measures engines, and what it gives: times of single inferences on the GPU, and when each began.

engines -> `Timer` -> `Timing` each: median, spread, and the part of a run that is asked for.
Must not touch a GPU: `engines.timing.events` does, and tests have timers of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engines.backends.compiler import Engine
from engines.core.errors import EngineError, OutOfMemoryError

Arrays = Mapping[str, npt.NDArray[np.generic]]


class TimingError(EngineError):
    """A time that cannot be measured, or says nothing."""


class GpuMemoryError(TimingError, OutOfMemoryError):
    """The GPU has too little memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One engine to measure.

    Attributes:
        engine: compiled for the GPU of this machine, with fixed shapes.
        repeats: inferences, one after the other, in each interval that is timed; more of them make the resolution of
            the clock and what surrounds an inference smaller.
    """

    engine: Engine
    repeats: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Measured times of one engine.

    Attributes:
        us: (n) microseconds of one inference in each interval.
        at_s: (n) seconds from the beginning of the run to that of each interval, rising.
        graph: whether a captured graph was replayed; else the kernels were launched one by one.
    """

    us: tuple[float, ...]
    at_s: tuple[float, ...] = field(repr=False)
    graph: bool = True

    def __post_init__(self) -> None:
        """Refuses what says nothing.

        Raises:
            TimingError: no time, one that is not above zero, or not one beginning for each.
        """
        if not self.us or len(self.us) != len(self.at_s) or not min(self.us) > 0:
            raise TimingError(f"{len(self.us)} times and {len(self.at_s)} beginnings are no timing: {self.us[:3]}.")

    @property
    def median_us(self) -> float:
        """Median of the times: a few disturbed ones do not move it."""
        return float(np.median(self.us))

    @property
    def spread_us(self) -> float:
        """Distance of the quartiles: half of the times lie that close together."""
        low, high = np.percentile(self.us, (25, 75))
        return float(high - low)

    @property
    def error_us(self) -> float:
        """Standard error of the median: 0.93 times the distance of the quartiles over the root of their number.

        Source: 1.253 sigma / sqrt(n) for the median of normal errors, the quartiles being 1.349 sigma apart.
        """
        return float(0.93 * self.spread_us / math.sqrt(len(self.us)))

    def between(self, first_s: float, last_s: float) -> Timing:
        """The intervals that began in a part of the run; the nearest one where none did."""
        kept = [i for i, at in enumerate(self.at_s) if first_s <= at <= last_s]
        middle = (first_s + last_s) / 2
        kept = kept or [min(range(len(self.at_s)), key=lambda i: abs(self.at_s[i] - middle))]
        return Timing(us=tuple(self.us[i] for i in kept), at_s=tuple(self.at_s[i] for i in kept), graph=self.graph)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One kernel, by the name that the layer table has, and its microseconds by the runtime's profiler."""

    name: str
    us: float


class Timer(Protocol):
    """Runs engines on one GPU and says how long they took there."""

    def times(self, loads: Sequence[Load], *, seconds: float, rest_s: float = 0.0) -> list[Timing]:
        """The times of several engines, which take turns: what disturbs one disturbs the others.

        Args:
            loads: what to measure; each round begins with another of them.
            seconds: of the whole run, all engines together.
            rest_s: seconds of rest before it, for the clock to recover.

        Raises:
            TimingError: the GPU refuses an engine or a launch.
        """

    def outputs(self, engine: Engine, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """The outputs of one inference.

        Args:
            engine: as of `Load`.
            inputs: an array of each input's shape and type, by its name.

        Raises:
            TimingError: as `times`.
        """

    def kernel_times(self, engine: Engine, runs: int) -> list[KernelTime]:
        """The median time of each kernel over some inferences.

        Kernels are launched one by one: their sum is more than an inference.

        Args:
            engine: as of `Load`.
            runs: inferences.

        Raises:
            TimingError: as `times`.
        """
