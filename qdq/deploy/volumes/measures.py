"""How two masks of one structure differ: overlap, distance of their surfaces, volume, and lesions that only one has.

two masks on one grid, spacing -> the box around both -> `MaskReport`. Memory: a few times that box in bytes, and the
points of both surfaces. Definitions:

- Dice: 2 |both| / (|found| + |true|); 0 where only one is empty, as nnU-Net; none where both are.
- surface: voxels of a mask with one of 6 neighbours outside it; beyond the image is outside. Distances are between
  centres of voxels, in mm.
- HD95: the larger of the two 95th percentiles (found to true, true to found), linear between ranks. As MONAI's
  `compute_hausdorff_distance(percentile=95)`.
- mean surface distance: the mean of all distances of both directions pooled, as MONAI's
  `compute_average_surface_distance(symmetric=True)`. The surface-distance package weighs by area and differs by up to a
  third where slices are thick.
- lesion: a component of voxels that touch, corners too. One of the truth is missed if no voxel of it is found; one that
  is found is false if no voxel of it is true.

Must not know where masks come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from calib_data.extras import need
from calib_data.volume import box_of
from engines.verify.volumes import MaskReport

if TYPE_CHECKING:
    from collections.abc import Sequence

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
PERCENTILE = 95.0
CHUNK = 1 << 18  # surface points whose nearest is looked for at a time


def measured(found: Mask, true: Mask, spacing_mm: Sequence[float]) -> MaskReport:
    """Compare two masks (i, j, k) of one grid with this spacing along i, j, k.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    box = box_of(found, true)
    ours, theirs = (np.ascontiguousarray(m[box]) for m in (found, true))
    counts = [int(np.count_nonzero(m)) for m in (ours, theirs)]
    both = int(np.count_nonzero(ours & theirs))
    distances = _distances(ours, theirs, spacing_mm) if all(counts) else None
    missed = _alone(theirs, ours)
    false = _alone(ours, theirs)
    return MaskReport(
        dice=2 * both / sum(counts) if any(counts) else None,
        hd95_mm=max(float(np.percentile(d, PERCENTILE)) for d in distances) if distances else None,
        surface_mm=float(np.concatenate(distances).mean()) if distances else None,
        found_ml=counts[0] * voxel_ml,
        true_ml=counts[1] * voxel_ml,
        lesions=missed.components,
        missed=missed.alone,
        false=false.alone,
        missed_ml=missed.largest * voxel_ml,
        false_ml=false.largest * voxel_ml,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alone:
    """Components of one mask; those of which the other has no voxel; voxels of the largest of these."""

    components: int
    alone: int
    largest: int


def surface(mask: Mask) -> Mask:
    """The voxels of a mask (i, j, k) that have one of their 6 neighbours outside it."""
    inside = mask.copy()
    for axis in range(3):
        moved, own = np.moveaxis(mask, axis, 0), np.moveaxis(inside, axis, 0)
        own[1:] &= moved[:-1]
        own[:-1] &= moved[1:]
        own[0] = own[-1] = False
    return np.asarray(mask & ~inside)


def _distances(ours: Mask, theirs: Mask, spacing_mm: Sequence[float]) -> tuple[Floats, Floats]:
    """Of each surface voxel of one, the distance to the nearest of the other: both directions."""
    points = [np.argwhere(surface(m)).astype(np.float64) * np.asarray(spacing_mm) for m in (ours, theirs)]
    return _nearest(points[0], points[1]), _nearest(points[1], points[0])


def _nearest(points: Floats, others: Floats) -> Floats:
    spatial = need("scipy.spatial", install="qdq[medical]", for_what="Measuring surfaces")
    tree = spatial.cKDTree(others, compact_nodes=False, balanced_tree=False)
    return np.concatenate([tree.query(points[n : n + CHUNK])[0] for n in range(0, len(points), CHUNK)])


def _alone(mask: Mask, other: Mask) -> _Alone:
    """What of a mask stands alone."""
    ndimage = need("scipy.ndimage", install="qdq[medical]", for_what="Counting lesions")
    numbers, count = ndimage.label(mask, structure=np.ones((3, 3, 3), bool))
    if not count:
        return _Alone(components=0, alone=0, largest=0)
    sizes = np.bincount(numbers.reshape(-1), minlength=count + 1)[1:]
    touched = np.unique(numbers[other])
    sizes[touched[touched > 0] - 1] = 0
    return _Alone(components=int(count), alone=int(np.count_nonzero(sizes)), largest=int(sizes.max()))
