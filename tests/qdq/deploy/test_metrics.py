"""Task metrics against figures worked out by hand or by the definition, sample by sample and all at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from qdq.core.errors import InputError
from qdq.deploy.compare.metrics import METRICS, metric, next_tokens

RNG = np.random.default_rng(0)


def value(
    name: str, *samples: tuple[np.ndarray, np.ndarray, np.ndarray | None], per: float = 1.0, axis: int = -1
) -> float:
    counting = metric(name, per=per, axis=axis)
    for found, reference, labels in samples:
        counting.add(found, reference, labels)
    return counting.value


def test_perplexity_of_even_logits_is_the_number_of_classes() -> None:
    logits = np.zeros((1, 5, 32), np.float32)
    assert value("perplexity", (logits, logits, next_tokens(np.arange(5)[None]))) == pytest.approx(32)


def test_perplexity_is_the_mean_surprise_of_the_next_token() -> None:
    tokens = RNG.integers(0, 7, (2, 6))
    logits = RNG.normal(size=(2, 6, 7)).astype(np.float32)
    surprise = []
    for row, chosen in zip(logits.astype(np.float64), tokens, strict=True):
        for at in range(5):
            softmax = np.exp(row[at]) / np.exp(row[at]).sum()
            surprise.append(-math.log(softmax[chosen[at + 1]]))
    expected = math.exp(float(np.mean(surprise)))
    labels = next_tokens(tokens)
    assert value("perplexity", (logits, logits, labels)) == pytest.approx(expected)
    halves = [(logits[i : i + 1], logits[i : i + 1], labels[i]) for i in range(2)]  # labels without the batch axis
    assert value("perplexity", *halves) == pytest.approx(expected)
    shifted = logits + 1000  # softmax does not change
    assert value("perplexity", (shifted, shifted, labels)) == pytest.approx(expected, rel=1e-4)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert value("perplexity", (softmax, softmax, labels)) == pytest.approx(expected, rel=1e-5)


def test_perplexity_needs_labels_in_the_shape_and_classes_of_the_output() -> None:
    logits = np.zeros((1, 5, 4), np.float32)
    with pytest.raises(InputError, match=r"shape \[4\]; perplexity needs \[1, 5\]"):
        value("perplexity", (logits, logits, np.zeros(4, np.int64)))
    with pytest.raises(InputError, match="A label is 4, but the output has 4 classes"):
        value("perplexity", (logits, logits, np.full(5, 4)))
    with pytest.raises(InputError, match="no whole numbers"):
        value("perplexity", (logits, logits, np.full(5, 0.5)))


def test_top1_counts_labels_or_agreement_and_leaves_out_negative_labels() -> None:
    found = np.asarray([[0, 1, 0], [9, 1, 0], [0, 0, 1], [1, 0, 0]], np.float32)  # argmax 1 0 2 0
    reference = np.asarray([[0, 1, 0], [1, 9, 0], [0, 0, 1], [1, 0, 0]], np.float32)  # argmax 1 1 2 0
    assert value("top1", (found, reference, None)) == 0.75
    assert value("top1", (found, reference, np.asarray([1, 0, 0, -1]))) == pytest.approx(2 / 3)
    grid = np.moveaxis(found[None], 2, 1)[..., None]  # 1 x classes x 4 x 1
    assert value("top1", (grid, grid, np.asarray([1, 0, 0, 0])), axis=1) == 0.75
    turned = np.moveaxis(grid, 1, -1)  # channels last
    assert value("top1", (turned, turned, np.asarray([1, 0, 0, 0])), axis=3) == 0.75


def test_dice_of_classes_leaves_out_the_background() -> None:
    labels = np.asarray([0, 0, 1, 1, 2, 2, 2, 2])
    argmax = np.asarray([0, 1, 1, 1, 2, 2, 2, 0])
    logits = 5.0 * np.moveaxis(np.eye(3)[argmax], -1, 0)[None, :, :, None] - 1
    expected = (2 * 2 / (3 + 2) + 2 * 3 / (3 + 4)) / 2
    assert value("dice", (logits, logits, labels), axis=1) == pytest.approx(expected)
    truth = 5.0 * np.moveaxis(np.eye(3)[labels], -1, 0)[None, :, :, None] - 1
    assert value("dice", (logits, truth, None), axis=1) == pytest.approx(expected)
    halves = [(logits[:, :, i : i + 4], truth[:, :, i : i + 4], labels[i : i + 4]) for i in (0, 4)]
    assert value("dice", *halves, axis=1) == pytest.approx(expected)  # over all voxels, not the mean of samples


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.1, 0.9)], ids=["logits", "probabilities"])
def test_dice_of_one_channel_and_of_independent_masks(low: float, high: float) -> None:
    mask, truth = np.asarray([1, 1, 0, 0]), np.asarray([1, 0, 1, 0])
    one = np.where(mask, high, low)[None, None, :, None]
    expected = np.where(truth, high, low)[None, None, :, None]
    assert value("dice", (one, expected, None), axis=1) == 0.5
    assert value("dice", (one, expected, truth), axis=1) == 0.5
    both = np.concatenate([one, expected], axis=1)
    labels = np.concatenate([expected, expected], axis=1)
    assert value("dice", (both, labels, (labels > 0.5 if low > 0 else labels > 0).astype(int)), axis=1) == 0.75


def test_cosine_is_the_mean_over_items() -> None:
    found = np.asarray([[1, 0], [1, 1], [0, 0]], np.float32)
    reference = np.asarray([[2, 0], [1, 0], [0, 0]], np.float32)
    assert value("cosine", (found, reference, None)) == pytest.approx((1 + math.sqrt(0.5) + 1) / 3)
    assert value("cosine", (found, found, reference)) == pytest.approx((1 + math.sqrt(0.5) + 1) / 3)
    assert value("cosine", (np.ones(4), np.ones(4), None)) == pytest.approx(1)


def test_spearman_of_numbers_shares_the_rank_of_ties() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    found, labels = np.asarray([1.0, 2, 2, 9]), np.asarray([10.0, 20, 30, 40])
    assert value("spearman", (found, found, labels)) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    apart = [(found[i : i + 1], found[i : i + 1], labels[i : i + 1]) for i in range(4)]
    assert value("spearman", *apart) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert value("spearman", (found, labels, None)) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=20, unique=True))
def test_spearman_sees_order_only(values: list[float]) -> None:
    numbers = np.asarray(values)
    assert value("spearman", (numbers, numbers**3, None)) == pytest.approx(1)
    assert value("spearman", (numbers, -numbers, None)) == pytest.approx(-1)


def test_spearman_of_embeddings_ranks_similarities() -> None:
    rows = RNG.normal(size=(12, 5))
    assert value("spearman", (rows * 3, rows, None)) == pytest.approx(1)
    assert value("spearman", *((row[None], row[None], None) for row in rows)) == pytest.approx(1)
    other = RNG.normal(size=(12, 5))
    first, second = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (rows, other))
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    ranks = [np.argsort(np.argsort([float(m[i] @ m[j]) for i, j in pairs])) for m in (first, second)]
    assert value("spearman", (rows, other, None)) == pytest.approx(float(np.corrcoef(*ranks)[0, 1]))
    cosines = (first[0::2] * first[1::2]).sum(1)
    assert value("spearman", (rows, other, np.exp(cosines))) == pytest.approx(1)
    assert value("spearman", (rows, other, -cosines)) == pytest.approx(-1)
    with pytest.raises(InputError, match="one per pair of embeddings"):
        value("spearman", (rows, other, np.ones(12)))


def test_mean_absolute_error_in_a_unit() -> None:
    found, truth = np.asarray([1.0, 2.0]), np.asarray([1.5, 2.0])
    assert value("mae", (found, found, truth), per=0.5) == 0.5
    assert value("mae", (found, truth, None)) == 0.25
    with pytest.raises(InputError, match="mae needs"):
        value("mae", (found, truth, np.ones(3)))


@pytest.mark.parametrize(
    "name", [n for n, kind in METRICS.items() if n not in ("perplexity", "mae") and not (kind.of_volumes or kind.masks)]
)
def test_the_float_model_agrees_with_itself(name: str) -> None:
    outputs = [RNG.normal(size=(2, 4, 3, 3)) for _ in range(2)]
    assert value(name, *((o, o, None) for o in outputs)) == pytest.approx(1)
    assert METRICS[name].higher_is_better


@pytest.mark.parametrize("name", list(METRICS))
def test_nothing_added_and_values_that_are_not_finite_are_no_figure(name: str) -> None:
    assert math.isnan(metric(name).value)
    if name in ("perplexity", "cosine", "spearman", "mae"):
        good = RNG.normal(size=(1, 4, 3))
        bad = np.full_like(good, np.nan)
        labels = np.zeros((1, 4), int) if name == "perplexity" else None
        assert math.isnan(value(name, (bad, good, labels), (good, good, labels)))


def test_outputs_without_classes_are_refused() -> None:
    with pytest.raises(InputError, match="needs classes"):
        value("top1", (np.ones(3), np.ones(3), None))
