"""Metrics of whole volumes: the poorest structure decides. Found by importing this; must not run models."""

from __future__ import annotations

import math
from typing import ClassVar

from engines.verify.volumes import VolumeComparison
from qdq.deploy.compare.metrics import Array, Metric, registered


class OfVolumes(Metric):
    """A metric that is taken from a comparison of whole volumes, whatever samples are."""

    of_volumes: ClassVar[bool] = True

    def __init__(self) -> None:
        """Nothing taken."""
        self._taken: VolumeComparison | None = None

    def add(self, found: Array, reference: Array, labels: Array | None) -> None:
        """Samples, which are patches, do not count."""

    def take(self, compared: VolumeComparison) -> None:
        """Take the figures of a comparison."""
        self._taken = compared


@registered("volume-dice")
class VolumeDice(OfVolumes):
    """The least mean Dice of a structure; NaN where none is found anywhere."""

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        structures = self._taken.structures if self._taken else ()
        return min((s.dice.mean for s in structures if s.dice), default=math.nan)


@registered("volume-hd95")
class VolumeHd95(OfVolumes):
    """The largest mean HD95 of a structure, in mm; infinite where one is found on one side alone in some case."""

    higher_is_better: ClassVar[bool] = False

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        structures = self._taken.structures if self._taken else ()
        if any(s.one_sided for s in structures):
            return math.inf
        return max((s.hd95_mm.mean for s in structures if s.hd95_mm), default=math.nan)


@registered("volume-ml")
class VolumeMillilitres(OfVolumes):
    """The largest difference of a structure's volume in any case, in ml."""

    higher_is_better: ClassVar[bool] = False

    @property
    def value(self) -> float:
        """See `Metric.value`."""
        structures = self._taken.structures if self._taken else ()
        found = [abs(s.worst_difference_ml) for s in structures if s.worst_difference_ml is not None]
        return max(found, default=math.nan)
