"""The prices that a search asked for, within a budget: the same ones, however many compilers run at a time.

Variant -> asked -> known ahead, or compiled -> Price. What is compiled ahead of time is no part of what was asked, so
neither the budget nor any choice depends on it. It must not choose.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qdq.build.cost import CostModel, Price
from qdq.core.progress import Progress
from qdq.model.model import Model
from qdq.tune.variant_builder import Variant, VariantBuilder

COMPILES, SECONDS = "compiles", "seconds"  # what can end a search


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a search may spend.

    Attributes:
        compiles: variants priced; a price that was kept from another run counts like one that is compiled.
        seconds: the outer limit, for machines on which the compiler is slow; a search that it ends depends on them.
    """

    compiles: float = math.inf
    seconds: float = math.inf

    def part(self, share: float) -> Budget:
        """A share of it."""
        return Budget(compiles=self.compiles * share, seconds=self.seconds * share)


@dataclass(slots=True)
class Prices:
    """The price of each variant that was asked for, in that order.

    Attributes:
        ended: what ended the search, `COMPILES` or `SECONDS`; "" where nothing did.
    """

    builder: VariantBuilder
    judge: CostModel
    clock: Callable[[], float] = time.monotonic
    on_progress: Progress | None = None
    asked: dict[Variant, Price] = field(default_factory=dict)
    ended: str = ""
    _ahead: dict[Variant, Price] = field(default_factory=dict)
    _written: dict[Variant, Model] = field(default_factory=dict)
    _begun: tuple[int, float] = (0, 0.0)
    _budget: Budget = field(default_factory=Budget)
    _most: float = math.inf
    _rest: float = math.inf
    _deadline: float = math.inf

    def allow(self, budget: Budget, *, kept: float = 0.0) -> None:
        """Let this much be spent from now on, but for a share that is kept until `allow_rest`."""
        self._begun, self._budget = (len(self.asked), self.clock()), budget
        self._allow(budget.part(1 - kept))

    def allow_rest(self, most: float) -> None:
        """Let be spent what is left of the budget, with what was kept, but no more than `most` further variants."""
        self._allow(self._budget)
        self._rest = len(self.asked) + most

    def _allow(self, budget: Budget) -> None:
        asked, clock = self._begun
        self._most, self._deadline = asked + budget.compiles, clock + budget.seconds
        self._rest, self.ended = math.inf, ""

    @property
    def left(self) -> float:
        """How many more variants may be asked for."""
        return max(min(self._most, self._rest) - len(self.asked), 0)

    def late(self) -> bool:
        """Whether the budget is spent, or what `allow_rest` left of it; from then on it stays so."""
        if not self.ended:
            spent, late = len(self.asked) >= self._most, self.clock() > self._deadline
            self.ended = COMPILES if spent else SECONDS if late else ""
        return bool(self.ended) or len(self.asked) >= self._rest

    def __call__(self, variant: Variant) -> Price:
        """Its price, compiled once."""
        if variant not in self.asked:
            if variant not in self._ahead:
                self._compile([variant])
            self.asked[variant] = self._ahead.pop(variant)
        return self.asked[variant]

    def us(self, variant: Variant) -> float:
        """Its predicted microseconds."""
        return self(variant).us

    def foreseen(self, variant: Variant) -> float:
        """Its predicted microseconds, for what is only compiled ahead: it counts as not asked for."""
        if variant not in self.asked and variant not in self._ahead:
            self._compile([variant])
        return (self.asked.get(variant) or self._ahead[variant]).us

    def gains(self, after: Variant, before: Variant) -> bool:
        """Whether a variant is predicted faster than another by more than a tie."""
        return self(after).gains_on(self(before))

    def tied(self, one: Variant, other: Variant) -> bool:
        """Whether neither of two is predicted faster."""
        return self(one).ties(self(other))

    def ahead(self, variants: Iterable[Variant]) -> Iterator[Variant]:
        """The same variants; the next ones are written while the judge compiles; ends when the budget is spent.

        Each must be asked for before the next is taken, or the budget would not see it. Making them may not ask for
        prices, or the order of asking would depend on how many are compiled at a time.
        """
        left, begun = iter(variants), deque[Variant]()
        try:
            while not self.late():
                while len(begun) < self.judge.width:  # whoever writes has the core of the compiler that waits
                    if (variant := next(left, None)) is None:
                        break
                    self._begin(variant)
                    begun.append(variant)
                if not begun:
                    return
                yield begun.popleft()
        finally:
            self._written.clear()  # of variants that were not asked for

    def _begin(self, variant: Variant) -> None:
        """Have a variant compiled beside what follows, where several are at a time."""
        if self.judge.width > 1 and not any(variant in known for known in (self.asked, self._ahead, self._written)):
            self._written[variant] = self.builder.model_of(variant)
            self.judge.begin(self._written[variant])

    def _compile(self, variants: Sequence[Variant]) -> None:
        if self.on_progress:
            self.on_progress(len(self.asked), None, "Tune")
        written, self._written = self._written, {v: m for v, m in self._written.items() if v not in variants}
        found = self.judge.many([written[v] if v in written else self.builder.model_of(v) for v in variants])
        self._ahead |= dict(zip(variants, found, strict=True))
