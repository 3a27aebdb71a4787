"""The search for a plan of several precisions: allocated by sums, then compiled and measured as a whole and repaired.

one engine for each candidate -> `Sum` of each cost -> `least` -> compiled and measured: where it is beyond a limit the
program is solved for less, where it is within by far for more -> sums are corrected by what was seen, and what they
give, and choices next to the best, are looked at; what does better is taken
Where sums mislead, what pairs of groups add is measured too. Every choice that was looked at is kept. What is measured
has quick scales, on the samples that the sensitivity is of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from engines.core.documents import replace
from engines.core.errors import BuildError
from qdq.assemble.held_out import HeldOutScore, Split, decibels, energies
from qdq.build.pricing.costing import MEMORY, SIZE, TIME, Cost, Costing
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.measure.inference.samples import Sample
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.plan.choice import FLOAT
from qdq.tune.sensitivity.mixed.allocate import Both, Chosen, Limit, Pair, Sum, flipped, least, neighbours
from qdq.tune.sensitivity.mixed.choices import Choices
from qdq.tune.sensitivity.mixed.goal import BETTER_DB, ERROR, OPTIONS, Goal, Quality, said
from qdq.tune.sensitivity.mixed.pairs import adjacent, correlated
from qdq.tune.sensitivity.mixed.sums import corrected, fitted, with_changes
from qdq.tune.sensitivity.table import Sensitivity

SHRINKS = 8  # times that the program is solved anew for what compiling and measuring showed
LOOKED_AT = 8  # choices next to the best that are looked at at a time
MEASURED, COMPILED = 24, 48  # choices in all, before the front is filled
MISLEADS_DB = 0.5  # between the sum and the whole: beyond it, pairs are measured
PAIRS = 12  # of which that is done
STEPS = 5  # of the front between its ends, for each cost
CLOSE = 1.02  # of sums of noises between which nothing more is looked for
LOOSER = 1.3  # noise allowed beyond the best, where a metric decides


@dataclass(slots=True, kw_only=True)
class Search:
    """The search for one model.

    Attributes:
        choices: of its candidates.
        found: their sensitivity.
        table: that serves all of them.
        samples: re-iterable, those of the sensitivity.
        costing: compiles and prices.
        goal: what is asked for.
        labelled: the samples with labels beside the inputs, for metrics of the goal; None: there are none.
        priced: whether times are known of every candidate.
        first: the first choice that keeps to the goal.
        how: each choice was come upon.
    """

    choices: Choices
    found: Sensitivity
    table: CalibrationTable
    samples: Iterable[Sample]
    costing: Costing
    goal: Goal
    labelled: Iterable[Sample] | None = None
    priced: bool = True
    on_progress: Progress | None = None
    steps: list[str] = field(default_factory=list)
    first: Chosen | None = None
    how: dict[Chosen, str] = field(default_factory=dict)
    _cost: dict[Chosen, Cost] = field(default_factory=dict)
    _quality: dict[Chosen, Quality] = field(default_factory=dict)
    _apart: dict[Chosen, float] = field(default_factory=dict)  # noise of choices that were not compiled
    _tried: set[Chosen] = field(default_factory=set)
    _sums: dict[str, Sum] = field(default_factory=dict)
    _score: HeldOutScore | None = None
    _model: tuple[Chosen, Model] | None = None

    def best(self) -> Chosen:
        """The choice that is best for the goal.

        Raises:
            InputError: nothing that was found keeps to the limits; says what the least reachable is.
            BuildError: the compiler refuses the model in float.
        """
        self._ends()
        best = self.first = self._allocated()
        if best is not None and self.goal.minimize == ERROR and self.goal.most:
            best = self._flipped() or best
        if best is None:
            raise InputError(self._refusal())
        self._measure_pairs(best)
        if self._sums[ERROR].pairs:
            best = self._allocated() or best
        bounded = self.goal.minimize != ERROR or self.goal.most  # without, float everywhere is the least error
        looked = -1
        while bounded and self._left() and len(self._tried) > looked:
            looked = len(self._tried)
            if (better := self._better(best)) is not None:  # else what was looked at corrects the sums
                self.steps.append(f"{self._words(better)} in place of {self._words(best)}")
                best = better
        return best

    def fill(self) -> None:
        """Look at the least error at some steps of each cost, within the limits: the front."""
        for name in (SIZE, *([TIME] if self.timed else [])):
            ends = [self.cost(self._floats).of[name], min(c.of[name] for c in self._cost.values())]
            for share in np.linspace(0.0, 1.0, STEPS + 2)[1:-1]:
                level = ends[1] + float(share) * (ends[0] - ends[1])
                if (chosen := least(self._sums[ERROR], [(self._sums[name], level), *self._cost_limits()])) is not None:
                    self._seen(chosen, f"least error within {said(name, level)}, by sums")

    def kept(self) -> list[Chosen]:
        """The choices that keep to the goal, of those that were compiled and measured."""
        return [chosen for chosen in self.looked_at if self._keeps(chosen)]

    @property
    def looked_at(self) -> list[Chosen]:
        """The choices that were compiled and measured, in that order."""
        return [chosen for chosen in self._quality if chosen in self._cost and not self._cost[chosen].refusal]

    @property
    def measured(self) -> int:
        """How many choices were measured."""
        return len(self._quality)

    @property
    def _floats(self) -> Chosen:
        return self.choices.everywhere(FLOAT)

    @property
    def timed(self) -> bool:
        """Whether times are predicted."""
        return self.priced and math.isfinite(self.cost(self._floats).of[TIME])

    def cost(self, chosen: Chosen) -> Cost:
        """What a choice costs, compiled once."""
        if chosen not in self._cost:
            self._tell(len(self._cost), "compiling")
            self._cost[chosen] = self.costing(self._made(chosen))
        return self._cost[chosen]

    def quality(self, chosen: Chosen) -> Quality:
        """How well a choice does as a whole, measured once."""
        if chosen not in self._quality:
            self._tell(len(self._quality), "measuring plans")
            self._quality[chosen] = self._compared(self._made(chosen))
        return self._quality[chosen]

    def sum_db(self, chosen: Chosen) -> float:
        """SQNR of a choice by the sum of its noises."""
        return decibels([1.0], [self._sums[ERROR].of(chosen)])

    def _tell(self, count: int, what: str) -> None:
        if self.on_progress is not None:
            self.on_progress(count, None, what)

    def _made(self, chosen: Chosen) -> Model:
        if self._model is None or self._model[0] != chosen:
            self._model = chosen, self.choices.model(chosen, self.table)
        return self._model[1]

    def _compared(self, model: Model) -> Quality:
        if self._score is None:
            held = Split(samples=self.samples, fit=(), held=frozenset(range(self.found.samples)))
            self._score = HeldOutScore(self.choices.candidates.model, held)
        counting = {bound.name: bound.counting() for bound in self.goal.bounds}
        labels = iter(self.labelled) if self.labelled is not None and counting else None
        both = dict[str, list[tuple[float, float]]]()
        for sample, found, expected in self._score.compared(model):
            for name in found:
                both.setdefault(name, []).append(energies({name: expected[name]}, {name: found[name]}))
            for each in counting.values():
                each.add(next(labels) if labels else sample, found, expected)
        apart_db = [decibels(*zip(*some, strict=True)) for some in both.values()]
        signals, noises = zip(*(pair for some in both.values() for pair in some), strict=True) if both else ((), ())
        return Quality(
            noise=10 ** (-decibels(signals, noises) / 10) if both else 0.0,
            worst_db=min(apart_db, default=math.inf),
            values={name: each.value for name, each in counting.items()},
        )

    def _seen(self, chosen: Chosen, how: str) -> None:
        """Compile and measure a choice."""
        self.how.setdefault(chosen, how)
        if not self.cost(chosen).refusal:
            self.quality(chosen)

    def _keeps(self, chosen: Chosen) -> bool:
        """Whether a choice keeps to the goal, as compiled and measured."""
        cost = self.cost(chosen)
        return not cost.refusal and not self.goal.over(cost.of) and self.goal.enough(self.quality(chosen))

    def _wins(self, chosen: Chosen, best: Chosen) -> bool:
        """Whether a choice that keeps to the goal is better by what counts."""
        if self.goal.minimize == ERROR:
            return self.quality(chosen).db > self.quality(best).db + BETTER_DB
        return self.goal.better(self.cost(chosen).of, self.cost(best).of)

    def _words(self, chosen: Chosen) -> str:
        if self.goal.minimize == ERROR:
            return f"measured {self.quality(chosen).db:.2f} dB"
        return said(self.goal.minimize, self.cost(chosen).of[self.goal.minimize])

    def _left(self) -> bool:
        return len(self._quality) < MEASURED and len(self._cost) < COMPILED

    def _ends(self) -> None:
        """Look at float and at each candidate everywhere, and make the sums of them."""
        floats = self._floats
        if why := self.cost(floats).refusal:
            raise BuildError(why)
        self._seen(floats, "float everywhere")
        noise = [dict(own) for own in self._noise()]
        for text in self.choices.candidates.plans:
            self._seen(chosen := self.choices.everywhere(text), f"{text} wherever it is possible")
            if why := self._cost[chosen].refusal:
                self.steps.append(f"{text} is left out, for the compiler refuses it: {why}")
                noise = [{name: n for name, n in own.items() if name != text} for own in noise]
        rounding = math.fsum(own[FLOAT] for own in noise)
        base = max(0.0, self.quality(floats).noise - rounding)  # of what has no choice, such as nodes of overrides
        self._sums = {ERROR: Sum(base=base if math.isfinite(base) else 0.0, groups=noise)}
        names = (SIZE, MEMORY, *([TIME] if self.timed else []))
        self._sums |= {name: fitted(name, noise, self.choices, self.cost) for name in names}
        if TIME in self._sums and TIME in self.goal.costs:
            self._sums[TIME] = with_changes(self._sums[TIME], self.choices, self.cost, COMPILED // 2)

    def _noise(self) -> list[dict[str, float]]:
        """Of each group, candidate -> noise over signal; of those that do something to it."""
        rows = self.found.groups
        return [{FLOAT: 0.0} | {t.candidate: t.noise for t in row.trials if t.noise is not None} for row in rows]

    def _measure_pairs(self, chosen: Chosen) -> None:
        """Where the sum misleads, measure what pairs of neighbours add, the loudest first."""
        error = self._sums[ERROR]
        measured, guess = self.quality(chosen).db, self.sum_db(chosen)
        if not abs(measured - guess) > MISLEADS_DB:
            return
        every = self.choices.candidates
        quantizes = list(every.plans)
        both = {(a, b): (chosen[a], chosen[b]) for a, b in adjacent(every.model, every.groups)}
        loud = {
            pair: error.groups[pair[0]][texts[0]] * error.groups[pair[1]][texts[1]]
            for pair, texts in both.items()
            if texts[0] in quantizes and texts[1] in quantizes
        }
        if not loud:
            return
        pairs = dict[Pair, Mapping[Both, float]]()
        for pair in sorted(loud, key=lambda p: -loud[p])[:PAIRS]:
            alone = tuple(text if g in pair else FLOAT for g, text in enumerate(chosen))
            self._apart[alone] = self._compared(self.choices.model(alone, self.table)).noise
            together = self._apart[alone] - error.base
            pairs[pair] = correlated(error.groups, pair, both[pair], together, quantizes)
        self._sums[ERROR] = replace(error, pairs=pairs)
        self.steps.append(
            f"errors do not add up: {guess:.2f} dB by the sum, {measured:.2f} measured; with {len(pairs)} pairs of "
            f"neighbours measured together {self.sum_db(chosen):.2f} by the sum"
        )

    def _cost_limits(self) -> list[Limit]:
        return [(self._sums[name], most) for name, most in self.goal.most.items() if name in self._sums]

    def _allocated(self) -> Chosen | None:
        """The best choice found by the program, corrected by what is compiled and measured; None: none keeps."""
        room, loud, seen = dict(self.goal.most), (0.0, math.inf), set[Chosen]()
        noise = 10 ** (-self.goal.least_db / 10)
        for _ in range(SHRINKS):
            limits = [(self._sums[name], most) for name, most in room.items()]
            limits += [(self._sums[ERROR], noise)] if math.isfinite(noise) else []
            chosen = least(self._sums[self.goal.minimize], limits)
            if chosen is None or self.cost(chosen).refusal:
                break
            self.how.setdefault(chosen, "allocated by sums")
            if over := self.goal.over(self.cost(chosen).of):
                room |= {name: self._sums[name].of(chosen) - more for name, more in over.items()}
                self.steps += [f"compiled {said(n, more)} more than allowed: chosen anew" for n, more in over.items()]
                continue
            if chosen not in seen:
                noise, loud = self._next_noise(chosen, loud)
            else:
                noise = _between(*loud)
            seen.add(chosen)
            if self.goal.minimize == ERROR or not self.goal.accurate or math.isnan(noise):
                break
        return min(self.kept(), key=self._rank, default=None)

    def _flipped(self) -> Chosen | None:
        """The best choice, those among them that flip groups greedily by size and by noise."""
        size, noise = self._sums[SIZE].groups, self._sums[ERROR].groups
        texts = sorted(self.choices.candidates.plans, key=lambda t: -math.fsum(own.get(t, own[FLOAT]) for own in size))
        flips = [(g, text) for text in texts for g, own in enumerate(noise) if text in own and text in size[g]]
        by_size = sorted(flips, key=lambda f: (texts.index(f[1]), -size[f[0]][FLOAT]))
        by_noise = sorted(flips, key=lambda f: noise[f[0]][f[1]])
        for what, order in (("size", by_size), ("noise", by_noise)):
            if (chosen := flipped(self._floats, order, self._cost_limits())) is not None:
                self._seen(chosen, f"flipped greedily by {what}")
        return min(self.kept(), key=self._rank, default=None)

    def _next_noise(self, chosen: Chosen, loud: tuple[float, float]) -> tuple[float, tuple[float, float]]:
        """The sum of noises to allow next, and the sums of the loudest choice that keeps and of what does not."""
        own, quality = self._sums[ERROR].of(chosen), self.quality(chosen)
        enough = self.goal.enough(quality)
        low, high = (max(loud[0], own), loud[1]) if enough else (loud[0], min(loud[1], own))
        ratio = 10 ** ((quality.worst_db - self.goal.least_db) / 10) if self.goal.min_db > -math.inf else math.inf
        if self.goal.bounds:  # of a metric it is not known how far it is in noise
            ratio = min(ratio, 2.0) if enough else min(ratio, 0.5)
        guess = own * ratio
        return (guess if low < guess < high else _between(low, high)), (low, high)

    def _rank(self, chosen: Chosen) -> tuple[float, float]:
        quality, cost = self.quality(chosen), self.cost(chosen).of
        return (quality.noise, cost[SIZE]) if self.goal.minimize == ERROR else (cost[self.goal.minimize], quality.noise)

    def _near(self, best: Chosen) -> Iterator[Chosen]:
        """What the program gives of sums corrected by all that is known, and choices next to one that keep by them."""
        cost, sums = self.cost(best).of, self._corrected()
        limits = [(s := sums[name], s.of(best) + most - cost[name]) for name, most in self.goal.most.items()]
        if self.goal.accurate:
            spare = LOOSER
            if self.goal.min_db > -math.inf:
                spare = 10 ** ((self.quality(best).worst_db - self.goal.least_db) / 10)
            limits.append((sums[ERROR], sums[ERROR].of(best) * max(spare, 1.0)))
        aim = sums[self.goal.minimize]
        again = least(aim, limits)
        for chosen in dict.fromkeys((*([again] if again else []), *neighbours(aim, best, limits))):
            if self.goal.minimize != ERROR and aim.of(chosen) >= aim.of(best):
                return
            if chosen not in self._tried:  # what has not won does not win against a better one
                yield chosen

    def _corrected(self) -> dict[str, Sum]:
        """The sums as whole choices have them that were looked at."""
        noises = {**self._apart, **{chosen: quality.noise for chosen, quality in self._quality.items()}}
        seen = {
            name: {chosen: cost.of[name] for chosen, cost in self._cost.items()} for name in self._sums if name != ERROR
        }
        return {name: corrected(each, seen.get(name, noises)) for name, each in self._sums.items()}

    def _better(self, best: Chosen) -> Chosen | None:
        """The best of the choices next to one that keep to the goal, if it is better."""
        found = list[Chosen]()
        for chosen in self._near(best):
            if len(found) >= LOOKED_AT or not self._left():
                break
            found.append(chosen)
            self._tried.add(chosen)
            self.how.setdefault(chosen, "next to the best so far")
            # what is minimized is looked at first, and the rest of those that win by it
            if self.goal.minimize != ERROR and (self.cost(chosen).refusal or not self._wins(chosen, best)):
                continue
            if self.goal.minimize != ERROR or self._wins(chosen, best):
                self._seen(chosen, "")
        winners = [c for c in found if c in self._quality and self._wins(c, best) and self._keeps(c)]
        return min(winners, key=self._rank, default=None)

    def _refusal(self) -> str:
        """What of the goal cannot be reached, and the least that can be of each limit."""
        lacking = [*self._too_loud(), *self._too_dear()]
        why = "; ".join(lacking) or "each limit can be reached, but not all together"
        return (
            f"No choice among {', '.join(dict.fromkeys((*self.choices.candidates.texts, FLOAT)))} keeps to what was "
            f"asked for: {why}. Give a looser limit, or other --candidates."
        )

    def _too_loud(self) -> Iterator[str]:
        """What of the accuracy nothing has reached."""
        most, asked = max(self._quality[c].worst_db for c in self.looked_at), self.goal.min_db
        if most < self.goal.least_db:
            spare = self.goal.least_db - asked
            yield f"the most that was reached is {most:.1f} dB; --min-sqnr-db is {asked:g}, and {spare:g} in reserve"
        for bound in self.goal.bounds:
            values = [self._quality[c].values[bound.name] for c in self.looked_at]
            top = max(values) if bound.higher_is_better else min(values)
            if not bound.kept(top):
                yield f"the best {bound.name} that was reached is {top:.4g}, and {bound} is asked for"

    def _too_dear(self) -> Iterator[str]:
        """The least that is reachable of each cost that is too high."""
        noise = [(self._sums[ERROR], 10 ** (-self.goal.least_db / 10))] if self.goal.min_db > -math.inf else []
        for name, most in self.goal.most.items():
            others = [limit for limit in self._cost_limits() if limit[0] is not self._sums[name]]
            found = [self._cost[c].of[name] for c in self.looked_at]
            if (chosen := least(self._sums[name], [*others, *noise])) is not None:
                found = [self.cost(chosen).of[name], *(found if not others and not noise else [])]
            if min(found) > most:
                within = " with the other limits kept" if others or noise else ""
                yield f"the least reachable{within} is {said(name, min(found))}, {OPTIONS[name]} is {said(name, most)}"


def _between(low: float, high: float) -> float:
    """A sum of noises between one that keeps and one that does not; NaN where there is none to look at."""
    if not low < high < math.inf or high < low * CLOSE:
        return math.nan
    return math.sqrt(low * high) if low > 0.0 else high / 2
