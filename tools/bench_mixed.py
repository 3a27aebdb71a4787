"""The plan of a search against other ways to choose precisions, at equal size and equal predicted time.

    python tools/bench_mixed.py [NETWORK ...] [--zoo DIR] [--samples 16] [--trials 24] [--shares 0.25,0.5,0.75]

Networks are those of a folder with zoo.py (zoo() gives cases, named(case) their inputs), and without one `eight`: eight
products of unlike widths in a row with one Add across, random weights and samples.

Budgets lie between the smallest engine (fastest form) of the candidates and FP16. Beside the search: uniform INT8 and
INT4 where they fit, greedy flipping by size and by sensitivity (Pandey et al., 2302.05397), Optuna's TPE and XGBoost
after Quantune (Lee et al., 2202.05048), each with as many plans measured as `--trials`. The last two need `optuna`, and
`xgboost`, and are left out without. The search's plans are compiled; the others keep to the fitted sum of the cost,
and one that compiles to more is marked and not compared with.
Every plan is chosen on calibration samples, with quick scales, and scored by the SQNR of its outputs on evaluation
samples. What one way has compiled or measured no other does again.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from results import record

from qdq.assemble.held_out import HeldOutScore, Split
from qdq.assemble.tables import measured
from qdq.build.engine import shape_ranges
from qdq.build.pricing.costing import SIZE, TIME, Cost, Costing
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError
from qdq.measure.inference.inputs import as_samples
from qdq.passes.prepare import load_float
from qdq.plan.choice import FLOAT
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.find import find
from qdq.tune.sensitivity.mixed.allocate import Chosen
from qdq.tune.sensitivity.mixed.choices import Choices
from qdq.tune.sensitivity.mixed.goal import Goal, Quality, said
from qdq.tune.sensitivity.mixed.search import Search

COARSE = ("int8", "int4")  # what greedy ways flip to, in turn


@dataclass(slots=True)
class Bench:
    """One network: what is compiled and measured is shared by all ways."""

    name: str
    search: Callable[[Goal], Search]
    score: HeldOutScore
    trials: int
    scored: dict[Chosen, float] = field(default_factory=dict)

    def evaluated(self, search: Search, chosen: Chosen | None) -> float:
        """SQNR in dB on evaluation samples."""
        if chosen is None:
            return math.nan
        if chosen not in self.scored:
            self.scored[chosen] = self.score.sqnr_db(search.choices.model(chosen, search.table))
        return self.scored[chosen]


@dataclass(slots=True, kw_only=True)
class Shared(Search):
    """A search that compiles and measures nothing that another of the same network has."""

    costs: dict[Chosen, Cost]
    qualities: dict[Chosen, Quality]

    def cost(self, chosen: Chosen) -> Cost:
        """See `Search.cost`."""
        if chosen in self.costs:
            self._cost[chosen] = self.costs[chosen]
        self.costs[chosen] = Search.cost(self, chosen)
        return self.costs[chosen]

    def quality(self, chosen: Chosen) -> Quality:
        """See `Search.quality`."""
        if chosen in self.qualities:
            self._quality[chosen] = self.qualities[chosen]
        self.qualities[chosen] = Search.quality(self, chosen)
        return self.qualities[chosen]


def fits(search: Search, chosen: Sequence[str], name: str, most: float) -> bool:
    """Whether a choice is within a budget by the sum of the cost, which is fitted to compiled engines."""
    return search._sums[name].of(chosen) <= most * (1 + 1e-9)


def greedy(search: Search, name: str, most: float, order: Callable[[int, str], float]) -> Chosen | None:
    """From float everywhere flip one group after the other to a coarser candidate, least order first, until it fits."""
    chosen = list(search.choices.everywhere(FLOAT))
    flips = sorted(
        (order(g, text), COARSE.index(text), g, text)
        for g, own in enumerate(search._sums[name].groups)
        for text in own
        if text in COARSE
    )
    for _, rank, g, text in flips:
        if fits(search, chosen, name, most):
            break
        if chosen[g] == FLOAT or COARSE.index(chosen[g]) < rank:
            chosen[g] = text
    return tuple(chosen) if fits(search, chosen, name, most) else None


def by_size(search: Search) -> Callable[[int, str], float]:
    """The largest groups first, all to INT8 and then to INT4."""
    size = search._sums[SIZE].groups
    return lambda g, text: COARSE.index(text) * 1e12 - size[g][FLOAT]


def by_sensitivity(search: Search) -> Callable[[int, str], float]:
    """The flips with the least noise at the outputs first."""
    noise = search._sums["error"].groups
    return lambda g, text: noise[g][text]


def tpe(search: Search, name: str, most: float, trials: int) -> Chosen | None:
    """Optuna's tree-structured Parzen estimator: the measured SQNR where the sum of the cost fits, else a penalty."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sums = search._sums[name]
    names = [sorted(own) for own in search._sums["error"].groups]

    def objective(trial: Any) -> float:
        chosen = tuple(trial.suggest_categorical(str(g), own) for g, own in enumerate(names))
        over = sums.of(chosen) / most
        if over > 1.0:
            return -100.0 * over
        return search.quality(chosen).db

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, multivariate=True))
    study.enqueue_trial({str(g): "int4" if "int4" in own else own[0] for g, own in enumerate(names)})
    while sum(t.value is not None and t.value > -99 for t in study.trials) < trials and len(study.trials) < 8 * trials:
        study.optimize(objective, n_trials=1)
    if study.best_value <= -99:
        return None
    return tuple(study.best_params[str(g)] for g in range(len(names)))


