"""`--calibrator auto` picks per tensor by the error at the consumers, and checks whole models on held-out samples."""

from __future__ import annotations

from pathlib import Path

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
from qdq.judge import Judge, split
from qdq.plan import Plan
from qdq.prepare import prepare
from qdq.qtensor import from_codes, to_codes
from qdq.scheme import Settings
from qdq.solve import activation_params, solve

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


def test_auto_is_as_good_as_every_method_on_the_held_out_samples_but_for_the_margin(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample]
) -> None:
    solution = solve_auto(model, plan, table, samples=samples)
    judge = Judge(model, split(samples))
    auto = judge.sqnr_db(insert(model, plan, solution))
    for method in METHODS:
        params = activation_params(model, plan, table, dict.fromkeys(table.tensors, method))
        alone = solve(model, plan, table, params=params)
        assert auto > judge.sqnr_db(insert(model, plan, alone)) - autocalib.MARGIN_DB
    assert solution.notes[0].startswith("calibrator auto took ")
    assert all(f"{method} " in solution.notes[0] for method in METHODS)


def test_a_mixture_that_loses_is_dropped(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([1.0, 5.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(autocalib, "pick", lambda *_, **__: {"image": "max", "b": "mse"})
    monkeypatch.setattr(Judge, "sqnr_db", lambda *_: next(scores))
    solution = solve_auto(model, plan, table, samples=samples)
    assert f"took {METHODS[1]} (2 {METHODS[1]} of 2 tensors)" in solution.notes[0]


def test_mse_stays_unless_another_is_clearly_better(
    model: Model, plan: Plan, table: CalibrationTable, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([5.0, 5.4, 5.3, 5.2])
    monkeypatch.setattr(autocalib, "pick", lambda *_, **__: {"image": "mse", "b": "mse"})
    monkeypatch.setattr(Judge, "sqnr_db", lambda *_: next(scores))
    assert "took mse (2 mse of 2" in solve_auto(model, plan, table, samples=samples).notes[0]


def test_solve_alone_refuses_auto(model: Model, plan: Plan, table: CalibrationTable) -> None:
    with pytest.raises(InputError, match="solve_auto"):
        solve(model, plan, table)


def test_quantize_takes_auto_and_needs_samples(model: Model, samples: list[Sample]) -> None:
    settings = Settings(calibrator="auto", rounding="nearest", equalize="none")
    made = quantize(model, samples, settings=settings)
    assert "calibrator auto took" in made.solution.notes[0] and "biases are" in made.solution.notes[-1]
    with pytest.raises(InputError, match="auto compares models on the samples"):
        quantize(model, None, settings=settings, table=made.table)
