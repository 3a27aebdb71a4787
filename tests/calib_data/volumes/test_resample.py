"""Other spacings: the two grids, thick slices, labels; values are scipy's and nnU-Net's."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from calib_data import DataError
from calib_data.volume import Volume
from calib_data.volumes import patches, resample
from calib_data.volumes.resample import new_grid, resampled

ndimage = pytest.importorskip("scipy.ndimage", reason="pip install 'qdq[medical]'")


def noise(*grid: int, spacing: tuple[float, ...] = (1, 1, 1), seed: int = 0) -> Volume:
    array = np.random.default_rng(seed).normal(size=(2, *grid)).astype(np.float32)
    return Volume(array=array, affine=np.diag([*spacing, 1.0]))


@pytest.mark.parametrize("module", [resample, patches])
def test_examples_of_the_documentation(module: object) -> None:
    found = doctest.testmod(module, extraglobs={"np": np})  # type: ignore[arg-type]
    assert found.attempted and not found.failed


@pytest.mark.parametrize(("n", "old", "new", "edges", "centers"), [
    (20, 1, 1.5, 13, 14), (10, 1, 1.5, 7, 7), (100, 3, 1, 300, 298), (240, 1, 1.5, 160, 160), (5, 1, 2, 2, 3),
    (7, 1, 2, 4, 4),
])  # fmt: skip
def test_voxels_of_the_two_grids(n: int, old: float, new: float, edges: int, centers: int) -> None:
    assert new_grid([n], [old], [new], "edges") == (edges,)  # nnU-Net
    assert new_grid([n], [old], [new], "centers") == (centers,)  # MONAI, nibabel


@pytest.mark.parametrize("order", [1, 3])
def test_edges_are_scipys_zoom_within_the_old_values(order: int) -> None:
    volume = noise(11, 9, 7)
    found = resampled(volume, (0.7, 1.3, 0.9), grid="edges", order=order)
    for channel, ours in zip(volume.array.astype(float), found.array, strict=True):
        factors = np.array(found.grid) / channel.shape
        theirs = ndimage.zoom(channel, factors, order=order, mode="nearest", grid_mode=True)
        np.testing.assert_allclose(ours, theirs.clip(channel.min(), channel.max()), atol=1e-6)  # float32


@pytest.mark.parametrize("order", [0, 1, 3])
def test_centers_lie_where_the_affine_says(order: int) -> None:
    volume = noise(11, 9, 7, spacing=(1, 2, 1.5))
    found = resampled(volume, (0.7, 1.3, 0.9), grid="centers", order=order)
    index = np.stack(np.meshgrid(*map(np.arange, found.grid), indexing="ij"))
    places = np.tensordot(found.affine[:3, :3], index, 1) + found.affine[:3, 3, None, None, None]
    back = places / np.array([1, 2, 1.5])[:, None, None, None]
    theirs = ndimage.map_coordinates(volume.array[0].astype(float), back, order=order, mode="nearest")
    if order:
        np.testing.assert_allclose(found.array[0], theirs, atol=1e-6)
    else:
        assert (found.array[0] == theirs.astype(np.float32)).mean() > 0.99  # ties fall either way by rounding


def test_the_affine_of_edges_keeps_the_outer_edges() -> None:
    volume = noise(20, 10, 5)
    found = resampled(volume, (1.5, 1, 2), grid="edges", order=1)
    for corner in (-0.5, 1.0):
        old = np.array(volume.grid) - 0.5 if corner > 0 else np.full(3, -0.5)
        new = np.array(found.grid) - 0.5 if corner > 0 else np.full(3, -0.5)
        np.testing.assert_allclose(found.affine[:3] @ [*new, 1], volume.affine[:3] @ [*old, 1], atol=1e-12)


def test_thick_slices_are_resampled_apart() -> None:
    volume = noise(9, 9, 5, spacing=(1, 1, 4))
    found = resampled(volume, (0.5, 0.5, 2), grid="edges", order=3, separate=True)
    plane = volume.array[0, :, :, 2].astype(float)
    expected = ndimage.zoom(plane, 2, order=3, mode="nearest", grid_mode=True).clip(plane.min(), plane.max())
    for k in (4, 5):  # the two new slices that are nearest to slice 2
        np.testing.assert_allclose(found.array[0, :, :, k], expected, atol=1e-6)
    whole = resampled(volume, (0.5, 0.5, 2), grid="edges", order=3)
    assert np.abs(whole.array - found.array).max() > 0.1


def test_labels_keep_their_numbers_and_dtype() -> None:
    array = np.random.default_rng(0).integers(0, 9, (1, 8, 8, 8)).astype(np.uint8)
    found = resampled(Volume(array=array, affine=np.eye(4)), (0.4, 0.7, 1.9), grid="edges", order=0)
    assert found.array.dtype == np.uint8 and set(np.unique(found.array)) <= set(np.unique(array))


def test_the_same_spacing_changes_nothing_but_the_dtype() -> None:
    volume = noise(4, 5, 6)
    assert resampled(volume, (1, 1, 1), grid="edges", order=3).array is volume.array


def test_a_grid_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(DataError, match="Give a wider spacing_mm"):
        resampled(noise(10, 10, 10), (0.001, 0.001, 0.001), grid="edges", order=1)
