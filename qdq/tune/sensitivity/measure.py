"""The sensitivity of a model: which trials are run to the outputs, and what follows for the others.

candidates -> first candidate of each group to the outputs, the others up to the probes -> noise in proportion
-> some of these on one sample to the outputs, as a check: a candidate that scales badly is run to the outputs too
-> sums over samples, whatever their order -> `Sensitivity`. It must not run a model: a `Runner` does.

Source: the error at the outputs without labels as the measure of sensitivity: Pandey et al., arXiv 2302.05397.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from qdq.core.arrays import spearman
from qdq.core.errors import InputError
from qdq.measure.table import samples_digest
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.run import Runner
from qdq.tune.sensitivity.table import Check, GroupRow, Sensitivity, Trial
from qdq.tune.sensitivity.unit import Task

CHECKED = 0.2  # of the groups that a candidate is scaled in, FEWEST at least
FEWEST = 3
MEDIAN_DB, LARGEST_DB = 1.0, 3.0  # by which scaled noises may differ from those of trials run to the outputs


def sensitivity(
    candidates: Candidates, runner: Runner, hashes: Sequence[str], *, metric: str = "", scale: bool = True
) -> Sensitivity:
    """The error of each group in each candidate at the outputs.

    Args:
        candidates: of the model.
        runner: computes trials on samples by their numbers.
        hashes: SHA-256 of each sample, in the order of the numbers.
        metric: that the runner computes beside the noise, "" for none. With one, every trial is run to the outputs.
        scale: noises in proportion, where that is right; False runs every trial to the outputs.

    Raises:
        InputError: no group, no sample, or float outputs that hold nothing.
    """
    if not candidates.groups:
        raise InputError(f"Nothing to measure: no candidate quantizes anything. {candidates.measuring.why_nothing}")
    if not hashes:
        raise InputError("There are no samples: sensitivity needs at least one.")
    search = _Search(candidates=candidates, runner=runner, hashes=hashes, scale=scale and not metric)
    search.measure()
    signal = math.fsum(runner.signals[number] for number in range(len(hashes)))
    if not signal > 0:
        raise InputError("The outputs of the float model are zero on every sample: no error can be told against them.")
    return Sensitivity(
        model_sha256=candidates.model.sha256,
        samples_sha256=samples_digest(hashes),
        samples=len(hashes),
        settings=candidates.settings,
        unquantized_type=candidates.unquantized_type,
        rewrites=candidates.rewrites,
        candidates=candidates.texts,
        metric=metric,
        groups=tuple(search.rows(signal)),
        check=search.check,
    )


@dataclass(slots=True, kw_only=True)
class _Search:
    """The trials of a table."""

    candidates: Candidates
    runner: Runner
    hashes: Sequence[str]
    scale: bool
    check: Check | None = None
    _firsts: dict[int, int] = field(default_factory=dict)  # group -> the candidate that the others are scaled from
    _direct: set[int] = field(default_factory=set)  # candidates that are run to the outputs

    def measure(self) -> None:
        """Run what is needed."""
        everywhere, pairs = range(len(self.hashes)), list(self._pairs())
        for group, candidate in pairs:
            self._firsts.setdefault(group, candidate)
        self.runner.run([Task(group=g, candidate=c, whole=self._whole(g, c)) for g, c in pairs], everywhere)
        scaled = [(g, c) for g, c in pairs if self._scaled(g, c)]
        if not scaled:
            return
        number = min(everywhere, key=self.hashes.__getitem__)
        chosen = list(self._chosen(scaled))
        self.runner.run([Task(group=g, candidate=c, whole=True) for g, c in chosen], [number])
        self.check = self._judged(chosen, number)
        again = [Task(group=g, candidate=c, whole=True) for g, c in scaled if c in self._direct]
        self.runner.run(again, everywhere)

    def rows(self, signal: float) -> Iterator[GroupRow]:
        """The rows, of trials that were run."""
        count = len(self.hashes)
        for g, group in enumerate(self.candidates.groups):
            trials = []
            for c, text in enumerate(self.candidates.texts):
                if why := self.candidates.why_not(group, text):
                    trials.append(Trial(candidate=text, why_not=why))
                    continue
                c = self._like(g, c)
                noise = _sum(self._noise(g, c, number) for number in range(count)) / signal
                seen = [self.runner.seen(Task(group=g, candidate=c, whole=True), number) for number in range(count)]
                values = [each.value for each in seen if each is not None and each.value is not None]
                value = _sum(values) / count if len(values) == count else None
                trials.append(Trial(candidate=text, noise=noise, value=value, scaled=self._scaled(g, c)))
            yield GroupRow(nodes=group.nodes, trials=tuple(trials))

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Group and candidate, by number, of those that do something that no candidate before does."""
        for g, group in enumerate(self.candidates.groups):
            some = (c for c, text in enumerate(self.candidates.texts) if self.candidates.affected(group, text))
            yield from ((g, c) for c in some if self._like(g, c) == c)

    def _like(self, group: int, candidate: int) -> int:
        """The first candidate that does the same to a group."""
        texts = self.candidates.texts
        return texts.index(self.candidates.like(self.candidates.groups[group], texts[candidate]))

    def _whole(self, group: int, candidate: int) -> bool:
        return not self.scale or candidate == self._firsts[group] or candidate in self._direct

    def _scaled(self, group: int, candidate: int) -> bool:
        """Whether a noise is one in proportion: the outputs were not computed on every sample."""
        if self._whole(group, candidate):
            return False
        seen = self.runner.seen(Task(group=group, candidate=candidate, whole=False), 0)
        return seen is not None and seen.noise is None

    def _noise(self, group: int, candidate: int, number: int, *, scaled: bool | None = None) -> float:
        """Energy of the error of one sample."""
        whole = self.runner.seen(Task(group=group, candidate=candidate, whole=True), number)
        if scaled is None:
            scaled = self._scaled(group, candidate)
        if not scaled and whole is not None and whole.noise is not None:
            return whole.noise
        near = self.runner.seen(Task(group=group, candidate=candidate, whole=False), number)
        assert near is not None
        if near.noise is not None:
            return near.noise
        first = self.runner.seen(Task(group=group, candidate=self._firsts[group], whole=True), number)
        assert first is not None and first.noise is not None and first.near is not None and near.near is not None
        if not (math.isfinite(first.noise) and math.isfinite(first.near) and math.isfinite(near.near)):
            return math.inf
        return first.noise * near.near / first.near if first.near > 0 else near.near * first.noise

    def _chosen(self, scaled: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Some groups of each candidate, spread over the network."""
        for candidate in sorted({c for _, c in scaled}):
            mine = [g for g, c in scaled if c == candidate]
            count = min(len(mine), max(FEWEST, math.ceil(CHECKED * len(mine))))
            yield from ((mine[(2 * i + 1) * len(mine) // (2 * count)], candidate) for i in range(count))

    def _judged(self, chosen: Sequence[tuple[int, int]], number: int) -> Check:
        """What the check says; candidates that it speaks against are run to the outputs."""
        pairs = {
            (g, c): (self._noise(g, c, number, scaled=True), self._noise(g, c, number, scaled=False)) for g, c in chosen
        }
        apart: dict[int, list[float]] = {}
        for (_, c), (guess, found) in pairs.items():
            apart.setdefault(c, []).append(_apart_db(guess, found))
        self._direct = {c for c, dbs in apart.items() if median(dbs) > MEDIAN_DB or max(dbs) > LARGEST_DB}
        texts = self.candidates.texts
        guesses, founds = (np.asarray(values) for values in zip(*pairs.values(), strict=True))
        return Check(
            trials=len(pairs),
            rank_correlation=spearman(guesses, founds) if len(pairs) > 2 else None,
            median_db={texts[c]: median(dbs) for c, dbs in sorted(apart.items())},
            largest_db={texts[c]: max(dbs) for c, dbs in sorted(apart.items())},
            run_to_the_end=tuple(texts[c] for c in sorted(self._direct)),
        )


def _apart_db(guess: float, found: float) -> float:
    if guess == found:
        return 0.0
    if not (math.isfinite(guess) and math.isfinite(found) and guess > 0 and found > 0):
        return math.inf
    return abs(10 * math.log10(guess / found))


def _sum(values: Iterable[float]) -> float:
    """Their sum whatever their order; infinite if one is not finite."""
    found = list(values)
    return math.fsum(found) if all(map(math.isfinite, found)) else math.inf
