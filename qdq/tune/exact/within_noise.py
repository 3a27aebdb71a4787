"""The set of units with the least time whose noise is within a budget, where time and noise are sums over units.

`UnitSum` + noise of each unit -> `front`, and corners of the hull of (noise, time) by minimum cuts -> from those at
either side of the budget: units taken out for the least time per noise, then single changes while any gains
The front is exact where no set was left out of it, as with few units. Minimum cuts weigh time against noise, so they
find the corners alone (Everett, Generalized Lagrange multiplier method, 1963), but with any number of units.
It must not run a model: a noise is a number here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from qdq.tune.exact import front
from qdq.tune.exact.unit_sum import UnitSum

SMALL = 12  # units of a group of which any two are put in together
MOST_CORNERS = 24  # cuts
SWAPPED = 96  # units up to which exchanges of two are looked at
LEAST_US = 1e-6  # of a change that counts


@dataclass(slots=True)
class WithinNoise:
    """Sets of units by time and noise; the same arguments give the same sets.

    Attributes:
        total: the time.
        noise: of each unit, not below 0.
        front: sets of which none is both faster and less noisy than another, the fastest first.
    """

    total: UnitSum
    noise: Mapping[str, float]
    front: list[frozenset[str]] = field(init=False)
    _corners: list[frozenset[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find the front, and the corners of the hull."""
        self.front = sorted(front.front(self.total, self.noise), key=self._key)
        fastest, empty = self.total.least(), frozenset[str]()
        self._corners = [empty, fastest]
        open_pairs = [(empty, fastest)]
        while open_pairs and len(self._corners) < MOST_CORNERS:
            low, high = open_pairs.pop(0)
            noise = self.noise_of(high) - self.noise_of(low)
            if low == high or noise <= 0:
                continue
            price = (self.total.us(low) - self.total.us(high)) / noise  # microseconds for noise, along the chord
            found = self.total.least({unit: price * each for unit, each in self.noise.items()})
            if found in self._corners or not self.noise_of(low) < self.noise_of(found) < self.noise_of(high):
                continue
            self._corners.append(found)
            open_pairs += [(low, found), (found, high)]

    def noise_of(self, units: Collection[str]) -> float:
        """The sum of their noises."""
        return sum(self.noise[unit] for unit in sorted(units))

    def fastest(self, budget: float) -> frozenset[str]:
        """The fastest set found whose noise is not above a budget."""
        inside = [c for c in (*self.front, *self._corners) if self.noise_of(c) <= budget]
        outside = [c for c in self._corners if self.noise_of(c) > budget]
        starts = [min(inside, key=self._key), *sorted(outside, key=self.noise_of)[:2]]
        return min((self._improved(start, budget) for start in starts), key=self._key)

    def neighbours(self, units: frozenset[str]) -> Iterator[frozenset[str]]:
        """The sets that differ by one unit more or less, two more that share a group, or one for another."""
        out = [unit for unit in self.total.nodes if unit not in units]
        yield from (units | {unit} for unit in out)
        yield from (units - {unit} for unit in sorted(units))
        yield from (units | {a, b} for a, b in self._pairs() if a not in units and b not in units)
        if len(self.total.nodes) <= SWAPPED:
            yield from (units - {old} | {new} for old in sorted(units) for new in out)

    def _key(self, units: frozenset[str]) -> tuple[float, float, list[str]]:
        return self.total.us(units), self.noise_of(units), sorted(units)

    def _pairs(self) -> list[tuple[str, str]]:
        found = {(a, b) for _, group in self.total.gains if len(group) <= SMALL for a in group for b in group if a < b}
        return sorted(found)

    def _improved(self, start: frozenset[str], budget: float) -> frozenset[str]:
        """Take out what costs least time for its noise until the budget is kept, then change while that gains."""
        walk, noise = _Walk(self.total, start), self.noise_of(start)
        while noise > budget:
            loud = [unit for unit in sorted(walk.units) if self.noise[unit] > 0]
            unit = min(loud, key=lambda u: walk.without(u) / min(self.noise[u], noise - budget))
            walk.take_out(unit)
            noise = self.noise_of(walk.units)
        while (change := self._best_change(walk, budget - noise)) is not None:
            for unit in change:
                (walk.take_out if unit in walk.units else walk.put_in)(unit)
            noise = self.noise_of(walk.units)
        return frozenset(walk.units)

    def _best_change(self, walk: _Walk, spare: float) -> tuple[str, ...] | None:
        """The change that gains most time; None where none gains."""
        out = [unit for unit in self.total.nodes if unit not in walk.units]
        best, found = -LEAST_US, None

        def look(us: float, change: tuple[str, ...]) -> None:
            nonlocal best, found
            if us < best - LEAST_US:
                best, found = us, change

        for unit in sorted(walk.units):
            look(walk.without(unit), (unit,))
        for unit in (u for u in out if self.noise[u] <= spare):
            look(walk.with_(unit), (unit,))
        for a, b in self._pairs():
            if a in walk.units or b in walk.units or self.noise[a] + self.noise[b] > spare:
                continue
            us = walk.with_(a)
            walk.put_in(a)
            look(us + walk.with_(b), (a, b))
            walk.take_out(a)
        for old in sorted(walk.units) if len(self.total.nodes) <= SWAPPED else ():
            us = walk.without(old)
            walk.take_out(old)
            for new in (u for u in out if self.noise[u] <= spare + self.noise[old]):
                look(us + walk.with_(new), (old, new))
            walk.put_in(old)
        return found


class _Walk:
    """A set of units, and what one more or less changes."""

    def __init__(self, total: UnitSum, units: Collection[str]) -> None:
        self._total, self.units = total, set[str]()
        self._gains, self._costs = (_by_unit(groups) for groups in (total.gains, total.costs))
        self._within, self._met = Counter[int](), Counter[int]()
        for unit in sorted(units):
            self.put_in(unit)

    def put_in(self, unit: str) -> None:
        """One more."""
        self._count(unit, 1)
        self.units.add(unit)

    def take_out(self, unit: str) -> None:
        """One less."""
        self._count(unit, -1)
        self.units.remove(unit)

    def with_(self, unit: str) -> float:
        """Microseconds that a unit more costs."""
        saved = sum(us for i, us, size in self._gains.get(unit, ()) if self._within[i] == size - 1)
        paid = sum(us for i, us, _ in self._costs.get(unit, ()) if self._met[i] == 0)
        return self._total.alone[unit] - saved + paid

    def without(self, unit: str) -> float:
        """Microseconds that a unit less costs."""
        saved = sum(us for i, us, size in self._gains.get(unit, ()) if self._within[i] == size)
        paid = sum(us for i, us, _ in self._costs.get(unit, ()) if self._met[i] == 1)
        return saved - paid - self._total.alone[unit]

    def _count(self, unit: str, step: int) -> None:
        for i, _, _ in self._gains.get(unit, ()):
            self._within[i] += step
        for i, _, _ in self._costs.get(unit, ()):
            self._met[i] += step


def _by_unit(groups: Collection[tuple[float, frozenset[str]]]) -> dict[str, list[tuple[int, float, int]]]:
    """Unit -> number, microseconds and size of each group that it is in."""
    found: dict[str, list[tuple[int, float, int]]] = {}
    for i, (us, group) in enumerate(groups):
        for unit in group:
            found.setdefault(unit, []).append((i, us, len(group)))
    return found
