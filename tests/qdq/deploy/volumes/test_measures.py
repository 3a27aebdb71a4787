"""Measures of two masks: the numbers that MONAI 1.6.1 gives, and what an empty one means."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qdq.deploy.volumes.measures import measured, surface

Mask = npt.NDArray[np.bool_]
EVEN = (1.0, 1.0, 1.0)


def empty() -> Mask:
    return np.zeros((40, 40, 40), bool)


def filled(*box: slice) -> Mask:
    found = empty()
    found[box] = True
    return found


def ball(radius: float, spacing: tuple[float, ...]) -> Mask:
    grid = (np.indices((40, 40, 40)).transpose(1, 2, 3, 0) - 20) * np.asarray(spacing)
    return np.asarray((grid**2).sum(-1) <= radius**2)


def island(mask: Mask, at: int, size: int) -> Mask:
    found = mask.copy()
    found[(slice(at, at + size),) * 3] = True
    return found


A = slice(10, 20)


def test_a_cube_moved_by_a_voxel() -> None:
    found = measured(filled(slice(11, 21), A, A), filled(A, A, A), EVEN)
    assert found.dice == pytest.approx(0.9) and found.hd95_mm == 1
    assert found.surface_mm == pytest.approx(0.3361, abs=1e-4)


def test_balls_on_thick_slices() -> None:
    spacing = (1.0, 1.0, 3.0)
    found = measured(ball(12, spacing), ball(13, spacing), spacing)
    assert found.dice == pytest.approx(0.8635, abs=1e-4) and found.hd95_mm == 3
    assert found.surface_mm == pytest.approx(0.9271, abs=1e-4)


def test_single_voxels_two_apart() -> None:
    found = measured(filled(slice(5, 6), slice(5, 6), slice(5, 6)), filled(slice(7, 8), slice(5, 6), slice(5, 6)), EVEN)
    assert (found.dice, found.hd95_mm, found.surface_mm) == (0, 2, 2)


def test_slabs_at_the_border() -> None:
    found = measured(filled(slice(0, 11)), filled(slice(0, 10)), EVEN)
    assert found.dice == pytest.approx(0.9524, abs=1e-4) and found.hd95_mm == 1
    assert found.surface_mm == pytest.approx(0.3363, abs=1e-4)


def test_an_island_that_hd95_does_not_see_is_a_false_lesion() -> None:
    true = ball(8, EVEN)
    found = measured(island(true, 2, 3), true, EVEN)
    assert found.hd95_mm == 0 and found.surface_mm and found.surface_mm > 0.3
    assert (found.lesions, found.missed, found.false) == (1, 0, 1)
    assert found.false_ml == pytest.approx(0.027) and found.missed_ml == 0
    back = measured(true, island(true, 2, 3), EVEN)
    assert (back.lesions, back.missed, back.false, back.missed_ml) == (2, 1, 0, pytest.approx(0.027))


def test_lesions_that_touch_at_a_corner_are_one() -> None:
    true = island(island(empty(), 5, 2), 7, 2)
    assert measured(empty(), true, EVEN).lesions == 1


def test_volumes_are_in_millilitres() -> None:
    found = measured(filled(A, A, A), empty(), (0.5, 2.0, 3.0))
    assert found.found_ml == pytest.approx(3.0) and found.true_ml == 0


@pytest.mark.parametrize(("both", "dice"), [((True, False), 0.0), ((False, True), 0.0), ((False, False), None)])
def test_empty_masks(both: tuple[bool, bool], dice: float | None) -> None:
    masks: list[Any] = [filled(A, A, A) if full else empty() for full in both]
    found = measured(*masks, EVEN)
    assert found.dice == dice and found.hd95_mm is None and found.surface_mm is None


def test_distances_are_those_of_a_distance_transform() -> None:
    from scipy import ndimage

    spacing = (1.0, 0.7, 2.5)
    rng = np.random.default_rng(3)
    masks = [ndimage.gaussian_filter(rng.normal(size=(30, 40, 20)), 2) > 0.02 for _ in range(2)]
    edges = [m ^ ndimage.binary_erosion(m) for m in masks]
    for mask, edge in zip(masks, edges, strict=True):
        np.testing.assert_array_equal(surface(mask), edge)
    away = [ndimage.distance_transform_edt(~edges[1 - n], sampling=spacing)[edges[n]] for n in range(2)]
    found = measured(masks[0], masks[1], spacing)
    assert found.hd95_mm == pytest.approx(max(np.percentile(d, 95) for d in away), abs=1e-9)
    assert found.surface_mm == pytest.approx(np.concatenate(away).mean(), abs=1e-9)
