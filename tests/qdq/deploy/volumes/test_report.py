"""Means with intervals, what stands beside them, and what a table says of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.verify.report import Limits, OutputReport, Report
from engines.verify.volumes import CaseReport, MaskReport, VolumeComparison, VolumeReport, mean_of, summed
from qdq.deploy.compare.metrics import metric
from qdq.deploy.compare.volume_metrics import OfVolumes
from qdq.deploy.volumes.table import lines, rows


def mask(
    dice: float | None, hd95: float | None = 0.0, found_ml: float = 1.0, true_ml: float = 1.0, missed: int = 0
) -> MaskReport:
    return MaskReport(
        dice=dice,
        hd95_mm=hd95,
        surface_mm=hd95,
        found_ml=found_ml,
        true_ml=true_ml,
        lesions=2,
        missed=missed,
        false=0,
        missed_ml=0.25 * missed,
        false_ml=0.0,
    )


ONE_SIDED = mask(0.0, None, 0.0, 2.0)
EMPTY = mask(None, None, 0.0, 0.0)


def comparison(*masks: MaskReport, name: str = "core") -> VolumeComparison:
    return VolumeComparison(
        found="Q/DQ model",
        true="float model",
        structures=(summed(name, masks),),
        cases=tuple(CaseReport(case=str(n), structures={name: m}) for n, m in enumerate(masks)),
    )


def report(*masks: MaskReport) -> VolumeReport:
    return VolumeReport(
        cases=len(masks), window="w", grid="g", decoded="d", windows=8, repeated=2, to_float=comparison(*masks)
    )


def test_an_interval_holds_the_mean_and_is_the_same_each_time() -> None:
    values = list(np.random.default_rng(0).uniform(0.8, 1, 12))
    found = mean_of(values)
    assert found == mean_of(values) and found and found.low and found.high
    assert found.low < found.mean < found.high and found.cases == 12
    spread = np.std(values) / math.sqrt(12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    two = mean_of([0.5, 1.0])
    assert two and (two.mean, two.low, two.high) == (0.75, None, None)
    assert mean_of([]) is None


def test_empty_structures_are_counted_beside_the_mean() -> None:
    found = summed("core", [mask(0.9, 2.0), ONE_SIDED, EMPTY, mask(0.7, 4.0, missed=1)])
    assert found.dice and found.dice.mean == pytest.approx((0.9 + 0 + 0.7) / 3) and found.dice.cases == 3
    assert found.hd95_mm and found.hd95_mm.mean == 3 and found.hd95_mm.cases == 2
    assert (found.empty, found.only_true, found.only_found, found.one_sided) == (1, 1, 0, 1)
    assert (found.lesions, found.missed, found.missed_ml) == (8, 1, 0.25)
    (head, row) = rows(comparison(mask(0.9, 2.0), ONE_SIDED, EMPTY, mask(0.7, 4.0, missed=1)))
    assert head[0] == "structure" and row[-1] == "3 (distances 2); 1 empty in both, 1 only true"
    assert row[5] == "1 of 8 missed, 0 false, the largest 0.25 ml"


def test_a_table_shows_the_poorest_structures() -> None:
    masks = {f"s{n}": mask(1 - n / 100) for n in range(20)}
    whole = VolumeComparison(
        found="a", true="b", cases=(), structures=tuple(summed(name, [m]) for name, m in masks.items())
    )
    table = rows(whole)
    assert table[1][0] == "s19" and table[-1][0] == "8 more, all of a higher Dice"


def test_repeated_runs_are_said() -> None:
    assert any("2 of 8 runs were made again" in line for line in lines(report(mask(1.0))))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_dice_drop": 0.2}, []),
        ({"max_dice_drop": 0.1}, ["core: Dice drops by 0.2000 against the float model, above 0.1."]),
        ({"max_hd95_mm": 3.0}, ["core: HD95 to the float model is 4 mm, above 3."]),
        ({"max_volume_diff_ml": 0.4}, ["core: its volume differs by -0.5 ml, above 0.4."]),
    ],
)
def test_limits_are_part_of_a_report(limits: dict[str, float], said: list[str]) -> None:
    volumes = report(mask(0.9, 2.0), mask(0.7, 4.0, 0.5, 1.0))
    whole = Report(outputs=(output(),), samples=2, limits=Limits(**limits), volumes=volumes)
    assert whole.failures == said
    assert Report.from_json(whole.to_json()) == whole


def test_limits_of_volumes_without_volumes_fail() -> None:
    (said,) = Report(outputs=(output(),), samples=1, limits=Limits(max_hd95_mm=1.0)).failures
    assert "No whole volume was run, so max_hd95_mm cannot be checked" in said


def test_nothing_to_measure_is_no_success() -> None:
    (said,) = report(EMPTY).failures(max_dice_drop=0.1, max_hd95_mm=None, max_volume_diff_ml=None)
    assert "No structure has a Dice" in said


@pytest.mark.parametrize(("name", "value"), [("volume-dice", 0.8), ("volume-hd95", 3.0), ("volume-ml", 0.5)])
def test_metrics_of_compare_are_of_the_poorest_structure(name: str, value: float) -> None:
    counting = metric(name)
    assert isinstance(counting, OfVolumes) and math.isnan(counting.value)
    counting.take(comparison(mask(0.9, 2.0), mask(0.7, 4.0, 0.5, 1.0)))
    assert counting.value == pytest.approx(value)


def test_a_structure_that_one_side_lacks_has_no_finite_distance() -> None:
    counting = metric("volume-hd95")
    assert isinstance(counting, OfVolumes)
    counting.take(comparison(mask(0.9, 2.0), ONE_SIDED))
    assert counting.value == math.inf


def output() -> OutputReport:
    """Of one output that is identical."""
    kinds = ("sqnr_centred_db", "sqnr_spread_db", "spread", "cosine", "cosine_centred", "mean_sample_cosine")
    errors = ("rms_error", "max_abs_error", "mean_abs_error", "top1", "sqnr_db")
    return OutputReport(
        name="logits",
        task="segmentation",
        class_axis=1,
        because="",
        elements=1,
        mismatched=0,
        identical=True,
        constant=False,
        dice={},
        non_finite=0,
        **dict.fromkeys((*kinds, *errors)),
    )
