"""nnU-Net's plans, written after its format; `tools/peer_nnunet.py` compares the arrays with nnU-Net's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import write_nifti

from calib_data import DataError, InputSpec, open_samples
from calib_data.volumes.nnunet import plans_spec
from calib_data.volumes.preprocess import preprocess_spec

CT = {"mean": 99.5, "std": 39.0, "percentile_00_5": -41.0, "percentile_99_5": 176.0}
FULL = {
    "preprocessor_name": "DefaultPreprocessor",
    "patch_size": [20, 32, 28],
    "spacing": [2.5, 0.8, 0.7],
    "normalization_schemes": ["CTNormalization"],
    "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
}


def write(folder: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> Path:
    """plans.json and dataset.json; `changes` are keys of 3d_fullres, or of the plans."""
    top = {"image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2]}
    plans = {
        **{key: changes.pop(key, value) for key, value in top.items()},
        "foreground_intensity_properties_per_channel": {"0": CT, "1": CT},
        "configurations": {
            "2d": {**FULL, "patch_size": [32, 28], "spacing": [0.8, 0.7]},
            "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [3, 2, 2], "next_stage": "3d_cascade_fullres"},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "ring": {"inherits_from": "ring2"},
            "ring2": {"inherits_from": "ring"},
            **changes.pop("configurations", {}),
            "3d_fullres": {**FULL, **changes},
        },
    }
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(data or {"channel_names": {"0": "CT"}}))
    return folder


def test_a_configuration_becomes_a_block(tmp_path: Path) -> None:
    spec = plans_spec(write(tmp_path))
    assert spec.to_mapping() == {
        "orientation": "stored",
        "axes": "czyx",
        "spacing_mm": [2.5, 0.8, 0.7],
        "grid": "edges",
        "order": 3,
        "separate_z": "auto",
        "crop": "nonzero",
        "intensity": [{"mean": 99.5, "std": 39.0, "clip": [-41.0, 176.0]}],
        "normalize": "before",
        "patch": [20, 32, 28],
        "patches": {"kind": "sliding"},
    }
    assert preprocess_spec(f"nnunet:{tmp_path}") == preprocess_spec(f"nnunet:{tmp_path}:3d_fullres") == spec
    assert preprocess_spec(f"nnunet:{tmp_path}:3d_lowres").spacing_mm == (3, 2, 2)


def test_transposed_axes_and_slices(tmp_path: Path) -> None:
    assert plans_spec(write(tmp_path, transpose_forward=[1, 0, 2])).axes == "cyzx"
    flat = plans_spec(tmp_path, "2d")
    assert flat.spacing_mm == (None, 0.8, 0.7) and flat.patch == (1, 32, 28)
    assert plans_spec(write(tmp_path, image_reader_writer="NibabelIOWithReorient")).orientation == "RAS"


@pytest.mark.parametrize(
    ("scheme", "mask", "expected"),
    [
        ("ZScoreNormalization", True, {"zscore": "filled"}),
        ("ZScoreNormalization", False, {"zscore": "all"}),
        ("RescaleTo01Normalization", False, {"percentile": [0.0, 100.0]}),
        ("RGBTo01Normalization", False, {"mean": 0.0, "std": 255.0}),
        ("NoNormalization", False, {"mean": 0.0, "std": 1.0}),
    ],
)
def test_every_scheme(tmp_path: Path, scheme: str, mask: bool, expected: dict[str, Any]) -> None:
    spec = plans_spec(write(tmp_path, normalization_schemes=[scheme], use_mask_for_norm=[mask]))
    assert spec.to_mapping()["intensity"] == [expected]


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({}, "3d_fulres", "Did you mean '3d_fullres'"),
        ({}, "3d_cascade_fullres", "takes the segmentation of 3d_lowres besides the image"),
        ({}, "ring", "inherit in a circle: ring from ring2 from ring"),
        ({"resampling_fn_data": "resample_torch_fornnunet"}, "3d_fullres", "resample_torch_fornnunet, whose numbers"),
        ({"preprocessor_name": "Mine"}, "3d_fullres", "preprocessor_name Mine"),
        ({"normalization_schemes": ["Mine"]}, "3d_fullres", "normalize with Mine"),
        ({"image_reader_writer": "NaturalImage2DIO"}, "3d_fullres", "read images with NaturalImage2DIO"),
        ({"normalization_schemes": ["NoNormalization"] * 2}, "3d_fullres", "names 1 channels .* normalizes 2"),
        ({"spacing": None}, "3d_fullres", "Cannot read nnU-Net's plans"),
        ({"spacing": [1, 2, "a"]}, "3d_fullres", "spacing_mm"),
        ({"resampling_fn_data_kwargs": {**FULL["resampling_fn_data_kwargs"], "force_separate_z": True}},  # type: ignore[dict-item]
         "3d_fullres", "force separate_z"),
    ],
)  # fmt: skip
def test_what_gives_other_numbers_is_refused(tmp_path: Path, changes: dict[str, Any], name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        plans_spec(write(tmp_path, **changes), name)


@pytest.mark.parametrize("text", ["{", "[]", "\0"])
def test_files_that_are_no_plans(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="needs the folder with plans"):
        plans_spec(tmp_path)
    write(tmp_path)
    (tmp_path / "plans.json").write_text(text)
    with pytest.raises(DataError, match="no mapping in JSON"):
        plans_spec(tmp_path)


@pytest.mark.parametrize("text", ["nnunet", "nnunet:", "unet:x", ""])
def test_other_forms_of_preprocessing_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="Cannot read the preprocessing"):
        preprocess_spec(text)


def test_thick_slices_are_normalized_then_resampled_plane_by_plane(tmp_path: Path) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="pip install 'qdq[medical]'")
    image = np.random.default_rng(0).normal(80, 60, (21, 18, 6)).astype(np.int16)
    image[:2], image[:, -3:] = 0, 0
    path = write_nifti(tmp_path / "case_0000.nii.gz", image, np.diag([0.5, 0.5, 4.0, 1.0]))
    spec = plans_spec(write(tmp_path, spacing=[2.0, 0.8, 0.8], patch_size=[12, 9, 12]))
    model = InputSpec(name="x", dtype="float32", shape=(None, 1, None, None, None))
    (found,) = (s["x"][0, 0] for s in open_samples(path, [model], volume=spec))

    box = image.transpose(2, 1, 0)[:, :15, 2:].astype(np.float32)
    values = (np.clip(box, -41, 176) - np.float32(99.5)) / np.float32(39)
    planes = []
    for plane in values.astype(float):
        zoomed = ndimage.zoom(plane, (9 / 15, 12 / 19), order=3, mode="nearest", grid_mode=True)
        planes.append(zoomed.clip(plane.min(), plane.max()))
    expected = np.repeat(planes, 2, axis=0)  # 4 mm slices on 2 mm: the nearest, twice
    np.testing.assert_allclose(found, expected, atol=1e-6)
