"""What a search chose without need: each part that gains no time is given back.

best variant, prices -> the plainest variant that is as fast, with a sentence per part that was given back

| of the best variant | what is taken if the best one does not gain more than a tie on it |
|---|---|
| everything quantized | the fastest float variant |
| a class of quantized nodes, coarser codes, a quantized shortcut | the more exact form |
| a float type that is larger than the usual one | the smaller, unless its outputs are poor |

A tie is one of `qdq.build.cost`. All that is given back together may cost no more than one, and what stays quantized
gains more than one on float. It must not make a variant less exact, but for the float type.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engines.core.documents import replace
from qdq.tune.moves import TYPE, WORTH, Move, into_exact, times_of
from qdq.tune.prices import Prices
from qdq.tune.variant_builder import Variant, VariantBuilder

POOR_DB = 40.0
"""SQNR of the outputs in a float type, nothing quantized, below which a larger type at the same time is better: an
error of 1 %. FP16 has 55 dB and more where nothing is near its limits."""


@dataclass(slots=True)
class GiveBack:
    """Gives parts of a variant back.

    Attributes:
        best: the variant, less what was given back so far.
        floating: the fastest variant with nothing quantized.
        poor_db: SQNR of the outputs in a float type below which that is poor.
        steps: one sentence for each part.
    """

    builder: VariantBuilder
    prices: Prices
    best: Variant
    floating: Variant
    poor_db: float = POOR_DB
    steps: list[str] = field(default_factory=list)
    _first: Variant = field(init=False)

    def __post_init__(self) -> None:
        """Keep what all that is given back is held against."""
        self._first = self.best

    def all(self) -> bool:
        """Take the float variant if the best gains nothing on it; True if it was taken."""
        if not self.best.quantized or self._costs(self.floating):
            return False
        times = f"{self.prices.us(self.best):.1f} us, {self.prices.us(self.floating):.1f} in float"
        self._take(self.floating, f"nothing quantized, for that gains nothing: {times}")
        return True

    def classes(self) -> None:
        """Take the more exact form of each class of nodes where that costs nothing, until each that is left pays."""
        before = None
        while self.best.quantized and not self.prices.late() and before != (self.best, len(self.prices.asked)):
            before = self.best, len(self.prices.asked)
            self._idle_classes()

    def _idle_classes(self) -> None:
        """Look at each class alone, as far as the budget goes, and take the idle ones together."""
        before, moves = self.best, into_exact(self.builder, self.best)
        times = times_of(moves, self.builder.base(before).model, self.prices(before))
        least = WORTH * self.prices.us(before)
        alone = self._affordable(sorted((m for m in moves if times[m] >= least), key=lambda m: times[m]), before)
        tried = zip(alone, self.prices.ahead(m.of(before) for m in alone), strict=False)
        idle = [m for m, variant in tried if not self.prices.gains(before, variant)]
        self._together(sorted(idle, key=lambda m: self.prices.us(m.of(before))))
        self._together([m for m in moves if times[m] < least])

    def _affordable(self, moves: Sequence[Move], before: Variant) -> list[Move]:
        """Those whose price is known, and of the others as many as leave half of the budget to make moves together."""
        count = min(self.prices.left / 2, len(moves))
        new = [m for m in moves if m.of(before) not in self.prices.asked][: int(count)]
        return [m for m in moves if m in new or m.of(before) in self.prices.asked]

    def type(self) -> None:
        """Take the smaller float type, or where that is poor the larger, if that costs nothing."""
        usual, *others = self.builder.unquantized_types
        for kind in ("", *others):
            other = Move(kind=TYPE, nodes=(kind,)).of(self.best)
            if other == self.best or (other not in self.prices.asked and self.prices.late()):
                continue
            if not self._costs(other) and self.poor() == bool(kind):
                times = f"{self.prices.us(other):.1f} us, {self.prices.us(self.best):.1f} before"
                why = f"the outputs in {usual} alone are poor" if kind else "it is as fast, and smaller"
                self._take(other, f"what is not quantized in {kind or usual}, for {why}: {times}")

    def poor(self) -> bool:
        """Whether the outputs of the model in the usual float type, nothing quantized, are."""
        found = self.builder.rounding_db(replace(self.best, quantized=frozenset(), unquantized_type=""))
        return found is not None and found < self.poor_db

    def _costs(self, other: Variant) -> bool:
        """Whether another variant is slower than the best or the first one, or loses their gain on float."""
        gains = self.prices.gains
        slower = gains(self.best, other) or gains(self._first, other)
        return slower or (bool(other.quantized) and gains(self.best, self.floating) and not gains(other, self.floating))

    def _together(self, moves: Sequence[Move]) -> None:
        """Make all of the moves if that costs nothing; if not, try either half. What is known needs no budget."""
        candidate = _after(self.best, moves)
        if candidate == self.best:
            return
        known = candidate in self.prices.asked or not self.prices.late()
        if known and not self._costs(candidate):
            names = ", ".join(map(str, moves[:2])) + (f" and {len(moves) - 2} more" if len(moves) > 2 else "")
            times = f"{self.prices.us(self.best):.1f} -> {self.prices.us(candidate):.1f} us"
            self._take(candidate, f"{names}, for less gains nothing: {times}")
        elif len(moves) > 1:
            half = len(moves) // 2
            self._together(moves[:half])
            self._together(moves[half:])

    def _take(self, variant: Variant, what: str) -> None:
        self.best = variant
        self.steps.append(what)


def plainest(prices: Prices, variants: Iterable[Variant]) -> Variant:
    """Of variants that tie with the fastest, the one in the usual float type, and with the fewest rewrites."""
    some = list(variants)
    fastest = min(some, key=prices.us)
    tied = [v for v in some if v == fastest or prices.tied(v, fastest)]
    return min(tied, key=lambda v: (bool(v.unquantized_type), len(v.rewrites)))


def _after(variant: Variant, moves: Iterable[Move]) -> Variant:
    for move in moves:
        variant = move.of(variant)
    return variant
