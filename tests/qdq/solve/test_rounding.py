"""Every file in qdq/rounding keeps its contract; GPTQ trades weight error for output error and never loses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import qdq.solve.rounding
from qdq.plan.settings import choices
from qdq.solve.hessian import Hessian
from qdq.solve.rounding import ROUNDINGS, gptq, nearest

FOLDER = Path(qdq.solve.rounding.__file__ or "").parent
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")
Round = Callable[..., np.ndarray]


def rounding(name: str) -> Round:
    return ROUNDINGS[name].round_rows or nearest.round_rows


def problem(rows: int = 6, columns: int = 24, *, seed: int = 0, rank: int = 4) -> tuple[np.ndarray, ...]:
    """W, scale and H of strongly correlated inputs: `rank` sources and a little noise."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(rows, columns))
    scale = np.abs(W).max(axis=1, keepdims=True) / 7  # 15 levels: errors large enough to be traded
    X = rng.normal(size=(columns, rank)) @ rng.normal(size=(rank, 400)) + 0.05 * rng.normal(size=(columns, 400))
    return W, scale, X @ X.T


def test_settings_name_every_rounding() -> None:
    assert sorted(map(str, choices("rounding"))) == sorted([*NAMES, "auto"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_a_rounding_keeps_its_contract(name: str, seed: int) -> None:
    W, scale, H = problem(seed=seed)
    codes = rounding(name)(W, scale, Hessian(H), low=-7, high=7)
    plain = nearest.round_rows(W, scale, Hessian(H), low=-7, high=7)
    assert codes.shape == W.shape
    assert np.array_equal(codes, np.rint(codes))
    assert codes.min() >= -7
    assert codes.max() <= 7
    assert np.array_equal(codes, rounding(name)(W.copy(), scale.copy(), Hessian(H.copy()), low=-7, high=7))
    assert (gptq.loss(W - codes * scale, H) <= gptq.loss(W - plain * scale, H)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("H", [None, np.zeros((24, 24))], ids=["none", "zero"])
def test_without_knowledge_of_the_inputs_every_rounding_is_nearest(name: str, H: np.ndarray | None) -> None:
    W, scale, _ = problem()
    expected = nearest.round_rows(W, scale, None, low=-7, high=7)
    hessian = None if H is None else Hessian(H)
    assert np.array_equal(rounding(name)(W, scale, hessian, low=-7, high=7), expected)


@pytest.mark.parametrize("name", NAMES)
def test_dead_columns_and_dead_rows_round_to_nearest_or_better(name: str) -> None:
    W, scale, H = problem()
    W[2] = 0
    H[5], H[:, 5] = 0, 0  # an input that is always zero
    H[9], H[:, 9] = 0, 0
    codes = rounding(name)(W, scale, Hessian(H), low=-7, high=7)
    assert np.isfinite(codes).all()
    assert not codes[2].any()
    plain = nearest.round_rows(W, scale, Hessian(H), low=-7, high=7)
    assert (gptq.loss(W - codes * scale, H) <= gptq.loss(W - plain * scale, H)).all()


def test_gptq_has_worse_weight_error_and_better_output_error() -> None:
    W, scale, H = problem()
    errors = [W - f.round_rows(W, scale, Hessian(H), low=-7, high=7) * scale for f in (gptq, nearest)]
    weight = [np.sum(e**2) for e in errors]
    output = [np.sum(gptq.loss(e, H)) for e in errors]
    assert weight[0] > weight[1]
    assert output[0] < 0.5 * output[1]  # 4 sources in 24 columns leave most errors free to cancel


def test_gptq_is_nearest_on_uncorrelated_inputs() -> None:
    W, scale, _ = problem()
    H = np.diag(np.random.default_rng(3).uniform(1, 2, 24))
    expected = nearest.round_rows(W, scale, Hessian(H), low=-7, high=7)
    assert np.array_equal(gptq.round_rows(W, scale, Hessian(H), low=-7, high=7), expected)


def test_gptq_in_blocks_is_the_algorithm_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    W, scale, H = problem(columns=40, rank=12)
    whole = gptq.round_rows(W, scale, Hessian(H), low=-7, high=7)
    monkeypatch.setattr(gptq, "BLOCK", 7)
    assert np.array_equal(gptq.round_rows(W, scale, Hessian(H), low=-7, high=7), whole)


def textbook(W: np.ndarray, scale: np.ndarray, H: np.ndarray, order: np.ndarray, damping: float) -> np.ndarray:
    """GPTQ as the paper derives it (OBQ, eq. 2 and 3, in a fixed order): the inverse is updated after every column."""
    inverse = np.linalg.inv(H + damping * np.mean(np.diag(H)) * np.eye(len(H)))
    left, codes = W.copy(), np.empty_like(W)
    for position, j in enumerate(order):
        codes[:, j] = np.clip(np.rint(left[:, j] / scale[:, 0]), -7, 7)
        error = (left[:, j] - codes[:, j] * scale[:, 0]) / inverse[j, j]
        unquantized_type = order[position + 1 :]
        left[:, unquantized_type] -= np.outer(error, inverse[j, unquantized_type])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_gptq_is_the_algorithm_of_the_paper_in_either_order(act_order: bool, damping: float) -> None:
    W, scale, H = problem(columns=20, rank=30)  # well conditioned: both ways to the same numbers
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(20)
    wanted = textbook(W, scale, H, order, damping)
    found = gptq.round_rows(W, scale, Hessian(H, damping, act_order), low=-7, high=7)
    better = gptq.loss(W - wanted * scale, H) < gptq.loss(
        W - nearest.round_rows(W, scale, Hessian(H), low=-7, high=7) * scale, H
    )
    assert better.any()
    assert np.array_equal(found[better], wanted[better])


def test_much_damping_leaves_nearest_codes() -> None:
    W, scale, H = problem()
    plain = nearest.round_rows(W, scale, Hessian(H), low=-7, high=7)
    assert not np.array_equal(gptq.round_rows(W, scale, Hessian(H), low=-7, high=7), plain)
    assert np.array_equal(gptq.round_rows(W, scale, Hessian(H, 1e9), low=-7, high=7), plain)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 30), power=st.integers(-12, 12), bits=st.integers(2, 8))
def test_gptq_never_loses_to_nearest_at_any_rank_or_unit(seed: int, rank: int, power: int, bits: int) -> None:
    W, _, H = problem(rows=3, columns=12, seed=seed, rank=rank)
    H = H * 10.0**power
    high = 2 ** (bits - 1) - 1
    scale = np.abs(W).max(axis=1, keepdims=True) / high
    codes, plain = (f.round_rows(W, scale, Hessian(H), low=-high, high=high) for f in (gptq, nearest))
    assert (gptq.loss(W - codes * scale, H) <= gptq.loss(W - plain * scale, H)).all()
    assert np.abs(codes).max() <= high


def test_loss_is_the_output_error_of_each_row() -> None:
    rng = np.random.default_rng(0)
    E, X = rng.normal(size=(3, 5)), rng.normal(size=(5, 50))
    assert np.allclose(gptq.loss(E, X @ X.T), np.sum((E @ X) ** 2, axis=1))
