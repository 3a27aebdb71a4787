"""The exact choice of what TensorRT runs in INT8: one compile a float type, then a minimum cut.

VariantBuilder -> float form of each float type -> compiled once -> time as a sum over nodes (`TensorRtEngine.terms`)
sum -> `cut.least` -> the set of nodes with the least predicted time -> what gains nothing is given back -> Tuned
with a bound on the error: + lambda x noise of each node alone, the least lambda whose set keeps the bound

The sum holds at one clock and one share of weights in the L2, those of the set that it was made for; it is made again
for the set that it gives, until that stays. Nodes that share a kernel are chosen together. The rewrites of a plan that
quantizes all are taken for float too, and no others are looked at: TensorRT has its own. It must not know an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from engines.core.documents import replace
from engines.core.errors import BuildError
from qdq.build.cost import Price
from qdq.build.pricing.pricer import refused
from qdq.build.pricing.tensorrt_pricer import Engines, TensorRtPricer
from qdq.core.progress import Progress
from qdq.model.model import Model
from qdq.plan.plan import Plan
from qdq.tune.equivalence import classes, grouped
from qdq.tune.exact.cut import least
from qdq.tune.prices import Budget, Prices
from qdq.tune.search import Search
from qdq.tune.tuned import Tuned
from qdq.tune.variant import Variant
from qdq.tune.variant_builder import VariantBuilder

ROUNDS = 4  # of a sum and its least set; the clock stays after one or two
HALVINGS = 12  # of the range of lambda, in which what is chosen changes


def tune_exactly(
    builder: VariantBuilder,
    judge: TensorRtPricer,
    *,
    placement: bool = True,
    min_sqnr_db: float = -math.inf,
    measure: Callable[[Plan], float] | None = None,
    budget: Budget | None = None,
    listed: int = 0,
    on_progress: Progress | None = None,
) -> Tuned:
    """The variant with the least predicted time in TensorRT; arguments as of `qdq.tune.search.tune`.

    The budget's seconds count; its compiles do not, for there is one a float type.
    """
    prices = NodePrices(builder=builder, judge=judge, engines_of=judge.engines, on_progress=on_progress)
    search = ExactSearch(builder, prices, placement)
    seconds = Budget(seconds=budget.seconds) if budget else Budget()
    return search.found(min_sqnr_db=min_sqnr_db, measure=measure, budget=seconds, listed=listed)


@dataclass(slots=True)
class NodePrices(Prices):
    """Prices by the set of quantized nodes, from engines that are compiled once a float type."""

    engines_of: Callable[[Sequence[Model]], list[Engines | BuildError]] = field(kw_only=True)
    _engines: dict[str, Engines | BuildError] = field(default_factory=dict)

    def prepare(self, types: Collection[str]) -> None:
        """Compile for float types, several at a time."""
        if not (missing := [kind for kind in types if kind not in self._engines]):
            return
        usual = self.builder.usual
        models = [self.builder.model_of(replace(usual, unquantized_type=kind)) for kind in missing]
        if self.on_progress:
            self.on_progress(0, None, "Compile")
        self._engines |= dict(zip(missing, self.engines_of(models), strict=True))

    def engines(self, unquantized_type: str) -> Engines | BuildError:
        """The engines of a float type."""
        self.prepare([unquantized_type])
        return self._engines[unquantized_type]

    def _compile(self, variants: Sequence[Variant]) -> None:
        self._ahead |= {variant: self._price(variant) for variant in variants}

    def _price(self, variant: Variant) -> Price:
        engines = self.engines(variant.unquantized_type)
        if isinstance(engines, BuildError):
            return refused(engines)
        return engines.price(variant.quantized, self.builder.shared(variant))


@dataclass(slots=True)
class ExactSearch(Search):
    """A search whose steps are cuts."""

    prices: NodePrices

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
        self.best = min(floats if self.placement else everything, key=self.us)
        self.everywhere = min(everything, key=self.us)

    @property
    def everything(self) -> Variant:
        """With all quantized that the rules want."""
        usual = self.builder.usual
        return replace(usual, quantized=frozenset(self.builder.quantizable(usual)))

    def choose(self) -> None:
        """Stand on the fastest set of each float type that keeps the bound."""
        for kind in ("", *self.builder.unquantized_types[1:]):
            if not isinstance(engines := self.prices.engines(kind), BuildError):
                variant = self.within(engines, kind)
                self.keep(variant, "the set of nodes with the least predicted time")

    def within(self, engines: Engines, kind: str) -> Variant:
        """The fastest set; with a bound, of those along the Lagrangian's cuts that keep it."""
        fastest = self.cut(engines, kind, {})
        if self.accurate(fastest):
            return fastest
        noises = self.noises()
        spread = self.us(self.floats(kind)) / max(max(noises.values(), default=0.0), 1e-300)
        low, high, found = math.log(spread) - 30.0, math.log(spread) + 1.0, self.floats(kind)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            weighed = self.cut(engines, kind, {node: math.exp(middle) * noise for node, noise in noises.items()})
            if self.accurate(weighed):
                high, found = middle, min(found, weighed, key=self.us)
            else:
                low = middle
        return found

    def floats(self, kind: str) -> Variant:
        """With nothing quantized."""
        return Variant(unquantized_type=kind)

    def noises(self) -> dict[str, float]:
        """The noise of each node alone: that of its class, shared alike."""
        everything = self.everything
        found = dict[str, float]()
        for group in grouped(sorted(everything.quantized), classes(self.builder.base(everything).model)):
            noise = self.builder.noise(replace(everything, quantized=frozenset(group))) or 0.0
            found |= dict.fromkeys(group, noise / len(group))
        return found

    def cut(self, engines: Engines, kind: str, weights: Mapping[str, float]) -> Variant:
        """The fastest of the sets found: a sum at the clock of one gives the next.

        Args:
            weights: microseconds that a node costs beside its time.
        """
        everything = replace(self.everything, unquantized_type=kind)
        tried, at = [everything], everything
        for _ in range(ROUNDS):
            nodes = _cheapest(engines, at.quantized, everything.quantized, self.builder.shared(everything), weights)
            at = replace(everything, quantized=nodes) if nodes else self.floats(kind)
            if at in tried:
                break
            tried.append(at)
        return min(
            (*tried, self.floats(kind)), key=lambda v: self.us(v) + sum(weights.get(n, 0.0) for n in v.quantized)
        )


