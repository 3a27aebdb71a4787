"""The plan of least error within a size of the engine: allocated by sums, then compiled and measured as a whole.

sensitivity -> bytes of each group in each candidate, fitted to compiled engines -> `least_error` -> compiled: where it
is too large the program is solved for less -> measured: choices next to it that do better are taken -> `Plan`
What is measured and compiled has quick scales, on the samples that the sensitivity is of; structure and size do not
depend on scales.
"""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from calib_data import Samples
from engines.core.documents import Document, Measured, replace
from qdq.assemble.finish import finish
from qdq.assemble.held_out import HeldOutScore, Split, decibels
from qdq.assemble.insert import insert
from qdq.assemble.tables import measured
from qdq.build.engine import compile_engine, shape_ranges
from qdq.build.machine import stand_in
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.measure.inference.samples import Sample, sample_sha256
from qdq.measure.table import CalibrationTable, samples_digest
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.choice import FLOAT, choice
from qdq.plan.plan import Plan
from qdq.solve.solve import solve
from qdq.tune.sensitivity.allocate import MIB, Costs, least_error, neighbours, require_scipy, total
from qdq.tune.sensitivity.candidates import Candidates, quick
from qdq.tune.sensitivity.find import beside, find, possible
from qdq.tune.sensitivity.run import forget
from qdq.tune.sensitivity.table import Sensitivity, require_same

SHRINKS = 6  # times that a choice which compiles larger than predicted is made again for less
LOOKED_AT = 8  # choices next to the best that are measured at a time
MEASURED = 24  # in all
BETTER_DB = 0.05  # by which one must win
DECIDED = ("compiler", "block", "shift")  # settings that errors depend on and candidates do not say
FLOAT_BYTES = {"fp16": 2.0, "bf16": 2.0, "fp32": 4.0}
SCALE_BYTES = 2.0

Bytes = Callable[[Model], int]
"""Compiles a model and says the bytes of its weights."""


