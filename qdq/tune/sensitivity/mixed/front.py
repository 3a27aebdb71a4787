"""What a search looked at, the front of error against each cost, and which of it is picked.

choices with their figures -> `Allocation` (front.json) -> front -> the knee, or an end of it -> its number
It must not compile or measure anything: the file alone gives the plan of each choice in it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import ClassVar

from engines.core.documents import Document, Measured, Part
from qdq.build.recipe import PICKS
from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.core.files import read_document, write_text
from qdq.model.model import Model
from qdq.plan.choice import FLOAT
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.mixed.choices import Choices

HIGHEST_DB = 200.0  # of an error of nothing, in a picture


class Tried(Part, frozen=True, kw_only=True):
    """One choice, as compiled and measured.

    Attributes:
        choice: of each group, the number of its candidate in the candidates and `float`.
        how: it was come upon.
        sum_db: SQNR of all outputs by the sum of the groups' noises.
        sqnr_db: of the same as measured, with quick scales.
        worst_db: of the output that has least.
        size_mib: of the weights in the engine.
        memory_mib: of those and of what the engine computes.
        time_us: predicted; None where it is not.
        values: of metrics that were bounded.
        keeps: to every limit.
        quantizes: anything at all.
    """

    choice: tuple[int, ...]
    how: str
    sum_db: Measured
    sqnr_db: Measured
    worst_db: Measured
    size_mib: float
    memory_mib: float
    time_us: float | None
    values: dict[str, Measured]
    keeps: bool
    quantizes: bool = True

    @property
    def drawn_db(self) -> float:
        """The SQNR where a picture has it; that of a plan that overflows is minus infinity."""
        return max(-HIGHEST_DB, min(self.sqnr_db, HIGHEST_DB))


class Allocation(Document, frozen=True, kw_only=True):
    """What was chosen, what it is, and everything else that was looked at.

    Attributes:
        plan: the file.
        model_sha256: of the user's model.
        settings: that the candidates share.
        unquantized_type: of what is not quantized, and of the candidate `float`.
        candidates: that groups were chosen from, beside `float`.
        groups: the nodes of each group.
        nodes: candidate -> how many nodes have it in the choice.
        minimize: 'error', 'size' or 'time'.
        pick: of the front, as asked for; "" where the aim alone decided.
        limits: option -> what it may be.
        compiled_by: the compiler whose layer table the sizes are of.
        gpus: that times are predicted for.
        tried: every choice that was compiled and measured.
        chosen: number of the choice in these.
        allocated_db: of the first choice that the program gave and that kept to the limits.
        steps: what was done, a sentence each.
    """

    FORMAT: ClassVar[str] = "qdq.allocation/2"
    MAKE: ClassVar[str] = "qdq tune MODEL --minimize error --max-size-mib X"
    COMPUTED: ClassVar[Mapping[str, str]] = {
        name: name for name in ("size_mib", "float_mib", "time_us", "sum_db", "measured_db", "measured")
    }

    plan: str
    model_sha256: str
    settings: Settings
    unquantized_type: str
    candidates: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    nodes: dict[str, int]
    minimize: str
    pick: str = ""
    limits: dict[str, str]
    compiled_by: str
    gpus: tuple[str, ...]
    tried: tuple[Tried, ...]
    chosen: int
    allocated_db: Measured
    steps: tuple[str, ...]

    @property
    def best(self) -> Tried:
        """The choice."""
        return self.tried[self.chosen]

    @property
    def size_mib(self) -> float:
        """Of the weights in the engine of the choice."""
        return self.best.size_mib

    @property
    def float_mib(self) -> float:
        """Of the same with every group in float."""
        return self.tried[0].size_mib

    @property
    def time_us(self) -> float | None:
        """Predicted of the choice."""
        return self.best.time_us

    @property
    def sum_db(self) -> float:
        """Of the choice by the sum of the groups' noises."""
        return self.best.sum_db

    @property
    def measured_db(self) -> float:
        """Of the choice as a whole."""
        return self.best.sqnr_db

    @property
    def measured(self) -> int:
        """How many choices were compiled and measured."""
        return len(self.tried)

    @property
    def texts(self) -> tuple[str, ...]:
        """What the numbers of a choice mean."""
        return tuple(dict.fromkeys((*self.candidates, FLOAT)))

    def words(self, number: int) -> str:
        """A choice in words: how many nodes have what."""
        counts = dict.fromkeys(self.texts, 0)
        for nodes, index in zip(self.groups, self.tried[number].choice, strict=True):
            counts[self.texts[index]] += len(nodes)
        return ", ".join(f"{count} {text}" for text, count in counts.items() if count)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Allocation:
        """Read one.

        Raises:
            InputError: missing, not JSON, another format version, or numbers of what there is not.
        """
        made = read_document(path, cls, "front")
        known, groups = range(len(made.texts)), len(made.groups)
        whole = all(len(t.choice) == groups and all(number in known for number in t.choice) for t in made.tried)
        if not whole or made.chosen not in range(len(made.tried)):
            raise InputError(
                f"Cannot use the front {path}: its choices name groups or candidates that it does not have. "
                f"Make it with `{cls.MAKE}`."
            )
        return made


