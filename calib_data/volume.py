"""One image on a grid in the patient's space: voxels, and where each of them lies.

A reader fills `Volume` -> its spacing, orientation and corners -> turned (flips and permutations, no value changes).
It must not read files or change values.

Source: nibabel's conventions (voxel index to RAS+ millimetres; letters name the positive end of each axis).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calib_data.validation import Array, DataError

Affine = npt.NDArray[np.float64]
Box = tuple[slice, slice, slice]
ENDS = ("LR", "PA", "IS")  # negative and positive end of the axes of the patient's space: left, posterior, inferior
MOST_VOXELS = 1 << 30  # of one image, all channels: 4 GB in FP32
STORED = "stored"  # in place of letters: the axes as the file has them


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Voxels in space, without values.

    Attributes:
        shape: along i, j, k.
        affine: as of `Volume`.
    """

    shape: tuple[int, int, int]
    affine: Affine

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along i, j, k in millimetres."""
        return spacing_of(self.affine)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Volume:
    """An image of one or more channels.

    Attributes:
        array: (channels, i, j, k), i, j, k in the order of the file's own axes (of a NIfTI file: its first three). The
            file's dtype, or float32 where the file's values are scaled.
        affine: (4, 4) float64: voxel index (i, j, k, 1) to RAS+ millimetres, the voxel's centre.
    """

    array: Array
    affine: Affine

    def __post_init__(self) -> None:
        """Refuse what is no volume.

        Raises:
            DataError: another rank, no voxel, or an affine that is not finite or flattens space.
        """
        affine = np.asarray(self.affine, np.float64)
        if self.array.ndim != 4 or 0 in self.array.shape:
            raise DataError(
                f"An image has the shape {self.array.shape}; (channels, i, j, k) with at least one voxel is needed."
            )
        usable = affine.shape == (4, 4) and bool(np.isfinite(affine).all())
        if not usable or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise DataError(
                "An image's header gives no place in space: its affine has values that are not finite, or an axis of "
                "length 0. Write the file again with spacing and direction."
            )
        object.__setattr__(self, "affine", affine)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of voxels along i, j, k."""
        _, i, j, k = self.array.shape
        return i, j, k

    @property
    def place(self) -> Grid:
        """Where the voxels lie."""
        return Grid(shape=self.grid, affine=self.affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """As of its `place`."""
        return spacing_of(self.affine)

    @property
    def orientation(self) -> str:
        """See `orientation_of`."""
        return orientation_of(self.affine)

    def oriented(self, orientation: str) -> Volume:
        """The same voxels with axes that grow to these ends; an oblique grid stays oblique. `STORED` changes nothing.

        Raises:
            DataError: no letter of each pair L/R, P/A, I/S.
        """
        if orientation == STORED:
            return self
        wanted = [axis_of(letter) for letter in orientation]
        if sorted(axis for axis, _ in wanted) != [0, 1, 2]:
            raise DataError(
                f"The orientation {orientation!r} is not known: three letters are needed, one of L and R, one of P and "
                f"A, one of I and S, such as RAS or LIA; or {STORED!r}."
            )
        mine = _axes(self.affine)
        order = [next(n for n, (axis, _) in enumerate(mine) if axis == wanted_axis) for wanted_axis, _ in wanted]
        array = self.array.transpose(0, *(n + 1 for n in order))
        affine = self.affine[:, [*order, 3]].copy()
        for n, (source, (_, sign)) in enumerate(zip(order, wanted, strict=True)):
            if mine[source][1] != sign:
                affine[:3, 3] += affine[:3, n] * (array.shape[n + 1] - 1)
                affine[:3, n] *= -1
                array = np.flip(array, n + 1)
        return Volume(array=array, affine=affine)

    def same_grid(self, other: Volume) -> bool:
        """Whether voxels of one index lie in one place, within a hundredth of a voxel at every corner."""
        return self.grid == other.grid and self.apart_mm(other) <= 0.01 * min(self.spacing_mm)

    def apart_mm(self, other: Volume) -> float:
        """The largest distance of a voxel of this grid from where the other image has that of the same index."""
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.grid], indexing="ij")).reshape(3, -1)
        apart = (self.affine - other.affine)[:3] @ np.vstack([corners, np.ones(8)])
        return float(np.linalg.norm(apart, axis=0).max())


def require_size(sizes: Sequence[int]) -> None:
    """Refuse an image that is too large to be one, before its values are read.

    Raises:
        DataError: it would have more than `MOST_VOXELS` values.
    """
    if math.prod(int(size) for size in sizes) > MOST_VOXELS:
        raise DataError(f"it has {'x'.join(map(str, sizes))} values by its header; at most {MOST_VOXELS} are read.")


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Distance of neighbouring voxels along i, j, k in millimetres."""
    i, j, k = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return i, j, k


def box_of(*masks: Array) -> Box:
    """The smallest that holds every voxel (i, j, k) of all masks that is not 0; empty where there is none."""
    found = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        there = np.flatnonzero(np.logical_or.reduce([m.any(axis=others) for m in masks]))
        found.append(slice(int(there[0]), int(there[-1]) + 1) if there.size else slice(0, 0))
    i, j, k = found
    return i, j, k


def orientation_of(affine: Affine) -> str:
    """Three letters of L/R, P/A, I/S: where i, j, k grow to, as `nibabel.aff2axcodes` says."""
    return "".join(ENDS[axis][sign > 0] for axis, sign in _axes(affine))


def axis_of(letter: str) -> tuple[int, int]:
    """Axis of the patient's space and direction (1 or -1) that a letter names; (-1, 0) for no such letter."""
    return next(((n, 1 if ends[1] == letter else -1) for n, ends in enumerate(ENDS) if letter in ends), (-1, 0))


def _axes(affine: Affine) -> list[tuple[int, int]]:
    """For each of i, j, k: the axis of the patient's space that it runs along most, and 1 or -1.

    The nearest rotation to the affine decides, so that shear favours no axis; each axis of space is taken once.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(directions)
    turned = left @ right
    found: dict[int, tuple[int, int]] = {}
    for n in np.argsort(-np.abs(turned).max(axis=0), kind="stable"):
        taken = [axis for axis, _ in found.values()]
        axis = int(np.argmax([-1.0 if a in taken else abs(turned[a, n]) for a in range(3)]))
        found[int(n)] = (axis, 1 if turned[axis, n] > 0 else -1)
    return [found[n] for n in range(3)]