class Allocation(Document, frozen=True, kw_only=True):
    """What was chosen, and what it is.

    Attributes:
        plan: the file.
        candidates: those that groups were chosen from.
        nodes: candidate -> how many nodes have it.
        max_size_mib: that was asked for.
        size_mib: of the weights in the engine, by the layer table.
        float_mib: of the same with every group in float.
        compiled_by: the compiler whose table that is.
        sum_db: SQNR of the outputs by the sum of the groups' noises.
        measured_db: of the whole, with quick scales.
        allocated_db: of the first choice that was small enough, before those next to it were looked at.
        measured: how many choices were measured as a whole.
        steps: what was done, a sentence each.
    """

    FORMAT: ClassVar[str] = "qdq.allocation/1"
    MAKE: ClassVar[str] = "qdq tune MODEL --minimize error --max-size-mib X --json"

    plan: str
    candidates: tuple[str, ...]
    nodes: dict[str, int]
    max_size_mib: float
    size_mib: float
    float_mib: float
    compiled_by: str
    sum_db: Measured
    measured_db: Measured
    allocated_db: Measured
    measured: int
    steps: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Mixing:
    """The search for one model.

    Attributes:
        candidates: of the model; `float` is one, without error where it is not among them.
        found: their sensitivity.
        table: that serves all of them.
        samples: re-iterable, those of the sensitivity.
        unquantized_type: of what is not quantized.
        compiled: says the bytes of a model's weights in the engine.
    """

    candidates: Candidates
    found: Sensitivity
    table: CalibrationTable
    samples: Iterable[Sample]
    unquantized_type: str
    compiled: Bytes
    on_progress: Progress | None = None
    steps: list[str] = field(default_factory=list)
    _bytes: dict[tuple[str, ...], int] = field(default_factory=dict)
    _db: dict[tuple[str, ...], float] = field(default_factory=dict)
    _score: HeldOutScore | None = None

    def within(self, max_size_mib: float) -> tuple[tuple[str, ...], float]:
        """A candidate for each group, and the SQNR in dB of the first choice that was small enough.

        Raises:
            InputError: nothing is as small.
        """
        noise, most = self._noise(), max_size_mib * MIB
        size, base = self._sizes()
        room = most - base
        chosen = least_error(noise, size, room, base=base)
        for _ in range(SHRINKS):
            if (over := self.bytes_of(chosen) - most) <= 0:
                break
            self.steps.append(
                f"compiled {(most + over) / MIB:.3f} MiB, {over / MIB:.3f} more than allowed: chosen anew"
            )
            room = total(size, chosen) - over
            chosen = least_error(noise, size, room, base=base)
        else:
            raise InputError(
                f"No choice that was found compiles to {max_size_mib:g} MiB. Give a larger --max-size-mib."
            )
        first = self.db_of(chosen)
        while len(self._db) < MEASURED and (better := self._better(noise, size, chosen, most, base)) is not None:
            self.steps.append(f"measured {self.db_of(better):.2f} dB in place of {self.db_of(chosen):.2f}")
            chosen = better
        return chosen, first

    def plan(self, chosen: Sequence[str]) -> Plan:
        """The plan of a choice: ordinary, with an override for each node that is not of the commonest scheme."""
        every = self.candidates
        names = [(node, text) for group, text in zip(every.groups, chosen, strict=True) for node in group.nodes]
        plain = Counter(text for _, text in names if text in every.plans and text == choice(text).scheme)
        scheme = max(plain, key=lambda text: (plain[text], text), default=choice(next(iter(every.plans))).scheme)
        own = {glob.escape(node): text for node, text in names if text != scheme}
        settings = replace(every.carried, scheme=scheme, overrides={**every.carried.overrides, **own})
        made = placement.placed(every.model, settings)
        kind = self.unquantized_type if self.unquantized_type != "auto" else "fp16"
        return replace(made, settings=settings, rewrites=every.rewrites, unquantized_type=kind)

    def bytes_of(self, chosen: tuple[str, ...]) -> int:
        """Bytes of the weights in the engine of a choice."""
        if chosen not in self._bytes:
            if self.on_progress is not None:
                self.on_progress(len(self._bytes), None, "compiling for size")
            self._bytes[chosen] = self.compiled(self._model(chosen))
        return self._bytes[chosen]

    def db_of(self, chosen: tuple[str, ...]) -> float:
        """SQNR of the outputs of a choice, as a whole."""
        if chosen not in self._db:
            if self.on_progress is not None:
                self.on_progress(len(self._db), MEASURED, "measuring plans")
            if self._score is None:
                held = Split(samples=self.samples, fit=(), held=frozenset(range(self.found.samples)))
                self._score = HeldOutScore(self.candidates.model, held)
            self._db[chosen] = self._score.sqnr_db(self._model(chosen))
        return self._db[chosen]

    def sum_db(self, chosen: Sequence[str]) -> float:
        """SQNR of a choice by the sum of its noises."""
        return decibels([1.0], [total(self._noise(), chosen)])

    @property
    def measured(self) -> int:
        """How many choices were measured."""
        return len(self._db)

    def all_float(self) -> tuple[str, ...]:
        """Every group in float."""
        return tuple(FLOAT for _ in self.candidates.groups)

    def _better(
        self, noise: Costs, size: Costs, chosen: tuple[str, ...], most: float, base: float
    ) -> tuple[str, ...] | None:
        """The best of the choices next to one that are small enough, if it is better."""
        room = max(most - base, total(size, chosen) + most - self.bytes_of(chosen))
        near = [each for each in neighbours(noise, size, chosen, room) if each not in self._db]
        near = near[: min(LOOKED_AT, MEASURED - len(self._db))]
        fitting = [each for each in near if self.db_of(each) > self.db_of(chosen) + BETTER_DB]
        small = (each for each in sorted(fitting, key=lambda e: (-self.db_of(e), e)) if self.bytes_of(each) <= most)
        return next(small, None)

    def _noise(self) -> Costs:
        """Of each group, candidate -> noise over signal; of those that do something to it."""
        rows = self.found.groups
        return [{FLOAT: 0.0} | {t.candidate: t.noise for t in row.trials if t.noise is not None} for row in rows]

    def _sizes(self) -> tuple[Costs, float]:
        """Of each group, candidate -> bytes in the engine; and what the engine takes beside the groups.

        By the formats, times what a compiled engine of all groups in that candidate takes against it.
        """
        guessed = [self._guessed(g) for g in range(len(self.candidates.groups))]
        floats = self.all_float()
        base = self.bytes_of(floats) - total(guessed, floats)
        factor = {FLOAT: 1.0}
        for text in self.candidates.plans:
            mixed = tuple(text if text in own else FLOAT for own in guessed)
            mine = math.fsum(own[text] for own in guessed if text in own)
            others = math.fsum(own[FLOAT] for own in guessed if text not in own)
            factor[text] = max(0.0, self.bytes_of(mixed) - base - others) / max(mine, 1.0)
        sizes = [{text: bytes_ * factor[text] for text, bytes_ in own.items()} for own in guessed]
        return sizes, base

    def _guessed(self, g: int) -> dict[str, float]:
        """Bytes of the weights of a group in each candidate, by the formats alone."""
        every = self.candidates
        group = every.groups[g]
        names = {every.model.node(node).input[1] for node in group.nodes}
        each = FLOAT_BYTES["fp16" if self.unquantized_type == "auto" else self.unquantized_type]
        counts = {name: math.prod(every.model.initializers[name].dims) for name in names}
        found = {}
        for text in self._noise()[g]:
            bytes_ = {name: count * each for name, count in counts.items()}
            plan = every.plans.get(text)
            for point in plan.weights if plan else ():
                if point.tensor in counts and {n for n, _ in point.uses}.intersection(group.nodes):
                    count, fmt = counts[point.tensor], FORMATS[point.spec.format]
                    scales = count / point.spec.block if point.spec.block else 1.0
                    bytes_[point.tensor] = count * fmt.bits / 8 + SCALE_BYTES * scales
            found[text] = math.fsum(bytes_.values())
        return found

    def _model(self, chosen: Sequence[str]) -> Model:
        """The model of a choice with quick scales, as it would be compiled."""
        plan = quick(self.plan(chosen))
        model = self.candidates.model
        made = insert(model, plan, solve(model, plan, self.table)) if plan.points else model
        return finish(made, plan, unquantized_type=self.unquantized_type, table=self.table).model


