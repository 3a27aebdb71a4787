"""Equalize 'auto': the strong formula where samples not fitted on gain by it, the cautious one elsewhere."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal

from engines.core.documents import replace
from qdq.assemble import choose_equalization
from qdq.assemble.choose_equalization import CAUTIOUS, STRONG, resolved
from qdq.assemble.quantize import quantize
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings

POWERS = np.geomspace(1, 300, 32).astype(np.float32)[np.random.default_rng(4).permutation(32)]


def outliers() -> Model:
    """x -> MatMul -> y, whose small input channels have large weights: all channels matter alike."""
    return build([node("MatMul", "x w", "y")], {"x": (64, 32)}, {"w": normal(32, 16) / POWERS[:, None]})


def steady(count: int = 9) -> list[graphs.Sample]:
    return [{"x": s["x"] * POWERS} for s in graphs.samples(outliers(), count)]


def shifting(count: int = 9) -> list[graphs.Sample]:
    """Each sample has other channels large: what was small while fitting is large later."""
    rng = np.random.default_rng(7)
    return [{"x": s["x"] * POWERS[rng.permutation(32)]} for s in graphs.samples(outliers(), count)]


def taken(data: list[graphs.Sample] | None, model: Model | None = None) -> tuple[str, tuple[str, ...]]:
    model = model or outliers()
    plan, notes = resolved(model, placement.plan(model, Settings(equalize="auto")), data)
    return plan.settings.equalize, notes


def test_outlier_channels_that_stay_take_the_strong_formula() -> None:
    formula, notes = taken(steady())
    assert formula == STRONG
    assert notes[0].count("+") == choose_equalization.PARTS


def test_outlier_channels_that_move_take_the_cautious_one() -> None:
    formula, notes = taken(shifting())
    assert formula == CAUTIOUS
    assert notes[0].endswith(tuple("0123456789"))


def test_the_first_turn_that_fails_ends_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_equalization, "MINIMUM_GAIN_DB", 1000.0)
    _, notes = taken(steady())
    assert notes[0].rpartition(": ")[2].count(",") == 0


def test_the_order_of_the_samples_changes_nothing() -> None:
    assert taken(steady()) == taken(steady()[::-1])


def test_nothing_is_compared_where_there_is_no_ground_to() -> None:
    assert taken(None) == (CAUTIOUS, ())
    formula, notes = taken(steady(2))
    assert formula == CAUTIOUS
    assert "too few to compare" in notes[0]
    convolution = graphs.conv()
    assert taken(graphs.samples(convolution, 9), convolution) == (CAUTIOUS, ())


def test_a_large_model_is_not_quantized_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_equalization, "is_large", lambda tensors: True)
    formula, notes = taken(steady())
    assert formula == CAUTIOUS
    assert "size" in notes[0]


def test_other_settings_come_back_as_they_are() -> None:
    plan = placement.plan(outliers(), Settings(equalize="lae"))
    assert resolved(outliers(), plan, steady()) == (plan, ())


@pytest.mark.parametrize("calibrator", ["mse", "auto"])
def test_a_quantized_model_says_what_was_taken_and_its_plan_holds_it(calibrator: str) -> None:
    settings = Settings(equalize="auto", calibrator=calibrator)
    made = quantize(outliers(), steady(), settings=settings)
    assert made.plan.settings == replace(settings, equalize=STRONG)
    assert made.solution.notes[0].startswith("equalize auto took smooth")
    again = quantize(outliers(), steady(), plan=made.plan)
    assert again.model.proto == made.model.proto
