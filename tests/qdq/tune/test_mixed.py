"""Every aim and limit of one search: what is found keeps to them, nothing of the exhaustive search is much better."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import build, node, normal, samples
from models import save_samples

from calib_data import open_samples
from engines.core.documents import replace
from qdq.assemble.tables import measured
from qdq.build.cost import Kernel
from qdq.build.pricing.costing import MEMORY, SIZE, TIME, Cost, Costing, unpriced
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.measure.inference.inputs import input_specs
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.find import find
from qdq.tune.sensitivity.mixed.allocate import Chosen, Sum
from qdq.tune.sensitivity.mixed.choices import Choices
from qdq.tune.sensitivity.mixed.front import Allocation, Tried, front, knee, picked, plan_of
from qdq.tune.sensitivity.mixed.goal import MIB, Goal, said
from qdq.tune.sensitivity.mixed.pairs import adjacent, alternating, correlated
from qdq.tune.sensitivity.mixed.search import Search
from qdq.tune.sensitivity.mixed.sums import corrected

pytest.importorskip("scipy", reason="SciPy is not installed: pip install 'qdq[mixed]'")
TEXTS = ("int8", "int4", "float")
US = {"int8": 1.0, "int4": 2.5, "float": 3.0}


def network(products: int = 8) -> Model:
    """Products in a row with one Add across, of unlike widths."""
    widths = [16, *(16 + 16 * (i % 3) for i in range(products - 1)), 16]
    nodes, weights, at = [], {}, "x"
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        weights[f"w{i}"] = normal(inputs, outputs, seed=i) / inputs**0.5
        nodes += [node("MatMul", f"{at} w{i}", f"h{i}", name=f"n{i}"), node("Relu", f"h{i}", f"t{i}", name=f"r{i}")]
        at = f"t{i}"
    nodes += [node("Add", f"{at} x", "y", name="sum")]
    return load_float(build(nodes, {"x": (8, 16)}, weights).proto)


def cost_of(choices: Choices, chosen: Chosen) -> Cost:
    """By rule: bytes by the formats and 9 % more, times of a kernel a group, and of one at each change of precision."""
    groups = choices.candidates.groups
    size = 1.09 * sum(choices.weight_bytes(g, [text])[text] for g, text in enumerate(chosen))
    times = [(US[text] * (1 + g % 3), groups[g].nodes) for g, text in enumerate(chosen)]
    times += [(1.5, ()) for a, b in itertools.pairwise(chosen) if a != b]
    kernels = tuple(Kernel(us=us, macs=0, bytes=0, nodes=nodes, signature="") for us, nodes in times)
    us = sum(kernel.us for kernel in kernels)
    return Cost(of={SIZE: size, MEMORY: size + 5000, TIME: us}, kernels=kernels)


@pytest.fixture(scope="module")
def searched() -> Any:
    model = network()
    data = samples(model, 3)
    every = Candidates.of(model, Settings(), TEXTS)
    table = measured(every.model, every.measuring, data)
    found = find(Path("net.onnx"), model, data, settings=Settings(), texts=TEXTS, table=table)
    choices = Choices(candidates=every, unquantized_type="auto")
    assert len(every.groups) == 8 and all(len(own.trials) == 3 for own in found.groups)

    class Ruled(Search):
        def cost(self, chosen: Chosen) -> Cost:
            return self._cost.setdefault(chosen, cost_of(choices, chosen))

    def search(goal: Goal) -> Search:
        costing = Costing(recipe=Recipe(), shapes={})
        return Ruled(choices=choices, found=found, table=table, samples=data, costing=costing, goal=goal)

    return search


def by_sums_and_looks(search: Any, goal: Goal) -> tuple[Search, Chosen]:
    made = search(goal)
    return made, made.best()


@pytest.mark.parametrize(("cost", "share"), [(SIZE, 0.25), (SIZE, 0.5), (TIME, 0.25), (TIME, 0.5), (MEMORY, 0.5)])
def test_least_error_is_near_that_of_the_best_choices(searched: Any, cost: str, share: float) -> None:
    """Of the choices that fit, those with the least sums are measured too: none is better by 0.3 dB."""
    every = list(itertools.product(TEXTS, repeat=8))
    probe = searched(Goal(most={SIZE: 1e9}))
    costs = {chosen: probe.cost(chosen).of[cost] for chosen in every}
    least, most = min(costs.values()), costs[("float",) * 8]
    limit = least + share * (most - least)
    made, best = by_sums_and_looks(searched, Goal(most={cost: limit}))
    assert costs[best] <= limit
    fitting = sorted((c for c in every if costs[c] <= limit), key=made._sums["error"].of)[:24]
    assert made.quality(best).db >= max(made.quality(chosen).db for chosen in fitting) - 0.3


def test_size_and_time_are_minimized_within_a_bound_of_the_error(searched: Any) -> None:
    for aim, cost in (("size", SIZE), ("time", TIME)):
        made, best = by_sums_and_looks(searched, Goal(minimize=aim, min_db=25.0))
        assert made.quality(best).worst_db >= 25.5
        kept = [chosen for chosen in made.looked_at if made.quality(chosen).worst_db >= 25.5]
        assert made.cost(best).of[cost] == min(made.cost(chosen).of[cost] for chosen in kept)
        assert made.cost(best).of[cost] < made.cost(("float",) * 8).of[cost]


def test_what_cannot_be_reached_is_said_with_the_least_that_can(searched: Any) -> None:
    smallest = searched(Goal()).cost(("int4",) * 8).of[SIZE] / MIB
    least = said(SIZE, smallest * MIB)
    with pytest.raises(InputError, match=rf"the least reachable is {least}, --max-size-mib is 0.001 MiB"):
        searched(Goal(most={SIZE: 0.001 * MIB})).best()
    with pytest.raises(InputError, match=r"the most that was reached is \d+\.\d dB; --min-sqnr-db is 120"):
        searched(Goal(minimize="size", min_db=120.0)).best()
    with pytest.raises(InputError, match="with the other limits kept is"):
        searched(Goal(minimize="time", min_db=58.0, most={SIZE: smallest * MIB * 1.01})).best()


def test_metrics_of_a_goal_are_counted_with_labels(searched: Any) -> None:
    from qdq.deploy.compare.bound import bounds

    first = {**samples(network(), 1)[0], "truth": np.zeros((8, 16), np.float32)}
    (near,) = bounds({"cosine": 0.99}, network(), first)
    made, best = by_sums_and_looks(searched, Goal(minimize="size", bounds=(near,)))
    assert made.quality(best).values["cosine"] >= 0.99
    (mae,) = bounds({"mae": 0.5}, network(), first, "truth")
    assert not mae.higher_is_better and mae.kept(0.4) and not mae.kept(0.6)
    counting = mae.counting()
    counting.add(first, {"y": np.full((8, 16), 2.0)}, {"y": np.ones((8, 16))})
    assert counting.value == pytest.approx(2.0)
    with pytest.raises(InputError, match="scored against labels 'nothing'"):
        bounds({"mae": 0.5}, network(), first, "nothing")


def test_a_metric_may_be_a_function_in_a_file(tmp_path: Path) -> None:
    from qdq.deploy.compare.bound import bounds

    first = samples(network(), 1)[0]
    (tmp_path / "score.py").write_text("def least(found, float_, sample):\n    return found['y'].min()\n")
    (least,) = bounds({f"{tmp_path}/score.py:least": 0.0}, network(), first)
    counting = least.counting()
    for value in (1.0, 3.0):
        counting.add({}, {"y": np.array([value, 9.0])}, {})
    assert counting.value == 2.0 and least.kept(2.0)
    assert np.array_equal(first["x"], samples(network(), 1)[0]["x"])


def test_neighbours_and_the_two_sides_of_an_add_are_pairs() -> None:
    nodes = [
        node("MatMul", "x wa", "a", name="a"),
        node("MatMul", "x2 wb", "b", name="b"),
        node("Relu", "a", "ar", name="relu"),
        node("Add", "ar b", "s", name="add"),
        node("MatMul", "s wc", "y", name="c"),
    ]
    model = load_float(
        build(
            nodes, {"x": (8, 32), "x2": (8, 32)}, {n: normal(32, 32, seed=i) for i, n in enumerate(("wa", "wb", "wc"))}
        ).proto
    )
    every = Candidates.of(model, Settings(), ("int8",))
    names = [group.name for group in every.groups]
    pairs = {tuple(sorted((names[a], names[b]))) for a, b in adjacent(model, every.groups)}
    assert pairs == {("a", "b"), ("a", "c"), ("b", "c")}
    chosen = alternating([(0, 1), (1, 2)], ("int8", "float"), [("int8", "float")] * 3, "float")
    assert chosen[0] != chosen[1] != chosen[2]


def test_errors_that_are_correlated_add_more_than_their_sum() -> None:
    noise = [{"int8": 1.0, "int4": 4.0, "float": 0.0}, {"int8": 4.0, "int4": 16.0, "float": 0.0}]
    found = correlated(noise, (0, 1), ("int8", "int8"), 7.0, ["int8", "int4"])
    assert found["int8", "int8"] == pytest.approx(2.0)
    assert found["int4", "int4"] == pytest.approx(8.0) and ("float", "int8") not in found
    assert correlated(noise, (0, 1), ("int8", "int8"), math.inf, ["int8"]) == {}


def test_sums_are_corrected_by_what_whole_choices_show() -> None:
    true = Sum(base=3.0, groups=[{"a": 1.0 + g, "b": 4.0 - 0.5 * g} for g in range(4)])
    guess = Sum(base=2.5, groups=[{"a": 1.2 * (1.0 + g), "b": 0.7 * (4.0 - 0.5 * g)} for g in range(4)])
    every = list(itertools.product("ab", repeat=4))
    seen = {chosen: true.of(chosen) for chosen in every[::3]}
    fixed = corrected(guess, {**seen, every[1]: math.inf})
    assert max(abs(fixed.of(c) / true.of(c) - 1) for c in every) < 0.03
    assert max(abs(guess.of(c) / true.of(c) - 1) for c in every) > 0.1
    assert corrected(guess, {}) is guess


def tried(size: float, db: float, us: float | None = None, *, keeps: bool = True) -> Tried:
    return Tried(
        choice=(0,),
        how="",
        sum_db=db,
        sqnr_db=db,
        worst_db=db,
        size_mib=size,
        memory_mib=size,
        time_us=us,
        values={},
        keeps=keeps,
    )


def test_the_front_its_ends_and_its_knee() -> None:
    some = [
        tried(4.0, 60.0, 1.0),
        tried(1.0, 20.0, 4.0),
        tried(2.0, 50.0, 3.0),
        tried(3.0, 49.0, 2.0),
        tried(0.5, 9.0, 5.0),
    ]
    assert front(some, "size_mib") == [4, 1, 2, 0]
    assert front(some, "time_us") == [0]
    assert knee(some, "size_mib") == 2 and picked(some, "knee", "size_mib") == 2
    assert picked(some, "smallest", "size_mib") == 4 and picked(some, "most-accurate", "size_mib") == 0
    assert picked(some, "fastest", "size_mib") == 0 and picked(some, "3", "size_mib") == 3
    plain = tried(5.0, 150.0)
    assert knee([*some, plain], "size_mib") == 4 and knee([*some, replace(plain, quantizes=False)], "size_mib") == 2
    some[4] = replace(some[4], keeps=False)
    assert picked(some, "smallest", "size_mib") == 1
    with pytest.raises(InputError, match="needs predicted times"):
        picked([tried(1.0, 20.0)], "fastest", "size_mib")
    with pytest.raises(InputError, match="the choices 0 to 4"):
        picked(some, "5", "size_mib")


def test_times_of_tensorrt_are_of_int8_and_float_alone() -> None:
    assert unpriced(Recipe(), ("fp8", "int4")) == []
    assert unpriced(Recipe(settings=Settings(compiler="tensorrt")), ("int8:shift=off", "int4", "float")) == ["int4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    where = tmp_path_factory.mktemp("front")
    model = network(3)
    onnx.save(model.proto, where / "net.onnx")
    save_samples(where / "data", samples(model, 3))
    return where


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_a_plan_is_picked_from_the_front_which_is_drawn_and_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    data = ("--data", "data", "--candidates", "int8,int4,float")
    run("deploy", "net.onnx", *data, "--pick", "knee", "--plot", "front.png", "--out", "out")
    assert Path("front.png").read_bytes()[:4] == b"\x89PNG"
    made = Allocation.load("out/front.json")
    assert made.pick == "knee" and {"float everywhere", "int8 wherever it is possible"} <= {t.how for t in made.tried}
    page = Path("out/report.html").read_text()
    assert 'href="#plan-0"' in page and 'id="plan-0"' in page and "--front front.json --pick 0" in page
    number = picked(made.tried, "smallest", "size_mib")
    run("tune", "net.onnx", "--front", "out/front.json", "--pick", str(number), "-o", "small.json")
    prepared = load_float(folder / "net.onnx")
    assert Plan.load("small.json") == plan_of(prepared, made, number)
    other = load_float(build([node("MatMul", "x w", "y", name="n")], {"x": (8, 16)}, {"w": normal(16, 16)}).proto)
    with pytest.raises(InputError, match="from another model"):
        plan_of(other, made, 0)


def test_a_scheme_that_is_asked_for_is_what_is_chosen_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run(
        "tune",
        "net.onnx",
        "--data",
        "data",
        "--minimize",
        "error",
        "--scheme",
        "fp8",
        "--max-size-mib",
        "1",
        "-o",
        "p.json",
    )
    assert Allocation.load("p.front.json").texts == ("fp8", "float")
    data = open_samples("data", input_specs(load_float(folder / "net.onnx")))
    assert len(list(data)) == 3
