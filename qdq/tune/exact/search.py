"""The exact choice of what TensorRT runs in INT8: one compile a float type, then a minimum cut.

VariantBuilder -> float form of each float type -> compiled once -> time as a sum over nodes (`TensorRtEngine.terms`)
sum -> `cut.least` -> the set of nodes with the least predicted time -> what gains nothing is given back -> Tuned
with a bound on the error: `bounded`, the fastest set found that keeps it, measured

The sum holds at one clock and one share of weights in the L2, those of the set that it was made for; it is made again
for the set that it gives, until that stays. Nodes that share a kernel are chosen together. The rewrites of a plan that
quantizes all are taken for float too, and no others are looked at: TensorRT has its own. It must not know an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from engines.core.documents import replace
from engines.core.errors import BuildError
from qdq.build.pricing.tensorrt_pricer import Engines, TensorRtPricer
from qdq.core.progress import Progress
from qdq.plan.plan import Plan
from qdq.tune.exact.bounded import BoundSearch, SetNoise, SwitchesOf
from qdq.tune.exact.node_prices import NodePrices
from qdq.tune.exact.unit_sum import UnitSum
from qdq.tune.prices import Budget
from qdq.tune.search import RESERVE_DB, Search
from qdq.tune.tuned import Tuned
from qdq.tune.variant_builder import Variant, VariantBuilder

ROUNDS = 4  # of a sum and its least set; the clock stays after one or two
FASTEST = "the set of nodes with the least predicted time"


def tune_exactly(
    builder: VariantBuilder,
    judge: TensorRtPricer,
    *,
    placement: bool = True,
    min_sqnr_db: float = -math.inf,
    measure: Callable[[Plan], float] | None = None,
    switches: SwitchesOf | None = None,
    budget: Budget | None = None,
    listed: int = 0,
    on_progress: Progress | None = None,
) -> Tuned:
    """The variant with the least predicted time in TensorRT; arguments as of `qdq.tune.search.tune`.

    The budget's seconds count; its compiles do not, for there is one a float type.

    Args:
        switches: makes the noise of parts of a plan known; None: each set that is looked at is a model of its own.
    """
    prices = NodePrices(builder=builder, judge=judge, engines_of=judge.engines, on_progress=on_progress)
    search = ExactSearch(builder, prices, placement, switches=switches)
    seconds = Budget(seconds=budget.seconds) if budget else Budget()
    return search.found(min_sqnr_db=min_sqnr_db, measure=measure, budget=seconds, listed=listed)


@dataclass(slots=True)
class ExactSearch(Search):
    """A search whose steps are cuts."""

    prices: NodePrices
    switches: SwitchesOf | None = None
    measure: Callable[[Plan], float] | None = None
    bounded: BoundSearch | None = None

    def found(
        self, *, min_sqnr_db: float, measure: Callable[[Plan], float] | None, budget: Budget, listed: int
    ) -> Tuned:
        """The outcome; arguments as of `tune`."""
        if self.placement and min_sqnr_db > -math.inf and self.builder.samples is not None:
            self.least_db, self.measure = min_sqnr_db + RESERVE_DB, measure
        self.run(budget, first=True)
        return replace(self.result(), listed=self.listed(listed))

    def run(self, budget: Budget, *, first: bool = False) -> None:
        """Choose, and give back what gains nothing."""
        self.prices.allow(budget)
        if first:
            self.start()
        if self.placement:
            self.choose()
        self.give_back()
        self.ended = self.ended or self.prices.ended

    def start(self) -> None:
        """Price what all is compared with."""
        types = ("", *self.builder.unquantized_types[1:])
        self.prices.prepare(types)
        floats = [self.floats(kind) for kind in types]
        compiling = [kind for kind in types if not isinstance(self.prices.engines(kind), BuildError)]
        everything = [replace(self.everything, unquantized_type=kind) for kind in compiling or types]
        unquantized, self.everywhere = (min(some, key=self.us) for some in (floats, everything))
        self.best = unquantized if self.placement else self.everywhere

    @property
    def everything(self) -> Variant:
        """With all quantized that the rules want."""
        usual = self.builder.usual
        return replace(usual, quantized=frozenset(self.builder.quantizable(usual)))

    def choose(self) -> None:
        """Stand on the fastest set of each float type; with a bound, on the fastest found that keeps it."""
        types = ("", *self.builder.unquantized_types[1:])
        engines = {kind: engines for kind in types if isinstance(engines := self.prices.engines(kind), Engines)}
        if self.least_db == -math.inf:
            for kind, some in engines.items():
                self.keep(self.cut(some, kind), FASTEST)
            return
        fastest = {kind: self.cut(some, kind) for kind, some in engines.items() if self.precise(kind)}
        first = next(iter(engines.values()), None)
        macs = max((sum(engine.work.macs) for _, engine in first.pairs), default=1) if first else 1
        self.bounded = BoundSearch(
            prices=self.prices,
            fastest=fastest,
            floors={kind: 10 ** (-self._rounding_db[kind] / 10) for kind in fastest},
            noise=SetNoise(self.builder, self.everything, self.switches, max(macs, 1)),
            most=10 ** (-self.least_db / 10),
            measure=self.measured_db,
            steps=self.steps,
        )
        if (best := self.bounded.best()) is not None:
            self.keep(best, f"{FASTEST} that keep the bound")

    def measured_db(self, variant: Variant) -> float:
        """The SQNR in dB of a variant as it is shipped, or of one sample with quick scales where nobody measures."""
        if self.measure is not None:
            return self.measure(self.builder.plan_of(variant, ""))
        noise = self.builder.noise(variant)
        return -10 * math.log10(noise) if noise else math.inf

    def give_back(self) -> None:
        """Give back what gains nothing; with a bound, if what is left still keeps it, as measured."""
        before = self.best
        Search.give_back(self)
        if self.bounded and self.best.quantized and not self.bounded.keeps(self.best):
            self.best = before

    def accurate(self, variant: Variant) -> bool:
        """Whether it keeps the bound, if there is one: only what was measured does."""
        if self.bounded is None or not variant.quantized:
            return True
        return self.bounded.known.get(variant, math.inf) <= self.bounded.most

    def floats(self, kind: str) -> Variant:
        """With nothing quantized."""
        return Variant(unquantized_type=kind)

    def cut(self, engines: Engines, kind: str) -> Variant:
        """The fastest of the sets found: a sum at the clock of one gives the next."""
        everything = replace(self.everything, unquantized_type=kind)
        tried, at = [everything], everything
        for _ in range(ROUNDS):
            shared = self.builder.shared(everything)
            total = UnitSum.of(engines, everything.quantized, at=at.quantized, shared=shared)
            nodes = total.nodes_of(total.least())
            at = replace(everything, quantized=nodes) if nodes else self.floats(kind)
            if at in tried:
                break
            tried.append(at)
        return min((*tried, self.floats(kind)), key=self.us)
