"""`--calibrator auto` picks per tensor by the error at the consumers, and checks whole models on held-out samples."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import images, segmenter

from engines.core.documents import replace
from qdq.assemble import choose_calibrator
from qdq.assemble.choose_calibrator import METHODS, pick, solve_auto
from qdq.assemble.held_out import HeldOutScore, Split, clearly_less, split
from qdq.assemble.insert import insert
from qdq.assemble.quantize import quantize
from qdq.core.errors import InputError
from qdq.core.qtensor import QParams, from_codes, to_codes
from qdq.core.resources import within
from qdq.measure.collect import collect
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.solve.activations import activation_params
from qdq.solve.solve import Solution, solve

Sample = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model() -> Model:
    return prepare(Model(proto=segmenter(), directory=Path(), sha256="m"))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """One value in a thousand is far out, so that the calibrators disagree."""
    rng = np.random.default_rng(3)
    found = images(12)
    for sample in found:
        sample["image"][rng.random(sample["image"].shape) < 1e-2] *= 20
    return found


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    return placement.plan(model, Settings(calibrator="auto", rounding="nearest", equalize="none"))


@pytest.fixture(scope="module")
def table(model: Model, plan: Plan, samples: list[Sample]) -> CalibrationTable:
    return collect(model, plan, samples)


def test_pick_takes_the_least_error_behind_the_consumer(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample]
) -> None:
    """The same error, computed here by the convolution's definition at one tensor."""
    held = split(samples)
    weight = model.array("encode.weight").astype(np.float64)
    errors = {}
    for method in METHODS:
        params = activation_params(model, plan, table, dict.fromkeys(table.tensors, method))["image"]
        errors[method] = 0.0
        for sample in held.fitting():
            x = sample["image"]
            e = np.pad((x - from_codes(to_codes(x, params), params))[0, 0].astype(np.float64), 1)
            windows = np.lib.stride_tricks.sliding_window_view(e, (3, 3))
            errors[method] += float(np.sum(np.einsum("hwij,oij->ohw", windows, weight[:, 0]) ** 2))
    least = min(errors, key=errors.__getitem__)
    every = {m: activation_params(model, plan, table, dict.fromkeys(table.tensors, m)) for m in METHODS}
    chosen = pick(model, plan, every, held)["image"]
    # float32 sums in the graph: methods whose errors differ by less than 1e-4 are alike
    assert errors[chosen] == pytest.approx(errors[least], rel=1e-4)
    assert max(errors.values()) > 1.1 * errors[least]  # the choice matters here


def test_auto_is_as_good_as_every_method_on_the_calibration_samples(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample]
) -> None:
    solution, made = automatic(model, plan, table, samples)
    everything = Split(samples=samples, fit=(), held=frozenset(range(len(samples))))
    judge = HeldOutScore(model, everything)
    alone = []
    for method in METHODS:
        params = activation_params(model, plan, table, dict.fromkeys(table.tensors, method))
        alone.append(insert(model, plan, solve(model, plan, table, params=params)))
    found = judge.sqnrs_db(alone)
    assert judge.sqnr_db(made) > max(found) - choose_calibrator.MARGIN_DB
    assert max(found) > min(found) + 1  # the choice matters here
    assert solution.notes[0].startswith("calibrator auto took ")
    chosen = [activation_params(model, plan, table, dict.fromkeys(table.tensors, method)) for method in METHODS]
    for index, method in enumerate(METHODS):  # those that choose what one before them chooses are not tried again
        assert (f"{method} " in solution.notes[0].partition("samples: ")[2]) == (chosen[index] not in chosen[:index])


def automatic(model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample]) -> tuple[Solution, Model]:
    return solve_auto(model, plan, table, samples=samples, complete=lambda s: (s, insert(model, plan, s)))


def test_a_budget_changes_nothing_and_keeps_no_candidate(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample]
) -> None:
    solution, made = automatic(model, plan, table, samples)
    there, most = list[weakref.ref[Model]](), 0

    def complete(solution: Solution) -> tuple[Solution, Model]:
        nonlocal most
        gc.collect()
        most = max(most, sum(each() is not None for each in there))
        made = insert(model, plan, solution)
        there.append(weakref.ref(made))
        return solution, made

    with within(10_000_000):
        again, same = solve_auto(model, plan, table, samples=samples, complete=complete)
    assert same.proto == made.proto and again.notes == solution.notes
    assert len(there) > 2 and most == 0


@pytest.mark.parametrize(
    ("mixture", "noise", "taken"),
    [
        ("max mse", [5, 4, 1, 4, 4, 9, 4], "took entropy (2 entropy of 2 tensors)"),
        ("max mse", [5, 4, 4, 4, 3, 9, 1], "took mixed (1 mse, 1 max of 2 tensors)"),
        ("max mse", [5, 4, 4, 4, 3, 9, 2.9], "took average (2 average of 2 tensors)"),  # simpler, and as good
        ("max mse", [5, 4.8, 4.8, 4.8, 4.8, 9, 4.8], "took mse (2 mse of 2 tensors)"),  # within the margin
        ("max mse", [5, 6, 6, 6, 6, 9, 7], "took mse (2 mse of 2 tensors)"),
        ("max mse", [5, 6, 6, 6, 6, 9, 1], "took mixed (1 mse, 1 max of 2 tensors)"),
        ("mse mse", [9, 2, 3, 4, 1, 9], "took average (2 average of 2 tensors)"),
    ],
)
def test_the_simplest_of_the_best_is_taken(
    model: Model,
    plan: Plan,
    table: CalibrationTable,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    mixture: str,
    noise: list[float],
    taken: str,
) -> None:
    seen = []

    def distinct(
        model: Model, plan: Plan, table: CalibrationTable, methods: dict[str, str], **_: Any
    ) -> dict[str, QParams]:
        """Ranges that differ between all calibrators, so that none is left out."""
        factor = 1 + METHODS.index(next(iter(methods.values()))) / 100
        found = activation_params(model, plan, table, methods)
        return {t: replace(p, scale=np.asarray(p.scale * factor, np.float32)) for t, p in found.items()}

    monkeypatch.setattr(choose_calibrator, "activation_params", distinct)
    monkeypatch.setattr(
        choose_calibrator, "pick", lambda *_, **__: dict(zip(["image", "b"], mixture.split(), strict=True))
    )
    noises = [[each] * 4 for each in noise]
    monkeypatch.setattr(
        HeldOutScore, "energies", lambda _, models: ([100.0] * 4, [seen.append(len(list(models))), noises][1])
    )
    assert METHODS == ("mse", "percentile", "entropy", "max", "average", "ample")
    assert taken in automatic(model, plan, table, samples)[0].notes[0]
    assert seen == [len(noise)]


