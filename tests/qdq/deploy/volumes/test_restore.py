"""Labels and logits back on the image's own grid: turned, cropped and resampled grids undone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from calib_data.volume import Grid, Volume
from qdq.core.errors import InputError
from qdq.deploy.volumes.decode import Classes
from qdq.deploy.volumes.restore import decoded_onto, labels_onto

Array = npt.NDArray[Any]


def stored(shape: tuple[int, int, int] = (20, 17, 12), spacing: tuple[float, ...] = (1.0, 1.5, 2.5)) -> Volume:
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])
    affine[:3, 3] = 40, -60, 7
    labels = np.random.default_rng(0).integers(0, 5, (1, *shape)).astype(np.uint8)
    return Volume(array=labels, affine=affine)


def cropped(volume: Volume, box: tuple[slice, slice, slice]) -> Volume:
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [b.start for b in box]
    return Volume(array=volume.array[(slice(None), *box)], affine=affine)


def spaced(volume: Volume, shape: tuple[int, int, int]) -> Grid:
    """A grid with the same outer edges and other voxels."""
    ratio = np.asarray(volume.grid) / shape
    affine = volume.affine @ np.diag([*ratio, 1.0])
    affine[:3, 3] = volume.affine[:3, 3] + volume.affine[:3, :3] @ (ratio / 2 - 0.5)
    return Grid(shape=shape, affine=affine)


@pytest.mark.parametrize("orientation", ["RAS", "LIA", "SPL"])
def test_turned_labels_come_back(orientation: str) -> None:
    own = stored()
    turned = own.oriented(orientation)
    np.testing.assert_array_equal(labels_onto(turned.array[0], turned.place, own.place), own.array[0])


def test_beyond_a_crop_is_background() -> None:
    own, box = stored(), (slice(3, 15), slice(0, 10), slice(5, 12))
    kept = cropped(own.oriented("RAS"), box)
    back = labels_onto(kept.array[0], kept.place, own.place)
    expected = np.zeros_like(own.oriented("RAS").array)
    expected[(slice(None), *box)] = kept.array
    whole = Volume(array=expected, affine=own.oriented("RAS").affine).oriented(own.orientation)
    np.testing.assert_array_equal(back, whole.array[0])


def test_labels_of_twice_the_voxels_come_back() -> None:
    own = stored()
    fine = spaced(own, (40, 34, 24))
    labels = own.array[0].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(labels_onto(labels, fine, own.place), own.array[0])


@pytest.mark.parametrize("block", [5, 100])
@pytest.mark.parametrize("shape", [(13, 17, 30), (20, 9, 12)])
def test_logits_are_interpolated_as_scipy_does(shape: tuple[int, int, int], block: int) -> None:

    own, channels = stored(), 4
    logits = np.random.default_rng(1).normal(size=(channels, *shape)).astype(np.float32)
    ratio = np.asarray(own.grid) / shape
    zoomed = [ndimage.zoom(c.astype(float), ratio, order=1, mode="nearest", grid_mode=True) for c in logits]
    found = decoded_onto(logits, spaced(own, shape), own.place, Classes(channels=channels), block=block)
    assert np.count_nonzero(found != np.argmax(zoomed, 0)) == 0


def test_thick_slices_are_taken_whole() -> None:

    own = stored((20, 17, 12), (1.0, 1.0, 4.0))
    shape, channels = (13, 9, 7), 3
    logits = np.random.default_rng(1).normal(size=(channels, *shape)).astype(np.float32)
    ratio = (20 / 13, 17 / 9, 1)
    flat = [ndimage.zoom(c.astype(float), ratio, order=1, mode="nearest", grid_mode=True) for c in logits]
    at = np.floor(7 / 12 * (np.arange(12) + 0.5)).astype(int)
    expected = np.argmax(flat, 0)[..., at]
    found = decoded_onto(logits, spaced(own, shape), own.place, Classes(channels=channels), separate_z=True)
    np.testing.assert_array_equal(found, expected)


def test_a_grid_that_is_turned_by_another_angle_is_refused() -> None:
    own, angle = stored(), np.deg2rad(10)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = own.affine.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    with pytest.raises(InputError, match="more than right angles"):
        labels_onto(own.array[0], Grid(shape=own.grid, affine=affine), own.place)