def boosted(search: Search, name: str, most: float, trials: int) -> Chosen | None:
    """Quantune: gradient-boosted trees learn the SQNR of choices that were measured, and rank random ones that fit."""
    import xgboost

    rng, sums = np.random.default_rng(0), search._sums[name]
    names = [sorted(own) for own in search._sums["error"].groups]

    def drawn(count: int) -> list[Chosen]:
        found = dict[Chosen, None]()
        for _ in range(5 * count):
            lean = rng.dirichlet(np.ones(3))  # so that small and large ones are drawn
            weight = dict(zip(("int4", "int8", FLOAT), lean, strict=True))
            chosen = tuple(str(rng.choice(own, p=(p := np.array([weight[t] for t in own])) / p.sum())) for own in names)
            if sums.of(chosen) <= most:
                found[chosen] = None
            if len(found) >= count:
                break
        return list(found)

    def features(some: Sequence[Chosen]) -> np.ndarray:
        return np.array([[own.index(text) for own, text in zip(names, chosen, strict=True)] for chosen in some])

    seen: dict[Chosen, float] = {}
    while len(seen) < trials:
        fresh = [chosen for chosen in drawn(200) if chosen not in seen]
        if not fresh:
            break
        if len(seen) >= trials // 3:
            known = xgboost.DMatrix(features(list(seen)), label=np.array(list(seen.values())))
            trees = xgboost.train({"max_depth": 3, "nthread": 1, "seed": 0}, known, num_boost_round=60)
            fresh = [fresh[i] for i in np.argsort(-trees.predict(xgboost.DMatrix(features(fresh))))]
        chosen = fresh[0]
        seen[chosen] = search.quality(chosen).db
    return max(seen, key=lambda c: seen[c], default=None)