def front(tried: Sequence[Tried], cost: str) -> list[int]:
    """The numbers of those of which no other has less of a cost and as little error, the cheapest first.

    Args:
        tried: choices.
        cost: 'size_mib', 'memory_mib' or 'time_us'; what lacks it is on no front.
    """
    order = sorted((getattr(t, cost), -t.sqnr_db, i) for i, t in enumerate(tried) if getattr(t, cost) is not None)
    found, most = list[int](), -math.inf
    for _, negative, number in order:
        if -negative > most:
            found.append(number)
            most = -negative
    return found


def picked(tried: Sequence[Tried], pick: str, cost: str) -> int:
    """The number of a choice, of those that keep to every limit.

    Args:
        tried: choices.
        pick: one of `PICKS`, or a number.
        cost: that the knee is of.

    Raises:
        InputError: an unknown pick, a number that there is not, nothing that keeps to the limits, or no times where the
            fastest is picked.
    """
    if pick.isdecimal():
        if int(pick) >= len(tried):
            raise InputError(f"--pick is {pick}: the front has the choices 0 to {len(tried) - 1}.")
        return int(pick)
    choose(pick, PICKS, "pick")
    left = [i for i, t in enumerate(tried) if t.keeps]
    kept = [tried[i] for i in left]
    if not kept:
        raise InputError(f"--pick {pick} is of choices that keep to every limit, and the front has none: search anew.")
    if pick == "fastest" and all(t.time_us is None for t in kept):
        raise InputError("--pick fastest needs predicted times, and there are none of these candidates.")
    if pick == "most-accurate":
        return left[front(kept, "size_mib")[-1]]
    if pick != "knee":
        return left[front(kept, "time_us" if pick == "fastest" else "size_mib")[0]]
    return left[knee(kept, cost)]


def knee(tried: Sequence[Tried], cost: str) -> int:
    """The choice of the front farthest above the line between its ends, both axes scaled to them.

    Of choices that quantize something, where there are any: beside them float everywhere has hardly an error, so that
    no other would be above the line to it.

    Source: Das, On characterizing the "knee" of the Pareto curve, 1999.
    """
    numbers = [i for i in front(tried, cost) if tried[i].quantizes] or front(tried, cost)
    xs, ys = [getattr(tried[i], cost) for i in numbers], [tried[i].drawn_db for i in numbers]
    wide, high = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    above = [(y - ys[0]) / high - (x - xs[0]) / wide for x, y in zip(xs, ys, strict=True)]
    return numbers[max(range(len(numbers)), key=lambda i: (above[i], -i))]


def plan_of(prepared: Model, made: Allocation, number: int) -> Plan:
    """The plan of a choice of a file.

    Raises:
        InputError: the file is of another model, or of other groups of its nodes.
    """
    if made.model_sha256 != prepared.sha256:
        raise InputError(
            f"The front was made from another model: it says sha256 {made.model_sha256[:12]}…, this model has "
            f"{prepared.sha256[:12]}…. Search again for this model."
        )
    every = Candidates.of(prepared, made.settings, made.candidates, made.unquantized_type)
    chosen = [made.texts[index] for index in made.tried[number].choice]
    if tuple(group.nodes for group in every.groups) != made.groups:
        raise InputError("The front was made by another version of qdq, which groups nodes otherwise: search again.")
    return Choices(candidates=every, unquantized_type=made.unquantized_type).plan(chosen)
