"""The fastest set of quantized nodes found that keeps a bound on the error, each candidate measured before it is taken.

fastest set of all -> measured -> keeps the bound: it is taken
else: noise of each unit alone, by `SetNoise` -> sets within a budget of noise (`WithinNoise`), the fastest measured
-> the budget is what the measured noise says of the sum -> until the sets at either side of the bound are next to each
other -> sets that differ from the best by a unit or two, those predicted to keep the bound measured, fastest first

What is measured is the plan as it is shipped, on calibration samples that were held out. How much is measured and run
depends on the model alone, so the same samples give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from engines.core.documents import replace
from qdq.build.pricing.tensorrt_pricer import Engines
from qdq.plan.plan import Plan
from qdq.tune.equivalence import classes, grouped
from qdq.tune.exact.node_prices import NodePrices
from qdq.tune.exact.switches import Switches
from qdq.tune.exact.unit_sum import UnitSum
from qdq.tune.exact.within_noise import WithinNoise
from qdq.tune.variant import Variant
from qdq.tune.variant_builder import VariantBuilder, restricted

RUN_MACS = 2e12  # multiply-adds spent on the noises of units: about a minute of two cores
MEASURED_MACS = 2e13  # on measuring plans
MOST_SAMPLES = 8  # that a noise is of
FEWEST_MEASURED, MOST_MEASURED = 6, 32  # plans
RUNS = 20  # of the model that measuring one plan takes, or so
CLOSE = 1.01  # ratio of budgets between which nothing more is looked for
NEAR = 10 ** (0.06)  # noise beyond the bound, as predicted, that is worth measuring
TRIED = 4  # neighbours of the best set that are measured at a time
LOOKED_AT = 24  # neighbours whose noise is run at a time

SwitchesOf = Callable[[Plan, int], Switches | None]


@dataclass(slots=True)
class SetNoise:
    """The noise over signal of sets of nodes, on a few samples: by switches, or a model each where there are none.

    Attributes:
        everything: all that may be quantized.
        switches_of: makes switches of a plan, or None.
        macs: multiply-adds of one run.
    """

    builder: VariantBuilder
    everything: Variant
    switches_of: SwitchesOf | None
    macs: float
    count: int = 1
    _switches: Switches | None = None

    def units(self, nodes: dict[str, tuple[str, ...]]) -> dict[str, float]:
        """The noise of each unit alone; where a run takes long, of several of a class together, shared alike."""
        self.count = int(min(max(RUN_MACS / (self.macs * max(len(nodes), 1)), 1), MOST_SAMPLES))
        if self.switches_of and self._switches is None:
            self._switches = self.switches_of(self.builder.plan_of(self.everything, ""), self.count)
        found = dict[str, float]()
        for some in self._together(nodes):
            own = frozenset(node for unit in some for node in nodes[unit])
            found |= dict.fromkeys(some, self(replace(self.everything, quantized=own)) / len(some))
        return found

    def __call__(self, variant: Variant) -> float:
        """The noise of a set."""
        if self._switches is None:
            return self.builder.noise(variant) or 0.0
        base = self.builder.base(variant)
        plan = restricted(base.model, base.plan, variant, "")
        return self._switches.noise([c for p in plan.points for c in p.consumers], count=self.count)

    def _together(self, nodes: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Units that are run together: each alone as far as that is affordable."""
        most = max(int(RUN_MACS / self.macs), 8)
        if len(nodes) <= most:
            return [(unit,) for unit in nodes]
        alike = grouped(nodes, classes(self.builder.base(self.everything).model))
        size = -(-len(nodes) // most)
        return [group[i : i + size] for group in alike for i in range(0, len(group), size)]


@dataclass(slots=True)
class BoundSearch:
    """The search for the fastest set within a bound.

    Attributes:
        prices: of variants.
        fastest: the fastest variant of each float type that keeps the bound by itself, whatever its noise.
        floors: float type -> noise over signal of rounding to it.
        noise: of sets.
        most: noise over signal that may be measured.
        measure: a variant -> SQNR in dB.
        steps: a sentence for each that was measured.
    """

    prices: NodePrices
    fastest: dict[str, Variant]
    floors: dict[str, float]
    noise: SetNoise
    most: float
    measure: Callable[[Variant], float]
    steps: list[str]
    left: int = MOST_MEASURED
    known: dict[Variant, float] = field(default_factory=dict)
    _sums: dict[str, WithinNoise] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """How many plans are measured depends on the size of the model."""
        self.left = int(min(max(MEASURED_MACS / (RUNS * self.noise.macs), FEWEST_MEASURED), MOST_MEASURED))

    def best(self) -> Variant | None:
        """The fastest variant found that keeps the bound; None where no quantized one does."""
        first = min(self.fastest.values(), key=self.prices.us, default=None)
        if first is None or not first.quantized or self.keeps(first):
            return first
        for kind, variant in self.fastest.items():
            engines, everything = self.prices.engines(kind), self._everything(kind)
            assert isinstance(engines, Engines)
            shared = self.prices.builder.shared(everything)
            total = UnitSum.of(engines, everything.quantized, at=variant.quantized, shared=shared)
            self._sums[kind] = WithinNoise(total, self.noise.units(dict(total.nodes)))
        found = self._between(first)
        return self._mended(found)

    def keeps(self, variant: Variant) -> bool:
        """Whether it keeps the bound, as measured."""
        return self.noise_measured(variant) <= self.most

    def noise_measured(self, variant: Variant) -> float:
        """Noise over signal of the plan as it is shipped."""
        if variant not in self.known:
            self.left -= 1
            decibels = self.measure(variant)
            self.known[variant] = 10 ** (-decibels / 10)
            count = len(variant.quantized)
            self.steps.append(f"measured {decibels:.1f} dB: {count} nodes, {self.prices.us(variant):.1f} us")
        return self.known[variant]

    def _everything(self, kind: str) -> Variant:
        return replace(self.noise.everything, unquantized_type=kind)

    def _set(self, kind: str, units: frozenset[str]) -> Variant:
        nodes = self._sums[kind].total.nodes_of(units)
        return replace(self._everything(kind), quantized=nodes) if nodes else Variant(unquantized_type=kind)

    def _units(self, variant: Variant) -> frozenset[str]:
        nodes = self._sums[variant.unquantized_type].total.nodes
        return frozenset(unit for unit, own in nodes.items() if variant.quantized.issuperset(own))

    def _sum_of(self, variant: Variant) -> float:
        """The sum of the noises of its units, each alone."""
        return self._sums[variant.unquantized_type].noise_of(self._units(variant))

    def _at(self, budget: float) -> Variant:
        """The fastest set whose noises add up to a budget at most."""
        return min((self._set(kind, each.fastest(budget)) for kind, each in self._sums.items()), key=self.prices.us)

    def _excess(self, variant: Variant) -> float:
        """Measured noise, less that of the float type, over what of it is allowed."""
        floor = self.floors[variant.unquantized_type]
        return max(self.noise_measured(variant) - floor, 1e-300) / max(self.most - floor, 1e-300)

    def _between(self, first: Variant) -> Variant | None:
        """The fastest set along the budgets of noise; each that is measured says what the next budget is."""
        found, low, high = None, 0.0, self._sum_of(first)
        budget = high / self._excess(first)
        while self.left > 0 and not self.prices.late() and high > CLOSE * low:
            if not low < budget < high:
                budget = math.sqrt(low * high) if low else high / 2
            variant = self._at(budget)
            own = self._sum_of(variant)
            if not variant.quantized or (variant in self.known and self.keeps(variant)):
                low = budget
            elif self.keeps(variant):
                found = min(filter(None, (found, variant)), key=self.prices.us)
                low = budget
            else:
                high = max(own, low)
            if not variant.quantized and low <= 0.0:
                break
            budget = own / self._excess(variant) if variant.quantized else high
        return found

    def _mended(self, best: Variant | None) -> Variant | None:
        """The best, changed by a unit or two as long as that is faster and keeps the bound, as measured."""
        while self.left > 0 and not self.prices.late():
            for candidate in islice(self._likely(best), TRIED):
                if self.left > 0 and self.keeps(candidate):
                    best = candidate
                    break
            else:
                break
        return best

    def _likely(self, best: Variant | None) -> Iterator[Variant]:
        """Sets next to the best that are faster and predicted to keep the bound, or nearly, the fastest first."""
        floating = min((Variant(unquantized_type=kind) for kind in self._sums), key=self.prices.us)
        start = best or floating
        each = self._sums[start.unquantized_type]
        units, before = self._units(start), self.noise(start) if best else 0.0
        us = each.total.us(units)
        faster = {some: time for some in each.neighbours(units) if (time := each.total.us(some)) < us - 1e-6}
        ratio = self._ratio(start) if best else self._ratio(min(self.known, key=lambda v: len(v.quantized)))
        floor = self.floors[start.unquantized_type]
        added = {some: ratio * (before + each.noise_of(some) - each.noise_of(units)) + floor for some in faster}
        near = [some for some in faster if added[some] <= NEAR * NEAR * self.most]
        near.sort(key=lambda some: (faster[some], sorted(some)))
        sets = [self._set(start.unquantized_type, some) for some in near]
        tried = [v for v in sets if v not in self.known and self.prices.us(v) < self.prices.us(start)][:LOOKED_AT]
        return (v for v in tried if ratio * self.noise(v) + floor <= NEAR * self.most)

    def _ratio(self, variant: Variant) -> float:
        """Measured noise over that of the few samples."""
        floor = self.floors[variant.unquantized_type]
        return max(self.noise_measured(variant) - floor, 0.0) / max(self.noise(variant), 1e-300)
