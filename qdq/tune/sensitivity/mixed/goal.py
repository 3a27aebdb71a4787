"""What a plan of several precisions is chosen for, what it must keep to, and the figures that decide.

options -> `Goal`; figures of a choice -> whether it keeps to the goal, and how much less of it another has
A figure that costs something is 'size' (bytes of the weights in the engine), 'memory' (of those and of what it
computes) or 'time' (microseconds); 'error' is noise over signal of the outputs. It must not compute one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qdq.build.pricing.costing import MEMORY, SIZE, TIME
from qdq.build.recipe import Recipe
from qdq.measure.inference.samples import Sample

MIB = 1 << 20
ERROR = "error"
UNITS = {SIZE: (MIB, "MiB"), MEMORY: (MIB, "MiB"), TIME: (1.0, "us")}
OPTIONS = {SIZE: "--max-size-mib", MEMORY: "--max-memory-mib", TIME: "--max-latency-us"}
RESERVE_DB = 0.5  # above a bound on calibration samples: others have less
BETTER_DB = 0.05  # by which another choice must win
BETTER = 0.002  # of a cost, likewise


class Counting(Protocol):
    """A metric of one model over samples."""

    def add(self, sample: Sample, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
        """Count one sample: its arrays, labels among them, the model's outputs and the float model's."""

    @property
    def value(self) -> float:
        """Over everything added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A metric and the value that it must reach.

    Attributes:
        name: as asked for.
        value: the least, or the most where lower is better.
        higher_is_better: of the metric.
        counting: makes one that has counted nothing.
    """

    name: str
    value: float
    higher_is_better: bool
    counting: Callable[[], Counting]

    def kept(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.value if self.higher_is_better else value <= self.value

    def __str__(self) -> str:
        """As in `dice of at least 0.9`."""
        return f"{self.name} of at {'least' if self.higher_is_better else 'most'} {self.value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well a choice does as a whole.

    Attributes:
        noise: over signal, of all outputs.
        worst_db: SQNR of the output that has least.
        values: of the metrics that are bounded.
    """

    noise: float
    worst_db: float
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def db(self) -> float:
        """SQNR of all outputs."""
        if self.noise <= 0:
            return math.inf
        return -10 * math.log10(self.noise) if math.isfinite(self.noise) else -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is asked of a plan.

    Attributes:
        minimize: 'error', 'size' or 'time'.
        most: cost -> the most that it may be, in bytes or microseconds.
        min_db: least SQNR of each output.
        bounds: of metrics.
    """

    minimize: str = ERROR
    most: Mapping[str, float] = field(default_factory=dict)
    min_db: float = -math.inf
    bounds: tuple[Bound, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, bounds: tuple[Bound, ...] = ()) -> Goal:
        """The goal of a recipe; of one that only picks from the front, the aim that its pick is nearest to."""
        asked = {SIZE: recipe.max_size_mib, MEMORY: recipe.max_memory_mib, TIME: recipe.max_latency_us}
        most = {name: value * UNITS[name][0] for name, value in asked.items() if value is not None}
        aims = {"smallest": SIZE, "fastest": TIME}
        aim = recipe.minimize or aims.get(recipe.pick, ERROR)
        return cls(minimize=aim, most=most, min_db=recipe.limits.get("min_sqnr_db", -math.inf), bounds=bounds)

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs that count."""
        return tuple(name for name in UNITS if name in self.most or name == self.minimize)

    @property
    def least_db(self) -> float:
        """What the worst output must have on calibration samples."""
        return self.min_db + RESERVE_DB

    @property
    def accurate(self) -> bool:
        """Whether accuracy is bounded."""
        return self.min_db > -math.inf or bool(self.bounds)

    def over(self, costs: Mapping[str, float]) -> dict[str, float]:
        """The costs that are beyond what they may be, and by how much."""
        return {name: costs[name] - most for name, most in self.most.items() if costs[name] > most * (1 + 1e-9)}

    def enough(self, quality: Quality) -> bool:
        """Whether the accuracy is what is asked for."""
        return quality.worst_db >= self.least_db and all(b.kept(quality.values[b.name]) for b in self.bounds)

    def better(self, costs: Mapping[str, float], than: Mapping[str, float]) -> bool:
        """Whether the cost that is minimized is less by what counts."""
        return costs[self.minimize] < than[self.minimize] * (1 - BETTER)


def said(name: str, value: float) -> str:
    """A cost in words.

    >>> said("size", 3 << 19)
    '1.500 MiB'
    >>> said("size", 1234)
    '0.00118 MiB'
    """
    unit, word = UNITS[name]
    digits = ".3g" if abs(value) < 0.1 * unit else ".3f" if unit > 1 else ".2f"
    return f"{value / unit:{digits}} {word}"
