"""The metrics of one output against numbers computed by hand; limits, alarms, NaN."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
from places import SHARED

from engines.verify import sums as sums_module
from engines.verify.meaning import Meaning
from engines.verify.report import Alarms, Limits, OutputReport, Report
from engines.verify.sums import Sums, decibels

NUMBERS = Meaning(task="regression", why="a test")
CLASSES = Meaning(task="classification", axis=1, masks=False, why="a test")
SEGMENTS = Meaning(task="segmentation", axis=1, masks=False, why="a test")
UNKNOWN = Meaning(task="segmentation", axis=1, masks=None, why="asked for")


def report_of(reference: Any, candidate: Any, meaning: Meaning = NUMBERS, **options: Any) -> Report:
    """Adds pairs of arrays directly."""
    sums = Sums(meaning)
    for r, c in zip(reference, candidate, strict=True):
        sums.add(np.asarray(r), np.asarray(c))
    return Report(outputs=(sums.report("y"),), samples=sums.samples, **options)


def row_of(reference: Any, candidate: Any, meaning: Meaning = NUMBERS) -> OutputReport:
    return report_of(reference, candidate, meaning).outputs[0]


def test_a_reference_without_signal() -> None:
    assert report_of([[0.0, 0.0]], [[0.0, 1.0]]).sqnr_db == -math.inf
    assert row_of([[0.0, 0.0]], [[0.0, 1.0]]).cosine == 0.0
    assert row_of([[0.0, 0.0]], [[0.0, 0.0]]).cosine == 1.0


def test_equal_outputs_are_identical_and_a_constant_is_said_to_be_one() -> None:
    same = row_of([[1.0, 2.0]], [[1.0, 2.0]])
    assert same.identical and not same.constant and same.sqnr_db == math.inf
    flat = row_of([[3.0, 3.0], [3.0, 3.0]], [[3.0, 3.0], [3.0, 3.0]])
    assert flat.identical and flat.constant and flat.sqnr_centred_db is None and flat.cosine_centred is None
    still = row_of([[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 2.5]])  # it varies, but not from sample to sample
    assert still.constant and still.spread == 0 and still.sqnr_spread_db is None and math.isfinite(still.sqnr_db or 0)
    assert json.loads(report_of([[1.0]], [[1.0]]).to_json())["sqnr_db"] == "inf"


def test_large_values_that_vary_little_are_judged_by_what_varies() -> None:
    """Energies near -1000 that spread over 0.5 with errors of 2: 50 dB of signal, and nothing of use."""
    rng = np.random.default_rng(0)
    energies = -1000 + rng.normal(0, 0.5, (40, 1, 1))
    row = row_of(energies, energies + rng.choice([-2.0, 2.0], energies.shape))
    assert row.sqnr_db == pytest.approx(10 * math.log10(float((energies**2).mean()) / 4)) and row.sqnr_db > 50
    assert row.spread == pytest.approx(float(energies.std(ddof=1)), rel=1e-9) and row.rms_error == 2
    assert row.sqnr_spread_db == pytest.approx(20 * math.log10(float(energies.std(ddof=1)) / 2))
    assert row.sqnr_spread_db < -10 and row.sqnr_centred_db is not None and row.sqnr_centred_db < -10
    assert row.cosine is not None and row.cosine > 0.99999 and (row.cosine_centred or 0) < 0.6
    result = report_of(energies, energies + 2, limits=Limits(min_sqnr_db=40, min_sqnr_spread_db=10))
    assert len(result.failures) == 1 and "sqnr_spread_db" in result.failures[0]
    assert len(result.poor) == 1 and "spread over samples" in result.poor[0]


def test_the_leading_axis_is_samples_where_all_inputs_have_it() -> None:
    values = np.arange(12.0).reshape(6, 2)
    sums = Sums(NUMBERS)
    sums.add(values[:4], values[:4] + 1, 4)
    sums.add(values[4:], values[4:] + 1, 2)
    row = sums.report("y")
    expected = math.sqrt(float(values.var(0, ddof=1).mean()))
    assert row.spread == pytest.approx(expected) == pytest.approx(row_of(values[:, None], values[:, None]).spread)
    ragged = row_of([np.ones((1, 3)), np.zeros((1, 4))], [np.ones((1, 3)), np.ones((1, 4))])
    assert ragged.spread is None and not ragged.constant
    assert row_of([np.ones((1, 3))], [np.zeros((1, 3))]).spread is None  # one sample


@pytest.mark.parametrize("offset", [0.0, 1e6, -3e8])
def test_order_and_offset_change_rounding_only(offset: float) -> None:
    rng = np.random.default_rng(0)
    r = rng.normal(size=(12, 1, 3, 4, 4)) + offset
    c = r + rng.normal(size=r.shape) / 10
    one, other = row_of(r, c, SEGMENTS), row_of(r[::-1], c[::-1], SEGMENTS)
    assert one.dice == other.dice and one.top1 == other.top1 and one.max_abs_error == other.max_abs_error
    exact = {
        "sqnr_db": 10 * math.log10(float((r**2).sum() / ((r - c) ** 2).sum())),
        "sqnr_centred_db": 10 * math.log10(float(((r - r.mean()) ** 2).sum() / ((r - c) ** 2).sum())),
        "spread": math.sqrt(float(r.var(0, ddof=1).mean())),
        "cosine_centred": float(np.corrcoef(r.ravel(), c.ravel())[0, 1]),
    }
    for name, value in exact.items():
        # float64 sums of 576 values in other orders; an offset of 3e8 leaves 8 digits of a difference, squared twice
        assert getattr(one, name) == pytest.approx(value, rel=1e-7) == pytest.approx(getattr(other, name), rel=1e-7)


@pytest.mark.parametrize("items", [None, 4])
def test_blocks_do_not_show(items: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pairs = [(r, r + rng.normal(size=r.shape) / 10) for r in rng.normal(size=(3, 4, 3, 5, 7)) + 2]

    def found(block: int) -> OutputReport:
        monkeypatch.setattr(sums_module, "BLOCK", block)
        sums = Sums(SEGMENTS)
        for r, c in pairs:
            sums.add(r.astype(np.float32), c.astype(np.float32), items)
        return sums.report("y")

    one, many = found(1 << 18), found(10)
    for name in OutputReport.__struct_fields__:
        value = getattr(one, name)
        # float64 sums of 1260 values in another order
        assert getattr(many, name) == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name


def test_top1_is_along_the_axis_of_the_classes() -> None:
    tokens = np.zeros((1, 2, 3))
    tokens[0, 0, 1] = tokens[0, 1, 2] = 1
    other = np.zeros((1, 2, 3))
    other[0, :, 1] = 1
    last = Meaning(task="classification", axis=2, why="a test")
    assert row_of([tokens], [other], last).top1 == 0.5
    assert row_of([tokens], [other], CLASSES).top1 == pytest.approx(2 / 3)
    assert row_of([tokens], [other]).top1 is None


def test_dice_per_class() -> None:
    """Labels 0 0 1 1 against 0 1 1 1: class 0 has 2*1/(2+1), class 1 has 2*2/(2+3); class 2 is in neither."""
    one_hot = np.eye(3)
    r = one_hot[[0, 0, 1, 1]].T.reshape(1, 3, 2, 2)
    c = one_hot[[0, 1, 1, 1]].T.reshape(1, 3, 2, 2)
    expected = {0: pytest.approx(2 / 3), 1: pytest.approx(4 / 5)}
    row = row_of([r], [c], SEGMENTS)
    assert row.dice == expected and row.top1 == 0.75
    labels = row_of([r.argmax(1)], [c.argmax(1)], Meaning(task="labels", why="a test"))
    assert labels.dice == expected and labels.top1 == 0.75 and labels.sqnr_db is None
    assert row_of([r], [c]).dice == {}


@pytest.mark.parametrize(("reference", "expected"), [([0.2, 0.6, 0.9, 0.1], 0.8), ([-0.2, 0.6, 0.9, 0.1], 1.0)])
def test_dice_of_one_channel(reference: list[float], expected: float) -> None:
    """Probabilities are cut at 0.5 (2 against 3 above, 2 in both), logits at 0 (the same 3 above)."""
    candidate = [-0.1, 0.7, 0.8, 0.55]
    shape = (1, 1, 2, 2)
    row = row_of([np.reshape(reference, shape)], [np.reshape(candidate, shape)], UNKNOWN)
    assert row.dice == {1: pytest.approx(expected)} and row.top1 is None


@pytest.mark.parametrize("masks", [True, None])
def test_dice_of_independent_channels(masks: bool | None) -> None:
    """Two sigmoid channels, whose argmax means nothing: channel 0 has 1 above in both, channel 1 has 2 against 1."""
    r = np.array([[0.9, 0.1], [0.8, 0.7]]).reshape(1, 2, 1, 2)
    c = np.array([[0.8, 0.2], [0.9, 0.3]]).reshape(1, 2, 1, 2)
    row = row_of([r], [c], Meaning(task="segmentation", axis=1, masks=masks, why="a test"))
    assert row.dice == {0: 1.0, 1: pytest.approx(2 / 3)} and row.top1 is None


@pytest.mark.parametrize(
    ("limits", "candidate", "sentence"),
    [
        (Limits(min_sqnr_db=20), [4.0, math.sqrt(0.4)], "Output y: sqnr_db 16.0206 is below 20."),
        (Limits(min_cosine=0.9999), [4.0, 0.888], "Output y: cosine 0.9762 is below 0.9999."),
        (Limits(min_top1=0.9), [0.0, 4.0], "Output y: top1 0.0000 is below 0.9."),
        (
            Limits(min_dice=0.9),
            [4.0, 0.0],
            "No output has a dice to check against 0.9: none is a segmentation, by what ends the graph (--task tells).",
        ),
        (
            Limits(min_sqnr_spread_db=5),
            [4.0, 1.0],
            "No output has a sqnr_spread_db to check against 5: one sample, or none that varies.",
        ),
    ],
)
def test_a_missed_limit_is_one_sentence(limits: Limits, candidate: list[float], sentence: str) -> None:
    result = report_of([[[4.0, 0.0]]], [[candidate]], CLASSES, limits=limits)
    assert result.failures == [sentence] and not result.passed


def test_a_missed_dice_names_the_class() -> None:
    r = np.eye(2)[[0, 1]].T.reshape(1, 2, 1, 2)
    c = np.eye(2)[[0, 0]].T.reshape(1, 2, 1, 2)
    result = report_of([r], [c], SEGMENTS, limits=Limits(min_dice=0.5))
    assert result.failures == ["Output y: dice 0.0000 of class 1 is below 0.5."]


def test_nan_fails_every_limit_is_poor_and_is_reported() -> None:
    limits = Limits(min_sqnr_db=-1000, min_cosine=-1)
    result = report_of([[[1.0, 2.0]]], [[[1.0, math.nan]]], limits=limits)
    assert len(result.failures) == 3 and "1 values" in result.failures[0] and len(result.poor) == 1
    assert not report_of([[[1.0, 2.0]]], [[[1.0, math.nan]]]).passed
    data = json.loads(result.to_json())
    assert data["passed"] is False and data["outputs"][0]["sqnr_db"] == data["sqnr_db"] == "nan"


def test_what_is_poor_is_named_the_worst_first_and_does_not_fail() -> None:
    good, bad = np.asarray([[1.0, 0.0]]), np.asarray([[0.0, 1.0]])
    result = report_of([good] * 3, [good, good, bad], CLASSES)
    assert result.passed and result.top1 == pytest.approx(2 / 3)
    (said,) = result.poor
    assert "1.8 dB, below 20" in said and "argmax agrees in 66.67%, below 0.99" in said
    calm = report_of([good] * 3, [good, good, bad], CLASSES, alarms=Alarms(warn_sqnr_db=-10, warn_top1=0.5))
    assert calm.poor == []
    assert report_of([[1.0, 2.0]], [[1.0, 2.0]]).poor == []


def test_one_output_agrees_with_the_shared_tool() -> None:
    if not (SHARED / "tools/zoo.py").exists():
        pytest.skip("the shared tools are not here")
    sys.path.insert(0, str(SHARED / "tools"))
    try:
        import zoo  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    rng = np.random.default_rng(0)
    r = [rng.normal(size=(2, 5)).astype(np.float32) for _ in range(3)]
    c = [x + rng.normal(size=x.shape).astype(np.float32) / 10 for x in r]
    assert report_of(r, c).sqnr_db == pytest.approx(zoo.sqnr_db(r, c), rel=1e-12)  # float64 sums in another order


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e200, -3e308])
@pytest.mark.parametrize("side", [0, 1])
def test_values_beyond_what_squares_hold_are_no_error(value: float, side: int) -> None:
    good = [np.asarray([[1.0, 2.0]]), np.asarray([[2.0, 4.0]])]
    bad = [np.asarray([[1.0, 2.0]]), np.asarray([[2.0, value]])]
    row = row_of(*((good, bad) if side else (bad, good)))
    assert row.non_finite == (0 if math.isfinite(value) else 1) and row.max_abs_error >= 1e200
    assert row.sqnr_db is not None and not row.sqnr_db > 10


def test_decibels() -> None:
    assert (
        decibels(1, 0) == math.inf and decibels(0, 1) == decibels(1, math.inf) == decibels(1e-300, 1e300) == -math.inf
    )
    assert math.isnan(decibels(math.nan, 1)) and math.isnan(decibels(1, math.nan)) and math.isnan(decibels(math.nan, 0))