def _cheapest(
    engines: Engines,
    at: Collection[str],
    candidates: Collection[str],
    shared: Collection[str],
    weights: Mapping[str, float],
) -> frozenset[str]:
    """The nodes with the least sum of times, made for the engine of a set."""
    units = _units(engines, candidates)
    alone = dict.fromkeys(units.values(), 0.0)
    for node, unit in units.items():
        alone[unit] += weights.get(node, 0.0)
    gains, costs = [], []
    for gpu, engine in engines.pairs:
        kernels = {i: own for i, own in engines.kernels(engine).items() if own and own <= units.keys()}
        chosen = [i for i, own in kernels.items() if own <= set(at)]
        terms = engine.terms(gpu, kernels, at=chosen, apart=engines.apart(engine, shared))
        unit_of = {i: units[min(own)] for i, own in kernels.items()}
        share = 1 / len(engines.pairs)
        for i, us in terms.alone.items():
            alone[unit_of[i]] += us * share
        gains += [(us * share, {unit_of[i] for i in group}) for us, group in terms.gains]
        costs += [(us * share, {unit_of[i] for i in group}) for us, group in terms.costs]
    best = least(alone, gains, costs)
    return frozenset(node for node, unit in units.items() if unit in best)


def _units(engines: Engines, candidates: Collection[str]) -> dict[str, str]:
    """Node -> a name for those that are chosen together, because they share a kernel; only of kernels that can be INT8.

    A node of no kernel, or of one with a product that is no candidate, has no unit.
    """
    parent = {node: node for node in candidates}
    hopeless, seen = set[str](), set[str]()

    def root(node: str) -> str:
        while parent[node] != node:
            node = parent[node]
        return node

    for own in _groups(engines):
        mine = sorted(own & parent.keys())
        seen.update(mine)
        if mine and len(mine) < len(own):
            hopeless.update(mine)
        for node in mine[1:]:
            parent[root(node)] = root(mine[0])
    lost = {root(node) for node in hopeless}
    return {node: root(node) for node in sorted(seen) if root(node) not in lost}


def _groups(engines: Engines) -> Iterator[frozenset[str]]:
    return chain.from_iterable(engines.kernels(engine).values() for _, engine in engines.pairs)
