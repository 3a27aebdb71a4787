"""Fit of a model's constants to measured times, and what rows that it did not see say of it.

A Levenberg-Marquardt fit of log(predicted / measured) with a Huber loss, the constants' logarithms drawn to their
priors. GPUs and families with many rows count less per row. Nothing is random but the draws of `corrected`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from costs.models import Model, Started
from costs.published import Row
from engines.cost.correction import factors

Array = npt.NDArray[Any]
NOISE = 0.15  # spread of log(predicted / measured) that is expected
HUBER = 1.5  # of it; beyond, a row pulls no harder
STEP, LIMIT, ROUNDS = 0.03, 0.4, 8  # of the logarithms: of the numerical derivative, of one step; steps at most
DRAWS = 200


@dataclass(frozen=True)
class Score:
    """Of predicted times, and of INT8 / FP16 ratios: median of |predicted / measured - 1|, rank correlation, sign."""

    rows: int
    error: float
    log_error: float
    rank: float
    pairs: int
    ratio_error: float
    ratio_rank: float
    ratio_sign: float


def fitted(model: Model, rows: Sequence[Row], seen: Array) -> dict[str, float]:
    """The constants that fit the rows of the mask best."""
    names = list(model.priors)
    if not names:
        return {}
    start = np.log([model.priors[name][0] for name in names])
    spread = np.array([model.priors[name][1] for name in names])
    target = np.log([row.measured_us for row in rows])[seen]
    groups = Counter(row.group for row, chosen in zip(rows, seen, strict=True) if chosen)
    weights = np.array([groups[row.group] ** -0.5 for row, chosen in zip(rows, seen, strict=True) if chosen])
    weights /= weights.mean()

    def residuals(x: Array) -> Array:
        values = dict(zip(names, np.exp(x).tolist(), strict=True))
        result: Array = np.log(model(values))[seen] - target
        return result

    def loss(x: Array, r: Array) -> float:
        z = np.abs(r / NOISE)
        huber = np.where(z < HUBER, z**2, 2 * HUBER * z - HUBER**2)
        return float((weights * huber).sum() + (((x - start) / spread) ** 2).sum())

    x, damping = start, 1e-2
    r = residuals(x)
    least = loss(x, r)
    for _ in range(ROUNDS):
        moves = np.eye(len(x)) * STEP
        slope = np.stack([(residuals(x + d) - residuals(x - d)) / (2 * STEP) for d in moves], axis=1)
        z = np.abs(r / NOISE)
        pull = weights * np.where(z < HUBER, 1, HUBER / np.maximum(z, 1e-9)) / NOISE**2
        matrix = slope.T @ (pull[:, None] * slope) + np.diag(spread**-2.0)
        gradient = slope.T @ (pull * r) + (x - start) / spread**2
        before = least
        for _ in range(6):
            step = np.clip(-np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), gradient), -LIMIT, LIMIT)
            tried = residuals(x + step)
            if (found := loss(x + step, tried)) < least:
                x, r, least, damping = x + step, tried, found, max(damping / 4, 1e-4)
                break
            damping *= 4
        if before - least < 1e-3 * before:
            break
    return dict(zip(names, np.exp(x).tolist(), strict=True))


def left_out(model: Model, rows: Sequence[Row], groups: Sequence[str]) -> Array:
    """Predicted times, those of each group by constants that its rows had no part in."""
    labels = np.array(groups)
    found = np.zeros(len(rows))
    for label in sorted(set(groups)):
        out = labels == label
        found[out] = model(fitted(model, rows, ~out))[out]
    return found


def starts_left_out(model: Started, rows: Sequence[Row], groups: Sequence[str]) -> tuple[Array, Array]:
    """Predicted times as of `left_out`, and what of them are starts."""
    labels = np.array(groups)
    found, starts = np.zeros(len(rows)), np.zeros(len(rows))
    for label in sorted(set(groups)):
        out = labels == label
        values = fitted(model, rows, ~out)
        found[out], starts[out] = model(values)[out], model.starts(values)[out]
    return found, starts


def score(rows: Sequence[Row], predicted: Array) -> Score:
    """How true predicted times are."""
    measured = np.array([row.measured_us for row in rows])
    pairs = ratio_pairs(rows)
    ours, theirs = (np.array([values[i] / values[j] for i, j in pairs]) for values in (predicted, measured))
    nan = float("nan")
    return Score(
        rows=len(rows),
        error=float(np.median(np.abs(predicted / measured - 1))),
        log_error=float(np.abs(np.log(predicted / measured)).mean()),
        rank=_rank(predicted, measured),
        pairs=len(pairs),
        ratio_error=float(np.median(np.abs(ours / theirs - 1))) if pairs else nan,
        ratio_rank=_rank(ours, theirs) if len(pairs) > 2 else nan,
        ratio_sign=float(np.mean((ours < 1) == (theirs < 1))) if pairs else nan,
    )


def ratio_pairs(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Indices of INT8 and FP16 rows of one source, GPU, network and batch."""
    found: dict[tuple[str, ...], dict[str, int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row.pair, {})[row.precision] = index
    return [(both["int8"], both["fp16"]) for both in found.values() if {"int8", "fp16"} <= set(both)]


def corrected(rows: Sequence[Row], predicted: Array, starts: Array | None = None, points: int = 4) -> float:
    """Median error of the other rows of a GPU where a few drawn ones correct it, over draws and GPUs.

    One factor corrects it; or two, of starts and of all else, as of `engines.cost.correction`, where starts are given.
    """
    draw = np.random.default_rng(0)
    measured = np.array([row.measured_us for row in rows])
    labels = np.array([row.gpu_name for row in rows])
    errors = []
    for label in sorted(set(labels)):
        mine = np.flatnonzero(labels == label)
        if len(mine) <= points:
            continue
        for _ in range(DRAWS):
            known = draw.choice(mine, points, replace=False)
            others = np.setdiff1d(mine, known)
            if starts is None:
                better = predicted[others] * np.exp(np.mean(np.log(measured[known] / predicted[known])))
            else:
                both = factors(predicted[known].tolist(), starts[known].tolist(), measured[known].tolist())
                better = (predicted[others] - starts[others]) * both.work + starts[others] * both.start
            errors.append((others, np.abs(better / measured[others] - 1)))
    if not errors:
        return float("nan")
    spread = np.concatenate([values for _, values in errors])
    weight = np.concatenate([np.full(len(index), 1 / DRAWS) for index, _ in errors])
    order = np.argsort(spread)
    return float(spread[order][np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)])


def _rank(a: Array, b: Array) -> float:
    """Spearman's rank correlation; equal values share their mean rank."""
    first, second = (_ranks(values) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Array) -> Array:
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    result: Array = (np.cumsum(count) - (count - 1) / 2)[index]
    return result
