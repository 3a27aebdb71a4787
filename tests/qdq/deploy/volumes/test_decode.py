"""Channels become labels: one class each, or regions that overlap."""

from __future__ import annotations

import numpy as np
import pytest

from qdq.core.errors import InputError
from qdq.deploy.volumes.decode import Classes, Regions, Structure


def test_classes_are_the_argmax_and_the_first_of_equals() -> None:
    values = np.random.default_rng(0).integers(0, 4, (5, 6, 7, 8)).astype(np.float32)
    found = Classes(channels=5).labels(values)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, values.argmax(0))


def test_more_classes_than_a_byte_holds() -> None:
    assert Classes(channels=257).dtype == np.uint16


def test_regions_paint_over_each_other_as_in_nnunet() -> None:
    logits = np.float32([[1, 1, 1, -1], [-1, 1, 1, -1], [-1, -1, 1, -1]])[:, :, None, None]
    found = Regions(channels=3, threshold=0, order=(2, 1, 3))
    assert found.labels(logits).ravel().tolist() == [2, 1, 3, 0]


def test_a_region_is_measured_by_all_labels_in_it() -> None:
    regions = Regions(channels=2, threshold=0, order=(2, 3), parts=((2, 3), (3,)), names=("tumour", "core"))
    whole, core = regions.structures
    labels = np.array([0, 2, 3])
    assert whole.name == "tumour" and whole.mask(labels).tolist() == [False, True, True]
    assert core.mask(labels).tolist() == [False, False, True]


def test_without_an_order_regions_that_cross_are_kept_apart() -> None:
    probabilities = np.float32([[0.9, 0.9, 0.1], [0.1, 0.9, 0.5]])[:, :, None, None]
    regions = Regions(channels=2, threshold=0.5)
    labels = regions.labels(probabilities)
    assert labels.ravel().tolist() == [1, 3, 0]
    first, second = regions.structures
    assert first.mask(labels).ravel().tolist() == [True, True, False]
    assert second.mask(labels).ravel().tolist() == [False, True, False]


def test_truth_is_of_label_values_also_where_the_prediction_is_of_bits() -> None:
    structure = Structure(name="tumour", values=(1, 4), bit=0)
    assert structure.truth(np.array([0, 1, 2, 4])).tolist() == [False, True, False, True]
    assert structure.mask(np.array([0, 1, 2, 3], np.uint8)).tolist() == [False, True, False, True]


def test_an_order_is_of_every_channel() -> None:
    with pytest.raises(InputError, match="has 2 labels, but the network has 3 channels"):
        Regions(channels=3, threshold=0, order=(1, 2))
    with pytest.raises(InputError, match="at most 64"):
        Regions(channels=65, threshold=0)