def rows(bench: Bench, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Of each budget the SQNR of each way."""
    probe = bench.search(Goal())
    probe._ends()
    for name in (SIZE, *([TIME] if probe.timed else [])):
        ends = [
            probe.cost(probe.choices.everywhere(text)).of[name] for text in (FLOAT, *probe.choices.candidates.plans)
        ]
        for share in shares:
            least, most = min(ends), ends[0]
            limit = least + share * (most - least)
            if not most > least * 1.02:
                print(f"{bench.name}: nothing is cheaper than FP16 in {name}: {said(name, most)}", flush=True)
                break
            search = bench.search(Goal(most={name: limit}))
            found: dict[str, Chosen | None] = {}
            try:
                found["search"] = search.best()
            except InputError as error:
                print(f"{bench.name} {said(name, limit)}: {error}", flush=True)
                continue
            looked = search.measured
            for text, title in (("int8", "INT8"), ("int4", "INT4")):
                chosen = search.choices.everywhere(text)
                found[title] = chosen if fits(search, chosen, name, limit) else None
            found["by size"] = greedy(search, name, limit, by_size(search))
            found["by sensitivity"] = greedy(search, name, limit, by_sensitivity(search))
            if find_spec("optuna"):
                found["TPE"] = tpe(search, name, limit, bench.trials)
            if find_spec("xgboost"):
                found["XGBoost"] = boosted(search, name, limit, bench.trials)
            row = {way: bench.evaluated(search, chosen) for way, chosen in found.items()}
            over = {
                way for way, chosen in found.items() if chosen and search.cost(chosen).of[name] > limit * (1 + 1e-9)
            }
            yield {"limit": f"{said(name, limit)} ({share:g})", "looked": looked, "over": over, **row}


def opened(case: Any, count: int, trials: int, texts: Sequence[str]) -> Bench:
    """A network with its table and sensitivity."""
    prepared, recipe = load_float(case.path), Recipe()
    samples, held = (as_samples(some[:count], prepared) for some in (case.calibration, case.evaluation))
    every = Candidates.of(prepared, recipe.settings, texts)
    table = measured(every.model, every.measuring, samples)
    known = find(case.path, prepared, samples, settings=recipe.settings, texts=texts, table=table)
    costing = Costing(recipe=recipe, shapes=shape_ranges(prepared, recipe.shapes, samples))
    choices = Choices(candidates=every, unquantized_type="auto")

    costs, qualities = dict[Chosen, Cost](), dict[Chosen, Quality]()

    def search(goal: Goal) -> Search:
        return Shared(
            choices=choices,
            found=known,
            table=table,
            samples=samples,
            costing=costing,
            goal=goal,
            costs=costs,
            qualities=qualities,
        )

    split = Split(samples=held, fit=(), held=frozenset(range(count)))
    return Bench(case.name, search, HeldOutScore(every.model, split), trials)


WAYS = ("search", "INT8", "INT4", "by size", "by sensitivity", "TPE", "XGBoost")


def eight(folder: Path) -> Iterator[SimpleNamespace]:
    """Eight products in a row, of unlike widths, and an Add of the input."""
    rng = np.random.default_rng(0)
    widths = [16, *(16 + 16 * (i % 3) for i in range(7)), 16]
    nodes, weights, at = [], [], "x"
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        values = (rng.standard_normal((inputs, outputs)) / inputs**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{i}"))
        nodes += [helper.make_node("MatMul", [at, f"w{i}"], [f"h{i}"], f"n{i}")]
        nodes += [helper.make_node("Relu", [f"h{i}"], [f"t{i}"], f"r{i}")]
        at = f"t{i}"
    nodes.append(helper.make_node("Add", [at, "x"], ["y"], "sum"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (8, 16)) for name in "xy"]
    graph = helper.make_graph(nodes, "eight", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "eight.onnx")
    data = [{"x": rng.standard_normal((8, 16)).astype(np.float32)} for _ in range(32)]
    yield SimpleNamespace(name="eight", path=folder / "eight.onnx", calibration=data[:16], evaluation=data[16:])


def _cell(db: float, over: bool) -> str:
    return f"{db:.1f}{' (over)' if over else ''}" if math.isfinite(db) else "-"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["eight", "ani_H", "ani_C", "magika", "resnet20"])
    parser.add_argument("--zoo", help="folder with zoo.py")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--shares", default="0.25,0.5,0.75")
    given = parser.parse_args()
    print(f"| network | limit (share) | plans | {' | '.join(WAYS)} | search less the best other |")
    print("|" + "---|" * (len(WAYS) + 4))
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), given.zoo):
            if case.name in given.networks:
                bench = opened(case, given.samples, given.trials, ("int8", "int4", "float"))
                show(bench, tuple(map(float, given.shares.split(","))))


def cases(folder: Path, zoo: str | None) -> Iterator[Any]:
    """The networks."""
    if zoo is None:
        yield from eight(folder)
        return
    sys.path.insert(0, zoo)
    found = import_module("zoo")
    yield from map(found.named, found.zoo())


def show(bench: Bench, shares: Sequence[float]) -> None:
    """Print the rows of a network."""
    for row in rows(bench, shares):
        others = [row[w] for w in WAYS[1:] if math.isfinite(row.get(w, math.nan)) and w not in row["over"]]
        cells = " | ".join(_cell(row.get(way, math.nan), way in row["over"]) for way in WAYS)
        apart = f"{row['search'] - max(others):+.2f}" if others else "-"
        print(f"| {bench.name} | {row['limit']} | {row['looked']} | {cells} | {apart} |", flush=True)


if __name__ == "__main__":
    record(main)
