"""Where voxels lie: spacing, letters, and axes turned without changing a value."""

from __future__ import annotations

import numpy as np
import pytest

from calib_data import DataError
from calib_data.volume import Volume


def ramp(*grid: int, affine: np.ndarray | None = None) -> Volume:
    array = np.arange(np.prod(grid), dtype=np.int16).reshape(1, *grid)
    return Volume(array=array, affine=np.eye(4) if affine is None else affine)


def test_spacing_and_letters_of_an_axis_aligned_grid() -> None:
    volume = ramp(4, 5, 6, affine=np.diag([-2.0, 2.0, 3.0, 1.0]))
    assert volume.spacing_mm == (2, 2, 3)
    assert volume.orientation == "LAS"
    assert volume.grid == (4, 5, 6)


def test_to_ras_as_the_closest_canonical_of_a_left_posterior_grid() -> None:
    affine = np.array([[-2, 0, 0, 90], [0, -2, 0, 126], [0, 0, 3, -72], [0, 0, 0, 1.0]])
    volume = ramp(4, 5, 6, affine=affine)
    turned = volume.oriented("RAS")
    assert turned.affine.tolist() == [[2, 0, 0, 84], [0, 2, 0, 118], [0, 0, 3, -72], [0, 0, 0, 1]]
    assert turned.array[0, 0, 0, 0] == volume.array[0, 3, 4, 0]
    assert not turned.same_grid(volume)
    assert turned.oriented("LPS").same_grid(volume)


@pytest.mark.parametrize("seed", range(40))
def test_letters_and_axes_are_those_of_nibabel_on_oblique_grids(seed: int) -> None:
    nibabel = pytest.importorskip("nibabel", reason="pip install 'qdq[medical]'")
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3] = np.column_stack([turn * random.uniform(0.5, 4, 3), random.normal(size=3) * 50])
    volume = ramp(3, 4, 5, affine=affine)
    assert volume.orientation == "".join(nibabel.aff2axcodes(affine))
    theirs = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.array[0], affine))
    ours = volume.oriented("RAS")
    np.testing.assert_array_equal(ours.array[0], np.asarray(theirs.dataobj))
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=0, atol=1e-9)  # float64 sums of products below 200
    np.testing.assert_array_equal(ours.oriented(volume.orientation).array, volume.array)
    assert ours.oriented("stored") is ours


@pytest.mark.parametrize("letters", ["RAX", "RRS", "RA", "", "ras", "RAR"])
def test_letters_that_name_no_orientation_are_refused(letters: str) -> None:
    with pytest.raises(DataError, match="three letters"):
        ramp(2, 2, 2).oriented(letters)


@pytest.mark.parametrize("affine", [np.eye(3), np.diag([1, 1, 0, 1.0]), np.full((4, 4), np.nan)])
def test_an_affine_that_is_no_place_is_refused(affine: np.ndarray) -> None:
    with pytest.raises(DataError, match="no place in space"):
        ramp(2, 2, 2, affine=affine)