def counts(candidates: Candidates, chosen: Sequence[str]) -> dict[str, int]:
    """How many nodes have each candidate."""
    found = Counter[str]()
    for group, text in zip(candidates.groups, chosen, strict=True):
        found[text] += len(group.nodes)
    return {text: found[text] for text in dict.fromkeys((*candidates.texts, FLOAT)) if found[text]}


def of_table(
    prepared: Model, known: Sensitivity, recipe: Recipe, samples: Iterable[Sample]
) -> tuple[Candidates, Sensitivity, bool]:
    """The candidates of a table by a recipe's settings, its rows of their groups, and whether other samples are here.

    Raises:
        InputError: the table is of another model, of settings that its errors depend on, or lacks a group.
        EngineError: a target has no kernels for one of its candidates.
    """
    require_same(known, prepared.sha256)
    kind = recipe.unquantized_type
    pairs = {name: (getattr(known.settings.settled, name), getattr(recipe.settings.settled, name)) for name in DECIDED}
    if kind != "auto" and FLOAT in known.candidates:
        pairs["unquantized-type"] = known.unquantized_type, kind
    if odd := [f"--{name} {was}, and the plan for {now}" for name, (was, now) in pairs.items() if was != now]:
        raise InputError(f"The sensitivity table is for {odd[0]}: give the plan the same, or make another table.")
    if recipe.candidates:
        raise InputError("--candidates are those of the --sensitivity table: leave them out, or the table.")
    possible(recipe.settings, recipe.targets, known.candidates)
    every = Candidates.of(prepared, recipe.settings, known.candidates, known.unquantized_type)
    rows = {row.nodes: row for row in known.groups}
    if lacking := [group for group in every.groups if group.nodes not in rows]:
        raise InputError(
            f"The sensitivity table has no group of {', '.join(map(repr, lacking[0].nodes))}: give the exclude and "
            "overrides that it was made with, or make it again."
        )
    hashes = [sample_sha256(sample) for sample in samples]
    digest = samples_digest(hashes)
    found = replace(
        known,
        groups=tuple(rows[group.nodes] for group in every.groups),
        samples=len(hashes),
        samples_sha256=digest,
    )
    return every, found, digest != known.samples_sha256