def test_a_gain_counts_where_the_samples_agree_on_it() -> None:
    before = [10.0] * 8
    assert clearly_less([8.0, 9.0] * 4, before, least_db=0.25, certainty=3)
    assert not clearly_less([9.8, 9.9] * 4, before, least_db=0.25, certainty=3)  # certain, and too little
    assert not clearly_less([1.0, *[10.0] * 7], before, least_db=0.25, certainty=3)  # 0.5 dB, all of it from one sample
    assert not clearly_less([1.0], [10.0], least_db=0.25, certainty=3)
    assert clearly_less([1.0], [10.0], least_db=0.25, certainty=0)
    assert clearly_less([1.0, *[10.0] * 7], before, least_db=0.25, certainty=0)
    assert not clearly_less([1.0, np.inf], [10.0, 10.0], least_db=0.25, certainty=3)
    assert clearly_less([1.0, 1.0], [10.0, np.inf], least_db=0.25, certainty=3)


def test_a_mixture_must_be_surer_than_a_method() -> None:
    unsure = {"mse": [10.0, 10, 10, 10], "max": [1.0, 10, 10, 6], "mixed": [1.0, 10, 10, 6]}  # 1.5 standard errors
    assert choose_calibrator._best(unsure) == "max"
    assert choose_calibrator._best({name: noise for name, noise in unsure.items() if name != "max"}) == "mse"
    assert choose_calibrator._best({**unsure, "max": [9.9] * 4, "mixed": [5.0, 6, 5, 6]}) == "mixed"


def test_a_gain_by_chance_is_rarely_taken_for_one() -> None:
    """Twenty samples, two candidates that are equally good: about one in 700 passes three standard errors."""
    rng = np.random.default_rng(0)
    draws = rng.gamma(2, size=(2000, 2, 20))
    taken = sum(clearly_less(after.tolist(), before.tolist(), least_db=0.25, certainty=3) for before, after in draws)
    assert taken < 20  # of 2000; by the sum alone it would be 40 % of them
    assert sum(after.sum() < before.sum() * 10**-0.025 for before, after in draws) > 600


def test_a_tensor_is_equalized_only_where_that_beats_the_default_calibrator(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibrator that is bad enough makes equalization pay everywhere: then the default keeps the tensor instead."""
    monkeypatch.setattr(choose_calibrator, "pick", lambda *_, **__: {"image": "mse", "b": "mse"})
    default = activation_params(model, plan, table, dict.fromkeys(table.tensors, "mse"))["b"]
    tried = []

    def equalizing(*arguments: Any, params: dict[str, QParams], **options: Any) -> Solution:
        tried.append(params)
        found = solve(*arguments, params=params, **options)
        return found if params["b"] == default else replace(found, divisors={"b": np.ones(4, np.float32)})

    monkeypatch.setattr(choose_calibrator, "solve", equalizing)
    solution, _ = automatic(model, plan, table, samples)
    assert tried[0]["b"] == default and any(p["b"] != default for p in tried)
    again = [p for p, before in zip(tried[1:], tried, strict=False) if p.keys() == before.keys() and p["b"] == default]
    assert len(again) == sum(p["b"] != default for p in tried)  # each of them once more with the default there
    assert not solution.divisors


def test_calibrators_that_choose_the_same_ranges_are_tried_once(
    model: Model, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = placement.plan(model, Settings(scheme="fp8", calibrator="auto"))
    tried = []
    monkeypatch.setattr(choose_calibrator, "solve", lambda *a, **o: [tried.append(1), solve(*a, **o)][1])
    solution, _ = automatic(model, plan, collect(model, plan, samples), samples)
    assert len(tried) == 1 and "took mse (2 mse of 2 tensors)" in solution.notes[0]


def test_a_plan_without_activations_needs_no_choice(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample]
) -> None:
    bare = replace(plan, points=())
    assert automatic(model, bare, table, samples)[0].activations == {}


def test_solve_alone_refuses_auto(model: Model, plan: Plan, table: CalibrationTable) -> None:
    with pytest.raises(InputError, match="solve_auto"):
        solve(model, plan, table)


def test_quantize_takes_auto_and_needs_samples(model: Model, samples: list[Sample]) -> None:
    settings = Settings(calibrator="auto", rounding="nearest", equalize="none", shift=True)
    made = quantize(model, samples, settings=settings)
    assert "calibrator auto took" in made.solution.notes[0] and made.solution.notes[-1].startswith("bias")
    with pytest.raises(InputError, match="auto compares models on the samples"):
        quantize(model, None, settings=settings, table=made.table)
