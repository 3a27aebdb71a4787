"""Candidates are compared a few at a time, and one by one where there is a budget: the figures are the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import graphs
import numpy as np
import pytest
from graphs import build, node, normal
from onnx import numpy_helper

from qdq.assemble import held_out
from qdq.assemble.held_out import AT_ONCE, HeldOutScore, Split
from qdq.core.resources import within
from qdq.measure.inference.session import Session
from qdq.model.model import Model


def product(noise: float = 0.0) -> Model:
    weight = normal(6, 4) + np.float32(noise) * normal(6, 4, seed=9)
    return build([node("MatMul", "x w", "y")], {"x": (3, 6)}, {"w": weight})


def score() -> HeldOutScore:
    data = graphs.samples(product(), 3)
    return HeldOutScore(product(), Split(samples=data, fit=(), held=frozenset(range(3))))


NOISES = (0.3, 0.0, 0.1, 0.2, 0.01)


def test_candidates_that_are_made_as_they_are_asked_for_are_gone_before_the_next() -> None:
    seen = list[weakref.ref[Model]]()
    most = 0

    def made() -> Iterator[Model]:
        nonlocal most
        for noise in NOISES:
            gc.collect()
            most = max(most, sum(each() is not None for each in seen))
            model = product(noise)
            seen.append(weakref.ref(model))
            yield model
            del model

    _, noises = score().energies(made())
    assert most < AT_ONCE < len(noises) == len(NOISES)
    most = 0
    with within(10_000_000):
        assert score().energies(made())[1] == noises and most == 0


def test_with_a_budget_the_float_model_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[str]()

    class Counted(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            opened.append(self._called)

    monkeypatch.setattr(held_out, "Session", Counted)
    with within(10_000_000):
        judge = score()
        judge.energies(product(noise) for noise in NOISES)
        judge.sqnr_db(product(0.5))
    assert opened.count("the float model") == 1 and len(opened) == 2 + len(NOISES)


def test_a_budget_changes_no_figure() -> None:
    candidates = [product(noise) for noise in NOISES]
    free = score().energies(candidates)
    with within(10_000_000):
        assert score().energies(candidates) == free
    weight = numpy_helper.to_array(product(0.3).proto.graph.initializer[0]) - normal(6, 4)
    wanted = [float(np.square(s["x"] @ weight).sum()) for s in graphs.samples(product(), 3)]
    np.testing.assert_allclose(free[1][0], wanted, rtol=1e-4)
    assert free[1][1] == [0.0] * 3


def test_nothing_to_compare_is_no_error() -> None:
    assert score().energies(iter(())) == ([], [])
