"""The fastest set of quantized nodes found that keeps a bound on the error, each candidate measured before it is taken.

fastest set of all -> measured -> keeps the bound: it is taken
else: noise of each unit alone, by `SetNoise` -> sets within a budget of noise (`WithinNoise`), the fastest measured
-> the budget is what the measured noise says of the sum -> until the sets at either side of the bound are next to each
other -> sets that differ from the best by a unit or two, or that none is both faster and less noisy than: of those
predicted to keep the bound the fastest is measured, then of those that nearly do

What is measured is the plan as it is shipped, on calibration samples that were held out. How much is measured and run
depends on the model alone, so the same samples give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from qdq.tune.variant_builder import Variant, VariantBuilder, restricted

RUN_MACS = 2e12  # multiply-adds spent on the noises of units: about a minute of two cores
MEASURED_MACS = 2e13  # on measuring plans
MOST_SAMPLES = 16  # that a noise is of
FEWEST_MEASURED, MOST_MEASURED = 6, 32  # plans
RUNS = 20  # of the model that measuring one plan takes, or so
CLOSE = 1.01  # ratio of budgets between which nothing more is looked for
NEAR = 10 ** (0.06)  # noise beyond the bound, as predicted, that is worth measuring
FEWEST_LOOKED_AT, MOST_LOOKED_AT = 24, 192  # sets whose noise is run at a time
SUMS = 2  # of times: at the clock of the fastest set, and of the one found

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
    _noises: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """How many plans are measured depends on the size of the model."""
        self.left = int(min(max(MEASURED_MACS / (RUNS * self.noise.macs), FEWEST_MEASURED), MOST_MEASURED))

    def best(self) -> Variant | None:
        """The fastest variant found that keeps the bound; None where no quantized one does."""
        first = min(self.fastest.values(), key=self.prices.us, default=None)
        if first is None or not first.quantized or self.keeps(first):
            return first
        found, at = None, self.fastest
        for _ in range(SUMS):
            for kind, variant in at.items():
                self._sums[kind] = self._summed(kind, variant)
            found = self._between(first, found)
            at = {kind: found or Variant(unquantized_type=kind) for kind in self.fastest}
        return self._mended(found)

    def _summed(self, kind: str, at: Variant) -> WithinNoise:
        """Sets of a float type by time, at the clock of a set, and noise."""
        engines, everything = self.prices.engines(kind), self._everything(kind)
        assert isinstance(engines, Engines)
        shared = self.prices.builder.shared(everything)
        total = UnitSum.of(engines, everything.quantized, at=at.quantized, shared=shared)
        if kind not in self._noises:
            self._noises[kind] = self.noise.units(dict(total.nodes))
        return WithinNoise(total, self._noises[kind])

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

    def _between(self, first: Variant, found: Variant | None) -> Variant | None:
        """The fastest set along the budgets of noise; each that is measured says what the next budget is."""
        low, high = 0.0, self._sum_of(first)
        budget = high / self._excess(first)
        while self.left > 0 and not self.prices.late() and high > CLOSE * low:
            if not low < budget < high:
                budget = math.sqrt(low * high) if low else high / 2
            variant = self._at(budget)
            own = self._sum_of(variant)
            if not variant.quantized:
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
        """The best, exchanged for one near it or of the front as long as that is faster and keeps the bound."""
        while self.left > 0 and not self.prices.late() and (candidate := self._likely(best)) is not None:
            if self.keeps(candidate):
                best = candidate
        return best

    def _likely(self, best: Variant | None) -> Variant | None:
        """A faster set next to the best, or of the front: the fastest predicted to keep the bound, or else nearly."""
        floating = min((Variant(unquantized_type=kind) for kind in self._sums), key=self.prices.us)
        start = best or floating
        each, floor = self._sums[start.unquantized_type], self.floors[start.unquantized_type]
        measured = [v for v in self.known if v.quantized and v.unquantized_type == start.unquantized_type]
        if not measured:
            return None
        near = min(measured, key=lambda v: (abs(math.log(self._excess(v))), self.prices.us(v)))
        added = max(self.noise_measured(near) - floor, 0.0)
        most = (NEAR * self.most - floor) / max(added, 1e-300)  # noise over that of the set whose ratio is taken
        units = self._units(start)
        us, highest = each.total.us(units), NEAR * most * self._sum_of(near)
        others = {some for some in (*each.neighbours(units), *each.front) if some and each.noise_of(some) <= highest}
        faster = {some: time for some in others if (time := each.total.us(some)) < us - 1e-6}
        looked = int(min(max(RUN_MACS / (self.noise.macs * MOST_SAMPLES), FEWEST_LOOKED_AT), MOST_LOOKED_AT))
        order = sorted(faster, key=lambda some: (faster[some], sorted(some)))
        sets = (self._set(start.unquantized_type, some) for some in order)
        new = islice((v for v in sets if v not in self.known and self.prices.us(v) < self.prices.us(start)), looked)
        noise = {v: self.noise(v) / max(self.noise(near), 1e-300) for v in new}
        keeping = [v for v, each in noise.items() if each * added + floor <= self.most]
        return next(iter(keeping or [v for v, each in noise.items() if each <= most]), None)
