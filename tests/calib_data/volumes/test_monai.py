"""A MONAI bundle runs its own code, for who trusts it, and not for anyone else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from image_files import OBLIQUE, ramp, write_nifti, write_series

from calib_data import DataError, InputSpec, open_samples
from calib_data.extras import MissingExtraError
from calib_data.volumes import monai as bundles
from calib_data.volumes.preprocess import preprocess_spec
from calib_data.volumes.spec import volume_spec

IMAGE = InputSpec(name="image", dtype="float32", shape=(None,) * 5)
STEPS = [
    {"_target_": "LoadImaged", "keys": "image"},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
    {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.0, 2.0], "mode": "bilinear"},
    {
        "_target_": "ScaleIntensityRanged",
        "keys": "image",
        "a_min": 10,
        "a_max": 90,
        "b_min": 0,
        "b_max": 1,
        "clip": True,
    },
]


def write_bundle(folder: Path, *first: object) -> Path:
    path = folder / "bundle/configs/inference.json"
    path.parent.mkdir(parents=True)
    steps = [*first, *STEPS]
    path.write_text(json.dumps({"preprocessing": {"_target_": "Compose", "transforms": steps}, "network": "$nothing"}))
    return path


def test_a_bundle_without_trust_is_not_read(tmp_path: Path) -> None:
    path = write_bundle(tmp_path, f"$__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(DataError, match=r"Refused to open .* --trust"):
        preprocess_spec(f"monai:{path}")
    image = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    with pytest.raises(DataError, match="Refused to open"):  # a recipe cannot give trust
        list(open_samples(image, [IMAGE], volume=volume_spec({"bundle": str(path)})))
    assert not (tmp_path / "ran").exists()


def test_a_dicom_series_is_not_left_to_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydicom", reason="pip install 'qdq[medical]'")
    monkeypatch.setattr(bundles, "_transforms", lambda bundle: lambda read: pytest.fail("it read files by itself"))
    series = write_series(tmp_path / "in", ramp(4, 5, 6), OBLIQUE)
    with bundles.trusting(), pytest.raises(DataError, match=r"case 1 of 1 .* the slices of a DICOM series"):
        list(open_samples(series, [IMAGE], volume=preprocess_spec(f"monai:{write_bundle(tmp_path)}")))


def test_monai_that_is_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "monai.bundle", None)
    bundles._transforms.cache_clear()
    image = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    with bundles.trusting(), pytest.raises(MissingExtraError, match="pip install 'monai'") as caught:
        list(open_samples(image, [IMAGE], volume=preprocess_spec(f"monai:{write_bundle(tmp_path)}")))
    assert caught.value.exit_code == 3


def test_a_bundle_and_the_same_as_a_block_agree(tmp_path: Path) -> None:
    pytest.importorskip("monai.bundle", reason="pip install monai")
    array = np.random.default_rng(0).integers(0, 100, (12, 10, 8)).astype(np.int16)
    image = write_nifti(tmp_path / "a.nii.gz", array, np.diag([-1.0, 1.2, 1.7, 1.0]))
    with bundles.trusting():
        (own,) = open_samples(image, [IMAGE], volume=preprocess_spec(f"monai:{write_bundle(tmp_path)}"))
    block = {
        "orientation": "RAS",
        "spacing_mm": [1.5, 1.0, 2.0],
        "grid": "centers",
        "intensity": {"window_hu": [10, 90]},
    }
    (ours,) = open_samples(image, [IMAGE], volume=volume_spec(block))
    np.testing.assert_allclose(ours["image"], own["image"], atol=2e-6)  # both interpolate in float64


def test_no_bundle_and_one_that_does_not_open(tmp_path: Path) -> None:
    pytest.importorskip("monai.bundle", reason="pip install monai")
    image = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    bad = write_bundle(tmp_path, {"_target_": "NoSuchTransformd"})
    for path, words in ((tmp_path / "no.json", "There is no MONAI bundle"), (bad, "does not open")):
        with bundles.trusting(), pytest.raises(DataError, match=words):
            list(open_samples(image, [IMAGE], volume=preprocess_spec(f"monai:{path}")))
