"""An image on a grid of another spacing.

Two grids are in use. `centers`: the centre of the first voxel stays, `round((n - 1) * old / new + 1)` voxels (MONAI's
Spacing, nibabel). `edges`: the outer edges stay, `round(n * old / new)` voxels (nnU-Net, scikit-image). Values come
from splines of scipy in float64, at the border from the nearest voxel.
It must not know what an image shows.

Source: MONAI, transforms/spatial/array.py; nnU-Net v2, preprocessing/resampling/default_resampling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.extras import need
from calib_data.validation import Array, DataError
from calib_data.volume import MOST_VOXELS, Volume

THICK = 3  # slices are thick where the largest spacing is more than so many times the smallest
Sizes = tuple[float, float, float]
Floats = npt.NDArray[np.float64]


def new_grid(grid: Sequence[int], old: Sequence[float], new: Sequence[float], kind: str) -> tuple[int, ...]:
    """Voxels along each axis on the new grid, at least one; Python's rounding, half to even.

    >>> new_grid([20, 5, 100], [1, 1, 3], [1.5, 2, 1], "edges"), new_grid([20, 100], [1, 3], [1.5, 1], "centers")
    ((13, 2, 300), (14, 298))
    """
    if kind == "edges":
        sizes = [round(o / w * n) for n, o, w in zip(grid, old, new, strict=True)]
    else:
        sizes = [round((n - 1) * o / w + 1) for n, o, w in zip(grid, old, new, strict=True)]
    return tuple(max(1, size) for size in sizes)


def thick_axis(old: Sequence[float], new: Sequence[float]) -> int | None:
    """The axis of thick slices by nnU-Net's rule, in the old spacing, else in the new; None where none is alone.

    >>> thick_axis([3, 1, 1], [1, 1, 1]), thick_axis([3.01, 1, 1], [1, 1, 1]), thick_axis([1, 1, 1], [4, 1, 1])
    (None, 0, 0)
    >>> thick_axis([0.24, 1.25, 1.25], [1, 1, 1]) is None
    True
    """
    for spacing in (old, new):
        if max(spacing) / min(spacing) > THICK:
            largest = [axis for axis, size in enumerate(spacing) if size > max(spacing) * (1 - 1e-6)]
            return largest[0] if len(largest) == 1 else None
    return None


def resampled(
    volume: Volume, spacing: Sizes, *, grid: str, order: int, separate: bool = False, order_z: int = 0
) -> Volume:
    """The image on the grid of a spacing, float32 (labels, `order` 0: their own type), with its place.

    Args:
        volume: any.
        spacing: in mm along i, j, k.
        grid: `centers` or `edges`.
        order: of the spline, 0, 1 or 3; on `edges` its values stay within the old ones, as nnU-Net has it.
        separate: resample the axis of thick slices apart.
        order_z: of that axis.

    Raises:
        DataError: the new grid would have more than `MOST_VOXELS` voxels.
    """
    old = volume.spacing_mm
    sizes = new_grid(volume.grid, old, spacing, grid)
    if np.prod(sizes, dtype=float) * len(volume.array) > MOST_VOXELS:
        raise DataError(
            f"on a spacing of {' x '.join(f'{s:g}' for s in spacing)} mm it would have {'x'.join(map(str, sizes))} "
            "voxels. Give a wider spacing_mm."
        )
    if grid == "edges":
        factors = np.array(volume.grid) / sizes  # old voxels per new one
        starts = (factors - 1) / 2
    else:
        factors, starts = np.array(spacing) / old, np.zeros(3)
    axis = thick_axis(old, spacing) if separate else None
    if sizes == volume.grid and not starts.any() and np.allclose(factors, 1, rtol=0, atol=1e-9):
        array = volume.array if order == 0 else volume.array.astype(np.float32, copy=False)
    else:
        map_ = _Map(sizes=sizes, factors=factors, starts=starts, clip=grid == "edges")
        array = np.stack([_channel(c, map_, order, axis, order_z) for c in volume.array])
    affine = volume.affine.copy()
    affine[:3, 3] += volume.affine[:3, :3] @ starts
    affine[:3, :3] *= factors
    return Volume(array=array, affine=affine)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Map:
    """Index n of the new grid lies at `n * factors + starts` of the old one; `clip` keeps to the old values' range."""

    sizes: tuple[int, ...]
    factors: Floats
    starts: Floats
    clip: bool

    def on(self, *axes: int) -> _Map:
        """The map of some axes."""
        sizes = tuple(self.sizes[n] for n in axes)
        return _Map(sizes=sizes, factors=self.factors[[*axes]], starts=self.starts[[*axes]], clip=self.clip)

    def with_first(self, first: _Map) -> _Map:
        """This map with another one for axis 0."""
        factors, starts = (np.append(f, w[1:]) for f, w in ((first.factors, self.factors), (first.starts, self.starts)))
        return _Map(sizes=(*first.sizes, *self.sizes[1:]), factors=factors, starts=starts, clip=self.clip)


def _channel(channel: Array, to: _Map, order: int, thick: int | None, order_z: int) -> Array:
    """One channel; slices first and then the axis of thick slices, where there is one."""
    if thick is None:
        found = _spline(channel, to, order, np.float32)
    else:
        flat = [n for n in range(3) if n != thick]
        planes = np.stack([_spline(plane, to.on(*flat), order) for plane in np.moveaxis(channel, thick, 0)])
        still = _Map(sizes=planes.shape, factors=np.ones(3), starts=np.zeros(3), clip=to.clip)
        found = np.moveaxis(_spline(planes, still.with_first(to.on(thick)), order_z), 0, thick)
    return found if found.dtype == channel.dtype and not order else found.astype(np.float32)


def _spline(array: Array, to: _Map, order: int, dtype: type[np.floating[Any]] = np.float64) -> Array:
    """Values, computed in float64; with order 0 the nearest voxel's own, of two equally near the higher, as scipy."""
    if not order:
        for axis, (factor, start, size) in enumerate(zip(to.factors, to.starts, to.sizes, strict=True)):
            index = np.floor(np.arange(size) * factor + start + 0.5).astype(int).clip(0, array.shape[axis] - 1)
            array = array.take(index, axis)
        return array
    ndimage = need("scipy.ndimage", install="qdq[medical]", for_what="Another spacing")
    found: Array = ndimage.affine_transform(
        array, to.factors, to.starts, to.sizes, output=dtype, order=order, mode="nearest"
    )
    return np.clip(found, array.min(), array.max()) if to.clip else found
