"""Intensities: the numbers that nnU-Net and MONAI give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calib_data import DataError
from calib_data.volumes.intensity import normalized
from calib_data.volumes.spec import Intensity


def line(values: list[float], **how: Any) -> np.ndarray:
    found = normalized(np.array(values).reshape(1, -1, 1, 1), Intensity(**how))
    assert found.dtype == np.float32
    return found.ravel()


@pytest.mark.parametrize(
    ("values", "how", "expected"),
    [
        (
            [-1000, -41, 0, 99.5, 176, 3000],
            {"mean": 99.5, "std": 39.0, "clip": (-41.0, 176.0)},
            [-3.602564, -3.602564, -2.551282, 0, 1.961538, 1.961538],
        ),
        ([0, 0, 1, 2, 3, 4], {"zscore": "all"}, [-1.11803, -1.11803, -0.44721, 0.22361, 0.89443, 1.56525]),
        ([0, 0, 1, 2, 3, 4], {"zscore": "nonzero"}, [0, 0, -1.34164, -0.44721, 0.44721, 1.34164]),
        ([5, 5, 5], {"zscore": "all"}, [0, 0, 0]),
        ([0, 0, 0], {"zscore": "nonzero"}, [0, 0, 0]),
        ([-10, 0, 30], {"percentile": (0.0, 100.0)}, [0, 0.25, 1]),
        ([7, 7], {"percentile": (0.0, 100.0)}, [0, 0]),
        ([0, 300, -57, 164], {"window_hu": (-57.0, 164.0)}, [0.257919, 1, 0, 1]),
        ([0, 300], {"window_hu": (-57.0, 164.0), "to": (-1.0, 1.0)}, [-0.484163, 1]),
        ([128], {"mean": 0.0, "std": 255.0}, [0.50196]),
    ],
)
def test_numbers(values: list[float], how: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_allclose(line(values, **how), expected, atol=6e-6)  # the expected numbers have 5 or 6 digits


def test_percentiles_are_interpolated_and_clip() -> None:
    found = line(list(range(1001)), percentile=(0.5, 99.5))
    assert found[6] == pytest.approx(0.00101, abs=1e-5) and found[0] == 0 and found[-1] == 1


def test_filled_counts_holes_and_every_channel() -> None:
    pytest.importorskip("scipy", reason="pip install 'qdq[medical]'")
    channels = np.zeros((2, 7, 7, 7))
    channels[0, 1:6, 1:6, 1:6] = 4
    channels[0, 2:5, 2:5, 2:5] = 0  # a hole
    channels[1, 0, 0, 0] = 1
    found = normalized(channels, Intensity(zscore="filled"))
    inside = channels[0, 1:6, 1:6, 1:6]
    np.testing.assert_allclose(
        found[0, 3, 3, 3],
        (0 - (inside.sum() / 126)) / np.sqrt((inside**2).sum() / 126 - (inside.sum() / 126) ** 2),
        rtol=1e-5,
    )
    assert found[0, 6, 6, 6] == 0 and found[0, 0, 0, 0] == found[0, 3, 3, 3]


def test_a_list_is_one_for_each_channel() -> None:
    channels = np.arange(8.0).reshape(2, 4, 1, 1)
    found = normalized(channels, [Intensity(mean=1, std=2), Intensity(percentile=(0, 100))])
    np.testing.assert_allclose(found[0].ravel(), (np.arange(4) - 1) / 2)
    np.testing.assert_allclose(found[1].ravel(), np.arange(4) / 3, rtol=1e-6)
    with pytest.raises(DataError, match="2 channels, and `intensity` is a list of 1"):
        normalized(channels, [Intensity(zscore="all")])
    assert normalized(channels, None).dtype == np.float32
