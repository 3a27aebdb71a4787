"""`--calibrator auto` picks per tensor by the error at the consumers, and checks whole models on held-out samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import images, segmenter

from qdq import autocalib, placement
from qdq.autocalib import METHODS, pick, solve_auto
from qdq.calibrate import CalibrationTable, collect
from qdq.deploy import quantize
from qdq.errors import InputError
from qdq.graph import Model
from qdq.insert import insert
from qdq.judge import Judge, Split, split
from qdq.plan import Plan
from qdq.prepare import prepare
from qdq.qtensor import QParams, from_codes, to_codes
from qdq.scheme import Settings
from qdq.solve import Solution, activation_params, solve

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
    judge = Judge(model, everything)
    alone = []
    for method in METHODS:
        params = activation_params(model, plan, table, dict.fromkeys(table.tensors, method))
        alone.append(insert(model, plan, solve(model, plan, table, params=params)))
    found = judge.sqnrs_db(alone)
    assert judge.sqnr_db(made) > max(found) - autocalib.MARGIN_DB
    assert max(found) > min(found) + 1  # the choice matters here
    assert solution.notes[0].startswith("calibrator auto took ")
    assert all(f"{method} " in solution.notes[0] for method in METHODS)


def automatic(model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample]) -> tuple[Solution, Model]:
    return solve_auto(model, plan, table, samples=samples, complete=lambda s: (s, insert(model, plan, s)))


@pytest.mark.parametrize(
    ("mixture", "rough", "fine", "taken"),
    [
        ("max mse", [1, 2, 5, 3, 4, 4.5], [1, 5], "took entropy (2 entropy of 2 tensors)"),
        ("max mse", [1, 2, 3, 4, 4.5, 5], [1, 5], "took mixed (1 mse, 1 max of 2 tensors)"),
        ("max mse", [1, 2, 3, 4, 4.5, 5], [1, 1.2], "took mse (2 mse of 2 tensors)"),  # within the margin
        ("mse mse", [9, 2, 3, 4, 4.5], [1, 5], "took average (2 average of 2 tensors)"),  # mse is always in the final
    ],
)
def test_the_best_on_the_rough_comparison_and_the_default_are_compared_as_shipped(
    model: Model,
    plan: Plan,
    table: CalibrationTable,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    mixture: str,
    rough: list[float],
    fine: list[float],
    taken: str,
) -> None:
    scores = iter([rough, fine])
    seen = []
    monkeypatch.setattr(autocalib, "pick", lambda *_, **__: dict(zip(["image", "b"], mixture.split(), strict=True)))
    monkeypatch.setattr(Judge, "sqnrs_db", lambda _, models: [seen.append(len(models)), next(scores)][1])
    assert METHODS == ("mse", "percentile", "entropy", "max", "average")
    assert taken in automatic(model, plan, table, samples)[0].notes[0]
    assert seen == [len(rough), 2]


def test_a_tensor_is_equalized_only_where_that_beats_the_default_calibrator(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibrator that is bad enough makes equalization pay everywhere: then the default keeps the tensor instead."""
    monkeypatch.setattr(autocalib, "pick", lambda *_, **__: {"image": "mse", "b": "mse"})
    default = activation_params(model, plan, table, dict.fromkeys(table.tensors, "mse"))["b"]
    tried = []

    def equalizing(*arguments: Any, params: dict[str, QParams], **options: Any) -> Solution:
        tried.append(params)
        found = solve(*arguments, params=params, **options)
        return found if params["b"] == default else replace(found, divisors={"b": np.ones(4, np.float32)})

    monkeypatch.setattr(autocalib, "solve", equalizing)
    solution, _ = automatic(model, plan, table, samples)
    assert tried[0]["b"] == default and any(p["b"] != default for p in tried)
    assert all(p["b"] == default for p in tried[-2:])  # the two that are compared as shipped
    assert not solution.divisors


def test_a_plan_without_activations_needs_no_choice(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample]
) -> None:
    bare = replace(plan, points=())
    assert automatic(model, bare, table, samples)[0].activations == {}


def test_solve_alone_refuses_auto(model: Model, plan: Plan, table: CalibrationTable) -> None:
    with pytest.raises(InputError, match="solve_auto"):
        solve(model, plan, table)


def test_quantize_takes_auto_and_needs_samples(model: Model, samples: list[Sample]) -> None:
    settings = Settings(calibrator="auto", rounding="nearest", equalize="none")
    made = quantize(model, samples, settings=settings)
    assert "calibrator auto took" in made.solution.notes[0] and "biases are" in made.solution.notes[-1]
    with pytest.raises(InputError, match="auto compares models on the samples"):
        quantize(model, None, settings=settings, table=made.table)