def mix(
    model_path: Path,
    prepared: Model,
    samples: Samples,
    recipe: Recipe,
    *,
    known: Sensitivity | None = None,
    custom_ops: tuple[str, ...] = (),
    output: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[Plan, Allocation]:
    """The plan of least error whose engine's weights are not larger than a size.

    Args:
        model_path: the float model's file.
        prepared: what was loaded of it.
        samples: that ranges are measured on, and outputs computed.
        recipe: says the size, which it has, candidates, settings, compiler, targets, shapes and the float type.
        known: the sensitivity, if it was measured before.
        custom_ops: paths of libraries for ONNX Runtime.
        output: file that the plan will be written to.

    Raises:
        InputError: no choice is as small; see `of_table`.
        EngineError: the compiler refuses the model.
        MissingRuntimeError: SciPy or the compiler is not installed.
    """
    require_scipy()
    kind, most, others = recipe.unquantized_type, recipe.max_size_mib, False
    assert most is not None
    if known is not None:
        every, known, others = of_table(prepared, known, recipe, samples)
    else:
        texts = possible(recipe.settings, recipe.targets, recipe.candidates)
        every = Candidates.of(prepared, recipe.settings, [t for t in texts if t != FLOAT or kind != "fp32"], kind)
    every.check_overrides()
    table = measured(every.model, every.measuring, samples, on_progress=on_progress)
    found = known or find(
        model_path,
        prepared,
        samples,
        settings=recipe.settings,
        texts=every.texts,
        unquantized_type=kind,
        table=table,
        custom_ops=custom_ops,
        output=output,
        on_progress=on_progress,
    )
    if output is not None:
        forget(beside(output))  # the table is whole; a size that nothing keeps to has no part in it
    shapes = shape_ranges(prepared, recipe.shapes, samples)

    def compiled(model: Model) -> int:
        by = stand_in(recipe, model.proto)
        return compile_engine(model, recipe=by, shapes=shapes, locate=False).table.weight_bytes

    steps = ["the table's errors are those of other samples"] if others else []
    mixing = Mixing(
        candidates=every,
        found=found,
        table=table,
        samples=samples,
        unquantized_type=kind,
        compiled=compiled,
        on_progress=on_progress,
        steps=steps,
    )
    chosen, first = mixing.within(most)
    plan = mixing.plan(chosen)
    return plan, Allocation(
        plan=str(output or ""),
        candidates=every.texts,
        nodes=counts(every, chosen),
        max_size_mib=most,
        size_mib=mixing.bytes_of(chosen) / MIB,
        float_mib=mixing.bytes_of(mixing.all_float()) / MIB,
        compiled_by=stand_in(recipe, prepared.proto).profile.title,
        sum_db=mixing.sum_db(chosen),
        measured_db=mixing.db_of(chosen),
        allocated_db=first,
        measured=mixing.measured,
        steps=tuple(mixing.steps),
    )
