"""The block `volume:` of a recipe: what is not understood is refused, with the nearest key."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from calib_data import DataError
from calib_data.volumes.spec import VolumeSpec, block, volume_spec

WHOLE = {
    "orientation": "LIA",
    "axes": "czyx",
    "spacing_mm": [3, None, 0.7],
    "grid": "edges",
    "order": 3,
    "separate_z": "auto",
    "crop": "nonzero",
    "intensity": [{"mean": 99.5, "std": 39, "clip": [-41, 176]}, {"zscore": "nonzero"}],
    "normalize": "before",
    "patch": [32, 64, 64],
    "patches": {"per_volume": 2, "kind": "foreground", "seed": 7},
    "dtype": "float16",
}


def test_a_block_is_read_and_written() -> None:
    spec = volume_spec(WHOLE)
    assert spec.to_mapping() == WHOLE
    assert volume_spec(yaml.safe_load(block(spec))["volume"]) == spec
    assert volume_spec({}) == VolumeSpec() and volume_spec(spec) is spec


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"orientaton": "RAS"}, "no key `orientaton`; did you mean `orientation`"),
        ({"intensity": {"windowhu": [0, 1]}}, "did you mean `window_hu`"),
        ({"patch": [1, 1, 1], "patches": {"sead": 1}}, "did you mean `seed`"),
        ({"orientation": "RAX"}, "three letters are needed"),
        ({"orientation": "LRS"}, "three letters are needed"),
        ({"axes": "zyx"}, "c, x, y, z in the model's order"),
        ({"spacing_mm": [1, 1], "grid": "edges"}, "spacing_mm has 2 values .* 3 are needed"),
        ({"spacing_mm": [1, 1, 0], "grid": "edges"}, "spacing_mm"),
        ({"spacing_mm": [1, 1, float("nan")], "grid": "edges"}, "spacing_mm"),
        ({"spacing_mm": [1, 1, 1]}, "spacing_mm needs its grid"),
        ({"spacing_mm": [1, 1, 1], "grid": "center"}, "grid"),
        ({"order": 2}, "order"),
        ({"patch": [8, 8]}, "patch has 2 values"),
        ({"patches": {"per_volume": 1}}, "patches needs patch"),
        ({"patch": [8, 8, 8], "patches": {"per_volume": 0}}, "per_volume"),
        ({"intensity": {}}, "intensity holds nothing"),
        ({"intensity": {"zscore": "all", "percentile": [1, 2]}}, "percentile and zscore"),
        ({"intensity": {"mean": 1}}, "mean with std"),
        ({"intensity": {"mean": 1, "std": 0}}, "std"),
        ({"intensity": {"zscore": "all", "clip": [0, 1]}}, "belongs to mean and std"),
        ({"intensity": {"window_hu": [5, 5]}}, r"\[low, high\] is needed"),
        ({"intensity": {"percentile": [-1, 99]}}, "from 0 to 100"),
        ({"intensity": {"window_hu": [0, float("inf")]}}, r"\[low, high\] is needed"),
        ({"dtype": "complex64"}, "dtype is 'complex64'"),
        ({"crop": "zero"}, "crop"),
        ({"bundle": "x.json", "crop": "nonzero"}, "bundle and crop are given"),
        ("RAS", "Expected `object`"),
        ([], "Expected `object`"),
    ],
)
def test_what_is_not_understood_is_refused(values: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        volume_spec(values)
    assert str(caught.value).startswith("The recipe's volume: ")
