"""The whole job: candidates, one table for all, their sensitivity, the search, and what it looked at.

model + samples + recipe -> `Candidates` -> `Sensitivity` -> `Search` -> a plan, and the `Allocation` that tells of it
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from calib_data import Samples
from engines.core.documents import replace
from qdq.assemble.tables import measured
from qdq.build.engine import shape_ranges
from qdq.build.machine import stand_in
from qdq.build.pricing.costing import MEMORY, SIZE, TIME, Costing, unpriced
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.measure.inference.samples import Sample, sample_sha256
from qdq.measure.table import samples_digest
from qdq.model.model import Model
from qdq.plan.choice import FLOAT
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.find import USUAL, beside, find, possible
from qdq.tune.sensitivity.mixed.allocate import Chosen, require_scipy
from qdq.tune.sensitivity.mixed.choices import Choices
from qdq.tune.sensitivity.mixed.front import Allocation, Tried, picked, plan_of
from qdq.tune.sensitivity.mixed.goal import MIB, OPTIONS, Bound, Goal, said
from qdq.tune.sensitivity.mixed.search import Search
from qdq.tune.sensitivity.run import forget
from qdq.tune.sensitivity.table import Sensitivity, require_same

DECIDED = ("compiler", "block", "shift")  # settings that errors depend on and candidates do not say


def mix(
    model_path: Path,
    prepared: Model,
    samples: Samples,
    recipe: Recipe,
    *,
    known: Sensitivity | None = None,
    bounds: tuple[Bound, ...] = (),
    labelled: Iterable[Sample] | None = None,
    custom_ops: tuple[str, ...] = (),
    output: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[Plan, Allocation]:
    """The plan that is best for a recipe's aim within its limits.

    Args:
        model_path: the float model's file.
        prepared: what was loaded of it.
        samples: that ranges are measured on, and outputs computed.
        recipe: says the aim, limits, candidates, settings, compiler, targets, GPUs, shapes and the float type.
        known: the sensitivity, if it was measured before.
        bounds: of metrics.
        labelled: the samples with labels beside the inputs, for these; None: there are none.
        custom_ops: paths of libraries for ONNX Runtime.
        output: file that the plan will be written to.

    Raises:
        InputError: nothing keeps to the limits; see `of_table`, `timed`.
        EngineError: the compiler refuses the model.
        MissingRuntimeError: SciPy or the compiler is not installed.
    """
    require_scipy()
    goal, kind, others = Goal.of(recipe, bounds), recipe.unquantized_type, False
    if known is not None:
        every, known, others = of_table(prepared, known, recipe, samples)
    else:
        scheme = recipe.settings.scheme
        asked = recipe.candidates or (() if scheme == Settings().scheme else (scheme, FLOAT))
        texts = possible(recipe.settings, recipe.targets, timed(recipe, asked, goal))
        every = Candidates.of(prepared, recipe.settings, [t for t in texts if t != FLOAT or kind != "fp32"], kind)
    timed(recipe, every.texts, goal)
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
    search = Search(
        choices=Choices(candidates=every, unquantized_type=kind),
        found=found,
        table=table,
        samples=samples,
        costing=Costing(recipe=recipe, shapes=shape_ranges(prepared, recipe.shapes, samples)),
        goal=goal,
        labelled=labelled,
        priced=not unpriced(recipe, every.texts),
        on_progress=on_progress,
        steps=["the table's errors are those of other samples"] if others else [],
    )
    with nullcontext() if output is None else _finished(beside(output)):
        best = outcome(search, recipe.pick)
    return search.choices.plan(best), allocation(search, best, recipe, prepared, str(output or ""))


@contextmanager
def _finished(table: Path) -> Iterator[None]:
    """Forget an unfinished table once the search has an answer, a refusal too; a search that is killed leaves it."""
    try:
        yield
    except InputError:
        forget(table)
        raise
    forget(table)


def outcome(search: Search, pick: str) -> Chosen:
    """The choice that is best for the goal, or that is picked of all that was looked at.

    Raises:
        InputError, BuildError: see `Search.best`, `picked`.
    """
    best = search.best()
    if not pick:
        return best
    search.fill()
    tried = [tried_of(search, chosen) for chosen in search.looked_at]
    return search.looked_at[picked(tried, pick, knee_of(TIME in search.goal.costs))]


def picked_from(prepared: Model, made: Allocation, pick: str, plan: str) -> tuple[Plan, Allocation]:
    """The plan that is picked from an earlier search, and what is told of it.

    Raises:
        InputError: see `picked`, `plan_of`.
    """
    number = picked(made.tried, pick, knee_of(made.minimize == TIME or OPTIONS[TIME] in made.limits))
    chosen = [made.texts[index] for index in made.tried[number].choice]
    nodes = Counter(text for own, text in zip(made.groups, chosen, strict=True) for _ in own)
    steps = (f"picked from {len(made.tried)} plans of an earlier search",)
    told = replace(made, plan=plan, pick=pick, chosen=number, nodes=dict(nodes), steps=steps)
    return plan_of(prepared, made, number), told


def knee_of(timed: bool) -> str:
    """The cost whose knee is picked: time where the aim or a limit is one, else size."""
    return "time_us" if timed else "size_mib"


def timed(recipe: Recipe, texts: Sequence[str], goal: Goal) -> Sequence[str]:
    """The candidates, or where none are asked for and times decide, those of the usual ones whose times are known.

    Raises:
        InputError: times decide, and those of a candidate that is asked for are not predicted.
    """
    if TIME not in goal.costs:
        return texts
    if not Costing(recipe=recipe, shapes={}).gpus:
        raise InputError("No times are predicted for these targets, so none can be bounded: name a GPU with --gpu.")
    if odd := unpriced(recipe, texts):
        raise InputError(
            f"Times of {recipe.profile.title} are predicted of int8 and float only, not of {', '.join(odd)}: give "
            "--candidates int8,float, or limit the size."
        )
    lacking = unpriced(recipe, USUAL)
    return texts or ([text for text in USUAL if text not in lacking] if lacking else texts)


def tried_of(search: Search, chosen: Chosen) -> Tried:
    """What is known of a choice."""
    cost, quality = search.cost(chosen).of, search.quality(chosen)
    names = list(dict.fromkeys((*search.choices.candidates.texts, FLOAT)))
    return Tried(
        choice=tuple(names.index(text) for text in chosen),
        how=search.how.get(chosen, ""),
        sum_db=search.sum_db(chosen),
        sqnr_db=quality.db,
        worst_db=quality.worst_db,
        size_mib=cost[SIZE] / MIB,
        memory_mib=cost[MEMORY] / MIB,
        time_us=cost[TIME] if search.timed and math.isfinite(cost[TIME]) else None,
        values=dict(quality.values),
        keeps=chosen in search.kept(),
        quantizes=any(text in search.choices.candidates.plans for text in chosen),
    )


def allocation(search: Search, best: Chosen, recipe: Recipe, prepared: Model, plan: str) -> Allocation:
    """What is told of a search whose outcome is a choice."""
    every, goal = search.choices.candidates, search.goal
    limits = {OPTIONS[name]: said(name, most) for name, most in goal.most.items()}
    limits |= {"--min-sqnr-db": f"{goal.min_db:g} dB"} if "min_sqnr_db" in recipe.limits else {}
    limits |= {f"--min-metric {b.name}": f"{b.value:g}" for b in goal.bounds}
    return Allocation(
        plan=plan,
        model_sha256=prepared.sha256,
        settings=every.settings,
        unquantized_type=search.choices.kind,
        candidates=every.texts,
        groups=tuple(group.nodes for group in every.groups),
        nodes=search.choices.counts(best),
        minimize=goal.minimize,
        pick=recipe.pick,
        limits=limits,
        compiled_by=stand_in(recipe, prepared.proto).profile.title,
        gpus=search.costing.gpus if search.timed else (),
        tried=tuple(tried_of(search, chosen) for chosen in search.looked_at),
        chosen=search.looked_at.index(best),
        allocated_db=search.quality(search.first or best).db,
        steps=tuple(search.steps),
    )


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
