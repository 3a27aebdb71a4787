"""Find the variant of a model that is predicted to run fastest once compiled, and quantizes nothing without need.

VariantBuilder -> starting points (float types; all quantized; with rewrites) -> the best -> moves on classes of alike
nodes, dearest first, each kept if the predicted time falls -> what gains nothing is given back -> Tuned: a Plan, its
price, and what it was compared with. But for a tie, no variant looked at that keeps the bound is predicted faster.
The same model, settings and budget give the same plan, unless the seconds end the search.
It must not know an engine: a `CostModel` compiles and prices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from engines.core.documents import replace
from qdq.build.cost import CostModel
from qdq.core.progress import Progress
from qdq.passes.rewrites import FLOAT_REWRITES, QUANTIZED_REWRITES
from qdq.plan.plan import Plan
from qdq.tune.decision import decided
from qdq.tune.give_back import POOR_DB, GiveBack, plainest
from qdq.tune.moves import TYPE, Move, finer_codes, into_float, into_quantized, possible, times_of
from qdq.tune.prices import Budget, Prices
from qdq.tune.tuned import Tuned
from qdq.tune.variant_builder import Variant, VariantBuilder

MARGIN_DB = 1.5  # asked for beyond the bound at first: quick scales, and one sample
RESERVE_DB = 0.5  # above the bound on calibration samples: others have less (DynUNet, 4 crops: by 0.3 and 0.8 dB)
SPARE_DB = 0.8  # aimed at above the bound, once quick and calibrated scales have been compared
SLACK_DB = 1.2  # above the bound: less is not worth another search
ROUNDS = 3  # of quantizing as it will be and searching on
FIRST = 0.7  # of the budget for the search before the first round
PATIENCE = 16  # moves in a row that gain nothing end a search: dearest first, the others have less to gain
GIVE_BACK = 0.2  # of the budget of a search, kept for giving back what gains nothing
MORE_BACK = 0.5  # of the variants that a search looked at: as many may be looked at to give back
SHARES = (1.0, 0.5, 0.25)  # of the products quantized, most multiply-adds per byte first: starting points
LEAST_US = 0.001  # of the time: what nodes take at least, where noise is weighed against time
APART = 0.05  # of the time: in variants that are listed, kernels of that share are others


def tune(
    builder: VariantBuilder,
    judge: CostModel,
    *,
    placement: bool = True,
    min_sqnr_db: float = -math.inf,
    measure: Callable[[Plan], float] | None = None,
    budget: Budget | None = None,
    listed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    on_progress: Progress | None = None,
) -> Tuned:
    """Find the variant with the least predicted time; of those that tie, a more exact one.

    Args:
        placement: also choose which nodes are quantized; False quantizes all that the rules want.
        min_sqnr_db: of the builder's samples; where the fastest variant has less, what costs least time for the noise
            that it takes away is given up until it has as much. Needs samples; means nothing without `placement`.
        measure: quantizes by a plan as it will be shipped, and says the SQNR in dB. What is given up is then adjusted
            by how far quick scales are from it; what does not keep the bound by this measure is not returned.
        budget: that no further variant is priced beyond, apart from those to compare with: nothing quantized, and
            everything. None is no limit.
        listed: quantized variants to list for who can measure, at most; 0 lists nothing.
        clock: seconds.
    """
    prices = Prices(builder=builder, judge=judge, clock=clock, on_progress=on_progress)
    search = Search(builder, prices, placement)
    return search.found(min_sqnr_db=min_sqnr_db, measure=measure, budget=budget or Budget(), listed=listed)


@dataclass(slots=True)
class Search:
    """The best so far, and every price asked for."""

    builder: VariantBuilder
    prices: Prices
    placement: bool
    best: Variant = field(default_factory=Variant)
    steps: list[str] = field(default_factory=list)
    ended: str = ""
    everywhere: Variant = field(default_factory=Variant)
    most: float = math.inf
    least_db: float = -math.inf
    _rounding_db: dict[str, float] = field(default_factory=dict)

    def found(
        self, *, min_sqnr_db: float, measure: Callable[[Plan], float] | None, budget: Budget, listed: int
    ) -> Tuned:
        """The outcome; arguments as of `tune`."""
        bounded = self.placement and min_sqnr_db > -math.inf and self.builder.samples is not None
        verified = measure if bounded else None
        if bounded:
            self.most = 10 ** (-(min_sqnr_db + MARGIN_DB) / 10)
            self.least_db = min_sqnr_db + RESERVE_DB
        self.run(budget.part(FIRST if verified else 1.0), first=True)
        if verified:
            self.verify(min_sqnr_db, verified, budget.part((1 - FIRST) / (ROUNDS - 1)))
        return replace(self.result(), listed=self.listed(listed))

    def run(self, budget: Budget, *, first: bool = False) -> None:
        """Search within a budget, a part of which is kept for giving back."""
        self.prices.allow(budget, kept=GIVE_BACK)
        if first:
            self.start()
        self.bound()
        self.descend()
        self.ended = self.ended or self.prices.ended
        self.prices.allow_rest(max(PATIENCE, MORE_BACK * len(self.prices.asked)))
        self.give_back()
        self.ended = self.ended or self.prices.ended

    def give_back(self) -> None:
        """Give back what gains nothing."""
        given = GiveBack(self.builder, self.prices, self.best, self.floating(), max(POOR_DB, self.least_db))
        if self.placement and not given.all():
            given.classes()
            given.floating = self.floating()
            given.all()
        given.type()
        self.best = given.best
        self.steps += given.steps

    def start(self) -> None:
        """Compile the starting points and stand on the best."""
        builder = self.builder
        usual = builder.usual
        everything = self.hoisted(replace(usual, quantized=frozenset(builder.quantizable(usual))))
        self.everywhere = everything
        self.us(everything)
        first = self.best = Variant() if self.placement else everything
        self.us(Variant())
        self.keep(everything, "quantized wherever it is possible")
        for unquantized_type in builder.unquantized_types[1:]:
            if self.prices.late():
                return
            move = Move(kind=TYPE, nodes=(unquantized_type,))
            self.keep(move.of(first), str(move))
        rewritten = replace(first, unquantized_type=self.best.unquantized_type)
        for _ in self.prices.ahead(self.together(rewritten)):
            pass
        for name in FLOAT_REWRITES:
            if self.prices.late():
                return
            if fits := builder.fits(name, rewritten):
                candidate = self.requantized(rewritten.with_rewrite(name, fits), self.us)
                rewritten = candidate if self.prices.gains(candidate, rewritten) else rewritten
        self.keep(rewritten, "rewrites of the float model")
        if self.placement:
            for start in self.prices.ahead(list(self.shares(rewritten))):
                self.keep(start, "quantized where products are many for their bytes")

    def together(self, variant: Variant) -> Iterator[Variant]:
        """With the first rewrite, the first two, and so on: what is looked at next if each is kept."""
        for name in FLOAT_REWRITES if self.prices.judge.width > 1 else ():
            if fits := self.builder.fits(name, variant):
                variant = self.requantized(variant.with_rewrite(name, fits), self.prices.foreseen)
                yield variant

    def requantized(self, variant: Variant, us: Callable[[Variant], float]) -> Variant:
        """With all quantized where that is not searched: a rewrite may make nodes that can be quantized."""
        if self.placement:
            return variant
        return self.hoisted(replace(variant, quantized=frozenset(self.builder.quantizable(variant))), us)

    def us(self, variant: Variant) -> float:
        """Its predicted microseconds."""
        return self.prices.us(variant)

    def hoisted(self, variant: Variant, us: Callable[[Variant], float] | None = None) -> Variant:
        """The same with each rewrite of the quantized stage that makes it better."""
        for name in QUANTIZED_REWRITES:
            if fits := self.builder.fits(name, variant):
                variant = min((variant, variant.with_rewrite(name, fits)), key=us or self.us)
        return variant

    def shares(self, variant: Variant) -> Iterator[Variant]:
        """Variants with a part of the products quantized, with and without rewrites that make more quantizable."""
        builder = self.builder
        for name in FLOAT_REWRITES:
            fits = builder.fits(name, variant)
            wider = variant.with_rewrite(name, fits) if fits else variant
            if len(builder.quantizable(wider)) > len(builder.quantizable(variant)):
                yield from self.parts(wider)
        yield from self.parts(variant)

    def parts(self, variant: Variant) -> Iterator[Variant]:
        """Variants with a share of the products quantized."""
        worth: dict[str, float] = {}
        for kernel in self.prices(variant).kernels:
            for node in kernel.nodes:
                worth[node] = max(worth.get(node, 0.0), kernel.macs / max(kernel.bytes, 1))
        order = sorted(self.builder.quantizable(variant), key=lambda node: -worth.get(node, 0.0))
        model = self.builder.base(variant).model
        convolutions = [node for node in order if model.node(node).op_type == "Conv"]
        chosen = [order[: round(share * len(order))] for share in SHARES]
        chosen += [convolutions] if 0 < len(convolutions) < len(order) else []
        for nodes in chosen:
            part = replace(variant, quantized=frozenset(nodes))
            full = part
            for name in QUANTIZED_REWRITES:
                full = full.with_rewrite(name, self.builder.fits(name, full))
            exact = {node for name, node in full.rewrites if name == "norm_scale"}  # these have one scale already
            level = frozenset(self.builder.fit_for_one_scale(part)) & part.quantized - exact
            for unshifted in (frozenset(self.builder.asymmetric(part)), frozenset[str]()):
                yield replace(full, per_tensor=level, unshifted=unshifted)
                yield replace(full, unshifted=unshifted)
            yield part

    def keep(self, variant: Variant, what: str, move: Move | None = None) -> bool:
        """Price a variant and stand on it if it gains more than a tie; what a move must gain, that move says."""
        before, after = self.prices(self.best), self.prices(variant)
        pays = move.pays(after, before) if move else after.gains_on(before)
        if not pays or not self.accurate(variant):
            return False
        self.steps.append(f"{what}: {before.us:.1f} -> {after.us:.1f} us")
        self.best = variant
        return True

    def descend(self) -> None:
        """Try every move on the best variant, dearest nodes first, until none is left that gains or patience ends."""
        failed: set[tuple[Variant, Move]] = set()
        gained, vain = True, 0
        while gained:
            gained, moves = False, possible(self.builder, self.best, self.prices(self.best), placement=self.placement)
            while moves:
                stands = self.best
                moves = [m for m in moves if m.of(stands) != stands and (stands, m) not in failed]
                for tried, candidate in enumerate(self.prices.ahead(m.of(stands) for m in moves)):
                    if self.keep(candidate, str(moves[tried]), moves[tried]):
                        gained, moves, vain = True, moves[tried + 1 :], 0
                        break
                    failed.add((stands, moves[tried]))
                    vain += 1
                    if vain == PATIENCE:
                        return
                else:
                    break
            if self.prices.late():
                return

    def accurate(self, variant: Variant) -> bool:
        """Whether it keeps the bound, if there is one."""
        return self.most == math.inf or not variant.quantized or (self.builder.noise(variant) or 0.0) <= self.most

    def allowed(self, variant: Variant) -> bool:
        """Whether it keeps the bound, also where nothing is quantized."""
        return self.accurate(variant) if variant.quantized else self.precise(variant.unquantized_type)

    def bound(self) -> None:
        """Where there is a bound: the best of what can be afforded from either side."""
        if self.most < math.inf:
            self.rescue()
            self.afford()

    def afford(self) -> None:
        """From nothing quantized: the classes of nodes that gain most time for their noise, within the bound."""
        base = self.floating()
        alone = {move: move.of(base) for move in into_quantized(self.builder, base)}
        gains = {}
        for move, variant in zip(alone, self.prices.ahead(alone.values()), strict=False):
            if (gain := self.us(base) - self.us(variant)) > 0:
                gains[move] = gain / max(self.builder.noise(variant) or 0.0, 1e-300)
        variant, prefixes = base, []
        for move in sorted(gains, key=lambda m: -gains[m]):
            if self.accurate(candidate := move.of(variant)):
                variant = candidate
                prefixes.append(variant)
        for prefix in self.prices.ahead(prefixes):
            self.keep(prefix, "quantized where it gains most for its noise")

    def rescue(self) -> None:
        """Where the fastest variant known breaks the bound: make it finer, then less quantized, until it keeps it."""
        fastest = min(self.prices.asked, key=self.us)
        if fastest == self.best or not fastest.quantized or self.prices.late():
            return
        finer, left = finer_codes(self.builder, fastest), into_float(self.builder, fastest)
        times = times_of([*finer, *left], self.builder.base(fastest).model, self.prices(fastest))
        finer.sort(key=lambda m: times[m])
        refined = self.fewest(fastest, finer)
        if refined is None:  # not enough: also leave nodes in float, where that takes most noise away for its time
            worth = {}
            for move in left:
                if not self.prices.late():
                    alone = replace(fastest, quantized=frozenset(move.nodes))
                    worth[move] = (self.builder.noise(alone) or 0.0) / max(times[move], LEAST_US * self.us(self.best))
            refined = self.fewest(fastest, [*finer, *sorted(worth, key=lambda m: -worth[m])])
        if refined is not None:
            self.keep(refined, "finer and fewer codes, for the bound")

    def verify(self, bound_db: float, measure: Callable[[Plan], float], budget: Budget) -> None:
        """Measure the best variant, and search on with what that says of quick scales, until it just keeps the bound.

        `measure` gives the SQNR in dB of a plan; each search has a budget of its own.
        """
        kept = self.floating()
        measured: set[Variant] = set()
        for left in reversed(range(ROUNDS)):
            if not self.best.quantized:
                break
            measured.add(self.best)
            real, noise = measure(self.builder.plan_of(self.best, "")), self.builder.noise(self.best)
            quick = -10 * math.log10(noise) if noise else math.inf
            self.steps.append(f"measured {real:.1f} dB with calibrated scales, {quick:.1f} dB with quick ones")
            enough = real >= bound_db + RESERVE_DB
            kept = min(kept, self.best, key=self.us) if enough else kept
            if not left or (enough and real < bound_db + SLACK_DB) or math.inf in (real, quick):
                break
            self.most = 10 ** (-(bound_db + SPARE_DB + quick - real) / 10)
            self.best = self.best if self.accurate(self.best) else self.floating()
            self.run(budget)
            if self.best in measured:
                break
        self.best = kept

    def fewest(self, variant: Variant, moves: list[Move]) -> Variant | None:
        """A variant after the fewest of the moves, in order, that keep the bound; None if all do not."""
        after = list(accumulate(moves, lambda v, move: move.of(v), initial=variant))
        if not moves or not self.accurate(after[-1]):
            return None
        low, high = 1, len(moves)
        while low < high:  # noise falls with each move, more or less
            middle = (low + high) // 2
            low, high = (low, middle) if self.accurate(after[middle]) else (middle + 1, high)
        return after[low]

    def floating(self) -> Variant:
        """The plainest of the fastest variants known with nothing quantized; if any keep the bound, of those."""
        known = [v for v in self.prices.asked if not v.quantized]
        kept = [v for v in known if math.isfinite(self.us(v)) and self.precise(v.unquantized_type)]
        return plainest(self.prices, kept or known)

    def precise(self, unquantized_type: str) -> bool:
        """Whether the model in a float type keeps the bound, if there is one."""
        if self.least_db == -math.inf:
            return True
        if unquantized_type not in self._rounding_db:
            found = self.builder.rounding_db(Variant(unquantized_type=unquantized_type))
            self._rounding_db[unquantized_type] = math.inf if found is None else found
        return self._rounding_db[unquantized_type] >= self.least_db

    def listed(self, count: int) -> tuple[Variant, ...]:
        """What may be taken by who measures, as far as accuracy goes.

        The best, and the fastest other quantized variants, of other kernels, up to a number; then those in float.
        """
        if not count:
            return ()
        found = [self.best] if self.best.quantized else []
        for variant, price in sorted(self.prices.asked.items(), key=lambda item: item[1].us):
            if len(found) == count or math.isinf(price.us):
                break
            apart = all(price.apart_us(self.prices(other)) > APART * price.us for other in found)
            if variant.quantized and apart and self.accurate(variant):
                found.append(variant)
        types = ("", *self.builder.unquantized_types[1:])
        precise = [kind for kind in types if self.precise(kind)] if self.placement else []
        plain = [Variant(unquantized_type=kind) for kind in precise or types]
        return tuple(dict.fromkeys([*found, *plain, self.floating()]))

    def result(self) -> Tuned:
        """The best variant as a plan."""
        asked, operands = self.prices.asked, self.builder.base(Variant()).plan.operands
        floating, plain = self.floating(), asked[Variant()]
        price, untuned = asked[self.best], self.us(self.everywhere)
        bound = "" if self.least_db == -math.inf else ", or costs more accuracy than the bound allows"
        why = (
            f"{operands} does not pay here{bound}: with the choice made, the model is predicted to take {price.us:.1f} "
            f"us; {untuned:.1f} with it wherever it is possible, {plain.us:.1f} without any"
        )
        if math.isinf(untuned):
            why = f"the model does not compile with {operands} wherever it is possible, and no fewer nodes were faster"
        usual = self.builder.unquantized_types[0]
        floats = {v.unquantized_type or usual: p for v, p in asked.items() if not (v.quantized or v.rewrites)}
        return Tuned(
            variant=self.best,
            plan=self.builder.plan_of(self.best, why),
            unquantized=self.builder.plan_of(floating, why),
            unquantized_price=asked[floating],
            floating=floating,
            everywhere=self.everywhere,
            operands=operands,
            price=price,
            plain=plain.us,
            untuned=untuned,
            fp32=floats["fp32"].us if "fp32" in floats else math.inf,
            tried=len(asked),
            ended=self.ended,
            refused={kind: p.refusal for kind, p in floats.items() if p.refusal},
            refusal=next((p.refusal for v, p in asked.items() if p.refusal and v.quantized), ""),
            decision=decided(asked, self.best, floating, accurate=self.allowed, placement=self.placement),
            steps=tuple(self.steps),
        )
