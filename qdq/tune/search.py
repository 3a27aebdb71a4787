"""Find the variant of a model that is predicted to run fastest once compiled.

VariantBuilder -> starting points (float types; all quantized; with rewrites) -> the best -> moves on classes of alike
nodes, dearest first, each kept if the predicted time falls -> Tuned: a Plan, its price, and what it was compared with.
The price is never above that of any variant looked at, so never above the float model's or the untuned plan's.
It must not know an engine: a `CostModel` compiles and prices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice

from engines.core.documents import replace
from qdq.build.cost import CostModel, Price
from qdq.core.progress import Progress
from qdq.passes.rewrites import FLOAT_REWRITES, QUANTIZED_REWRITES
from qdq.plan.plan import Plan
from qdq.tune.moves import LEAST_GAIN, TYPE, Move, finer_codes, into_float, into_quantized, possible, times_of
from qdq.tune.tuned import Tuned
from qdq.tune.variant import Variant
from qdq.tune.variant_builder import VariantBuilder

MARGIN_DB = 1.5  # asked for beyond the bound at first: quick scales, and one sample
RESERVE_DB = 0.5  # above the bound on calibration samples: others have less (DynUNet, 4 crops: by 0.3 and 0.8 dB)
SPARE_DB = 0.8  # aimed at above the bound, once quick and calibrated scales have been compared
SLACK_DB = 1.2  # above the bound: less is not worth another search
ROUNDS = 3  # of quantizing as it will be and searching on
FIRST = 0.7  # of the time for the search before the first round
SHARES = (1.0, 0.5, 0.25)  # of the products quantized, most multiply-adds per byte first: starting points


def tune(
    builder: VariantBuilder,
    judge: CostModel,
    *,
    placement: bool = True,
    min_sqnr_db: float = -math.inf,
    measure: Callable[[Plan], float] | None = None,
    time_limit_s: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    on_progress: Progress | None = None,
) -> Tuned:
    """Find the variant with the least predicted time.

    Args:
        placement: also choose which nodes are quantized; False quantizes all that the rules want.
        min_sqnr_db: of the builder's samples; where the fastest variant has less, what costs least time for the noise
            that it takes away is given up until it has as much. Needs samples; means nothing without `placement`.
        measure: quantizes by a plan as it will be shipped, and says the SQNR in dB. What is given up is then adjusted
            by how far quick scales are from it; what does not keep the bound by this measure is not returned.
        time_limit_s: seconds after which no further variant is compiled, apart from those to compare with: nothing
            quantized, and everything.
        clock: seconds.
    """
    bounded = placement and min_sqnr_db > -math.inf and builder.samples is not None
    verified = measure if bounded else None
    first = time_limit_s * (FIRST if verified else 1)
    search = _Search(builder, judge, placement, clock() + first, clock, on_progress)
    if bounded:
        search.most = 10 ** (-(min_sqnr_db + MARGIN_DB) / 10)
    search.start()
    search.bound()
    search.descend()
    if verified:
        search.verify(min_sqnr_db, verified, time_limit_s * (1 - FIRST) / (ROUNDS - 1))
    return search.result()


@dataclass(slots=True)
class _Search:
    """The best so far, and every price known."""

    builder: VariantBuilder
    judge: CostModel
    placement: bool
    deadline: float
    clock: Callable[[], float]
    on_progress: Progress | None
    best: Variant = field(default_factory=Variant)
    prices: dict[Variant, Price] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    complete: bool = True
    plain: float = math.inf
    untuned: float = math.inf
    most: float = math.inf

    def price(self, variant: Variant) -> Price:
        """Compile a variant, once."""
        if variant not in self.prices:
            self.learn([variant])
        return self.prices[variant]

    def learn(self, variants: Sequence[Variant]) -> None:
        """Compile variants at the same time."""
        if self.on_progress:
            self.on_progress(len(self.prices), None, "Tune")
        found = self.judge.many([self.builder.model_of(v) for v in variants])
        self.prices |= dict(zip(variants, found, strict=True))

    def ahead(self, variants: Iterable[Variant]) -> Iterator[Variant]:
        """The same variants, as many at a time compiled as the judge can; ends when the time is up."""
        left = iter(variants)
        while not self.late() and (some := list(islice(left, self.judge.width))):
            unknown = [v for v in dict.fromkeys(some) if v not in self.prices]
            if len(unknown) > 1:
                self.learn(unknown)
            yield from some

    def start(self) -> None:
        """Compile the starting points and stand on the best."""
        builder = self.builder
        usual = builder.usual
        everything = self.hoisted(replace(usual, quantized=frozenset(builder.quantizable(usual))))
        self.untuned = self.price(everything).us
        self.plain = self.price(Variant()).us
        first = self.best = Variant() if self.placement else everything
        self.keep(everything, "quantized wherever it is possible")
        for unquantized_type in builder.unquantized_types[1:]:
            if self.late():
                return
            move = Move(kind=TYPE, nodes=(unquantized_type,))
            self.keep(move.of(first), str(move))
        rewritten = replace(first, unquantized_type=self.best.unquantized_type)
        for _ in self.ahead(self.together(rewritten)):
            pass
        for name in FLOAT_REWRITES:
            if self.late():
                return
            if fits := builder.fits(name, rewritten):
                candidate = self.requantized(rewritten.with_rewrite(name, fits))
                rewritten = min((rewritten, candidate), key=self.us)
        self.keep(rewritten, "rewrites of the float model")
        if self.placement:
            for start in self.ahead(self.shares(rewritten)):
                self.keep(start, "quantized where products are many for their bytes")

    def together(self, variant: Variant) -> Iterator[Variant]:
        """With the first rewrite, the first two, and so on: what is looked at next if each is kept."""
        for name in FLOAT_REWRITES if self.judge.width > 1 else ():
            if fits := self.builder.fits(name, variant):
                variant = self.requantized(variant.with_rewrite(name, fits))
                yield variant

    def late(self) -> bool:
        """Whether the time is up."""
        self.complete = self.complete and self.clock() <= self.deadline
        return not self.complete

    def requantized(self, variant: Variant) -> Variant:
        """With all quantized where that is not searched: a rewrite may make nodes that can be quantized."""
        if self.placement:
            return variant
        return self.hoisted(replace(variant, quantized=frozenset(self.builder.quantizable(variant))))

    def us(self, variant: Variant) -> float:
        """Its predicted microseconds."""
        return self.price(variant).us

    def hoisted(self, variant: Variant) -> Variant:
        """The same with each rewrite of the quantized stage that makes it better."""
        for name in QUANTIZED_REWRITES:
            if fits := self.builder.fits(name, variant):
                variant = min((variant, variant.with_rewrite(name, fits)), key=self.us)
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
        for kernel in self.price(variant).kernels:
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

    def keep(self, variant: Variant, what: str, least: float = 0.0) -> bool:
        """Compile a variant and stand on it if it is better by a share of the time."""
        before, after = self.us(self.best), self.us(variant)
        if not after < before * (1 - least) or not self.accurate(variant):
            return False
        self.steps.append(f"{what}: {before:.1f} -> {after:.1f} us")
        self.best = variant
        return True

    def descend(self) -> None:
        """Try every move on the best variant, dearest nodes first, until none is left that gains."""
        failed: set[tuple[Variant, Move]] = set()
        gained = True
        while gained:
            gained, moves = False, possible(self.builder, self.best, self.price(self.best), placement=self.placement)
            while moves:
                stands = self.best
                moves = [m for m in moves if m.of(stands) != stands and (stands, m) not in failed]
                for tried, candidate in enumerate(self.ahead(m.of(stands) for m in moves)):
                    if self.keep(candidate, str(moves[tried]), moves[tried].least_gain):
                        gained, moves = True, moves[tried + 1 :]
                        break
                    failed.add((stands, moves[tried]))
                else:
                    break
            if self.late():
                return

    def accurate(self, variant: Variant) -> bool:
        """Whether it keeps the bound, if there is one."""
        return self.most == math.inf or not variant.quantized or (self.builder.noise(variant) or 0.0) <= self.most

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
        for move, variant in zip(alone, self.ahead(alone.values()), strict=False):
            if (gain := self.us(base) - self.us(variant)) > 0:
                gains[move] = gain / max(self.builder.noise(variant) or 0.0, 1e-300)
        variant, prefixes = base, []
        for move in sorted(gains, key=lambda m: -gains[m]):
            if self.accurate(candidate := move.of(variant)):
                variant = candidate
                prefixes.append(variant)
        for prefix in self.ahead(prefixes):
            self.keep(prefix, "quantized where it gains most for its noise")

    def rescue(self) -> None:
        """Where the fastest variant known breaks the bound: make it finer, then less quantized, until it keeps it."""
        fastest = min(self.prices, key=self.us)
        if fastest == self.best or not fastest.quantized or self.late():
            return
        finer, left = finer_codes(self.builder, fastest), into_float(self.builder, fastest)
        times = times_of([*finer, *left], self.builder.base(fastest).model, self.price(fastest))
        finer.sort(key=lambda m: times[m])
        refined = self.fewest(fastest, finer)
        if refined is None:  # not enough: also leave nodes in float, where that takes most noise away for its time
            worth = {}
            for move in left:
                if not self.late():
                    alone = replace(fastest, quantized=frozenset(move.nodes))
                    worth[move] = (self.builder.noise(alone) or 0.0) / max(times[move], LEAST_GAIN * self.us(self.best))
            refined = self.fewest(fastest, [*finer, *sorted(worth, key=lambda m: -worth[m])])
        if refined is not None:
            self.keep(refined, "finer and fewer codes, for the bound")

    def verify(self, bound_db: float, measure: Callable[[Plan], float], seconds: float) -> None:
        """Measure the best variant, and search on with what that says of quick scales, until it just keeps the bound.

        `measure` gives the SQNR in dB of a plan; each search has some `seconds`.
        """
        kept, complete = self.floating(), self.complete
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
            self.deadline, self.complete = self.clock() + seconds, True
            self.bound()
            self.descend()
            complete = complete and self.complete
            if self.best in measured:
                break
        self.best, self.complete = kept, complete

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
        """The fastest variant known with nothing quantized."""
        return min((v for v in self.prices if not v.quantized), key=self.us)

    def result(self) -> Tuned:
        """The best variant as a plan."""
        price, operands = self.price(self.best), self.builder.base(Variant()).plan.operands
        floating = self.floating()
        why = (
            f"{operands} does not pay here: with the choice made, the model is predicted to take {price.us:.1f} us; "
            f"{self.untuned:.1f} with it wherever it is possible, {self.plain:.1f} without any"
        )
        if math.isinf(self.untuned):
            why = f"the model does not compile with {operands} wherever it is possible, and no fewer nodes were faster"
        return Tuned(
            variant=self.best,
            plan=self.builder.plan_of(self.best, why),
            unquantized=self.builder.plan_of(floating, why),
            unquantized_us=self.us(floating),
            operands=operands,
            price=price,
            plain=self.plain,
            untuned=self.untuned,
            tried=len(self.prices),
            complete=self.complete,
            steps=tuple(self.steps),
        )
