"""What whole volumes say of two models: measures per structure and case, their means with intervals, and missed limits.

measures of each case -> `StructureReport` each (`summed`) -> `VolumeComparison` (candidate against float model; both
against labels where there are any) -> `VolumeReport`, part of a `Report`. Beside each mean stands over how many cases
it is, for structures that are empty on one side or on both have no distance, and every library counts them otherwise.
Must not measure anything, and holds numbers and keys of cases, never voxels or names.

An interval is the middle 95 % of the means of `RESAMPLES` draws of as many cases with replacement (bootstrap,
percentile method; Efron 1979), with a fixed seed; there is none of fewer than 3 cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.core.documents import Part

RESAMPLES, SEED, FEWEST = 2000, 0, 3


class MaskReport(Part, frozen=True, kw_only=True):
    """How what was found of one structure in one case differs from the truth.

    Attributes:
        dice: 2 |both| / (|found| + |true|); 0 where one is empty, None where both are.
        hd95_mm: the larger of the 95th percentiles of both directed surface distances; None where one is empty.
        surface_mm: the mean of the distances of both directions; None where one is empty.
        found_ml: volume of what was found.
        true_ml: volume of the truth.
        lesions: connected components of the truth, voxels touching at corners too.
        missed: of these, those of which no voxel is found.
        false: components of what was found, of which no voxel is true.
        missed_ml: volume of the largest that is missed.
        false_ml: volume of the largest that is false.
    """

    dice: float | None
    hd95_mm: float | None
    surface_mm: float | None
    found_ml: float
    true_ml: float
    lesions: int
    missed: int
    false: int
    missed_ml: float
    false_ml: float

    @property
    def difference_ml(self) -> float:
        """Volume found less the true one."""
        return self.found_ml - self.true_ml


class CaseReport(Part, frozen=True, kw_only=True):
    """All structures of one case, by name; `case` is its key."""

    case: str
    structures: dict[str, MaskReport]


class Mean(Part, frozen=True, kw_only=True):
    """A mean over cases; `low` and `high` end its 95 % interval, None with too few cases for one."""

    mean: float
    low: float | None
    high: float | None
    cases: int


class StructureReport(Part, frozen=True, kw_only=True):
    """One structure over all cases; a mean is None where no case has the measure.

    Attributes:
        name: of the structure.
        dice: mean.
        hd95_mm: mean.
        surface_mm: mean.
        difference_ml: mean of the volume found less the true one.
        worst_dice: the least of a case.
        worst_hd95_mm: the largest of a case.
        worst_difference_ml: the largest of a case, whatever its sign.
        empty: cases in which it is neither found nor true: they have no Dice.
        only_found: cases in which it is found and not true: Dice 0, no distance.
        only_true: cases in which it is true and not found: Dice 0, no distance.
        lesions: in all cases.
        missed: in all cases.
        false: in all cases.
        missed_ml: the largest.
        false_ml: the largest.
    """

    name: str
    dice: Mean | None
    hd95_mm: Mean | None
    surface_mm: Mean | None
    difference_ml: Mean | None
    worst_dice: float | None
    worst_hd95_mm: float | None
    worst_difference_ml: float | None
    empty: int
    only_found: int
    only_true: int
    lesions: int
    missed: int
    false: int
    missed_ml: float
    false_ml: float

    @property
    def one_sided(self) -> int:
        """Cases in which only one side has it."""
        return self.only_found + self.only_true


class VolumeComparison(Part, frozen=True, kw_only=True):
    """One side against another.

    Attributes:
        found: what was measured.
        true: what it was measured against.
        structures: over all cases.
        cases: each.
        without_truth: cases that could not be measured, for they have no label.
    """

    found: str
    true: str
    structures: tuple[StructureReport, ...]
    cases: tuple[CaseReport, ...]
    without_truth: int = 0


class VolumeReport(Part, frozen=True, kw_only=True):
    """Whole volumes.

    Attributes:
        cases: how many were run.
        window: how the network went over them, in words.
        grid: how results came to the image's own grid, in words.
        decoded: what channels are taken for, in words.
        windows: runs of the network in one model, mirrored ones not counted.
        repeated: of these, runs that were made again because memory was short.
        to_float: the candidate against the float model.
        to_labels: the float model and the candidate, in this order, against labels; empty without labels.
    """

    cases: int
    window: str
    grid: str
    decoded: str
    windows: int
    repeated: int
    to_float: VolumeComparison
    to_labels: tuple[VolumeComparison, ...] = ()

    def dice_drops(self) -> dict[str, float]:
        """By structure: with labels, mean Dice of the float model less the candidate's; without, 1 - Dice to float.

        With labels the mean is over the cases in which both have a Dice.
        """
        if not self.to_labels:
            return {s.name: 1 - s.dice.mean for s in self.to_float.structures if s.dice}
        ours: dict[str, list[float]] = {}
        for before, after in zip(*(side.cases for side in self.to_labels), strict=True):
            for name, mask in before.structures.items():
                values = [mask.dice, after.structures[name].dice]
                if values[0] is not None and values[1] is not None:
                    ours.setdefault(name, []).append(values[0] - values[1])
        return {name: float(np.mean(drops)) for name, drops in ours.items()}

    def failures(
        self, *, max_dice_drop: float | None, max_hd95_mm: float | None, max_volume_diff_ml: float | None
    ) -> list[str]:
        """One sentence per structure and missed limit, or limit that cannot be checked.

        The Dice drop is a mean over cases; distance and volume, to the float model, hold in every case.
        """
        found = []
        if max_dice_drop is not None:
            against = "the labels" if self.to_labels else "the float model"
            drops = self.dice_drops()
            over = {name: drop for name, drop in drops.items() if not drop <= max_dice_drop}
            found += [
                f"{n}: Dice drops by {d:.4f} against {against}, above {max_dice_drop:g}." for n, d in over.items()
            ]
            if not drops:
                found.append(f"No structure has a Dice against {against}: max_dice_drop cannot be checked.")
        for s in self.to_float.structures:
            if max_hd95_mm is not None and s.worst_hd95_mm is not None and not s.worst_hd95_mm <= max_hd95_mm:
                found.append(f"{s.name}: HD95 to the float model is {s.worst_hd95_mm:.3g} mm, above {max_hd95_mm:g}.")
            if max_hd95_mm is not None and s.one_sided:
                found.append(
                    f"{s.name}: no HD95 in {s.one_sided} case{'s' * (s.one_sided > 1)}, where only one of both models "
                    "finds it: max_hd95_mm cannot be kept."
                )
            worst = s.worst_difference_ml
            if max_volume_diff_ml is not None and worst is not None and not abs(worst) <= max_volume_diff_ml:
                found.append(f"{s.name}: its volume differs by {worst:+.4g} ml, above {max_volume_diff_ml:g}.")
        if not self.to_float.structures and (max_hd95_mm is not None or max_volume_diff_ml is not None):
            found.append("Nothing was found in any volume by either model: no distance or volume can be checked.")
        return found


def summed(name: str, masks: Sequence[MaskReport]) -> StructureReport:
    """One structure over its cases, at least one."""
    dice, hd95, surface = (
        [v for v in (getattr(m, field) for m in masks) if v is not None] for field in ("dice", "hd95_mm", "surface_mm")
    )
    differences = [m.difference_ml for m in masks]
    return StructureReport(
        name=name,
        dice=mean_of(dice),
        hd95_mm=mean_of(hd95),
        surface_mm=mean_of(surface),
        difference_ml=mean_of(differences),
        worst_dice=min(dice, default=None),
        worst_hd95_mm=max(hd95, default=None),
        worst_difference_ml=max(differences, key=abs, default=None),
        empty=sum(not m.found_ml and not m.true_ml for m in masks),
        only_found=sum(bool(m.found_ml and not m.true_ml) for m in masks),
        only_true=sum(bool(m.true_ml and not m.found_ml) for m in masks),
        lesions=sum(m.lesions for m in masks),
        missed=sum(m.missed for m in masks),
        false=sum(m.false for m in masks),
        missed_ml=max((m.missed_ml for m in masks), default=0.0),
        false_ml=max((m.false_ml for m in masks), default=0.0),
    )


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean and its interval; None of nothing."""
    if not values:
        return None
    held = np.asarray(values, np.float64)
    low: float | None = None
    high: float | None = None
    if len(held) >= FEWEST:
        drawn = np.random.default_rng(SEED).integers(0, len(held), (RESAMPLES, len(held)))
        low, high = (float(v) for v in np.percentile(held[drawn].mean(axis=1), (2.5, 97.5)))
    return Mean(mean=float(held.mean()), low=low, high=high, cases=len(held))
