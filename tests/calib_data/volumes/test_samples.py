"""Images as a model gets them: axes, patches, labels, padding; equal values give equal samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import OBLIQUE, ramp, write_nifti, write_series

from calib_data import DataError, InputSpec, Samples, open_samples
from calib_data.volumes.patches import starts
from calib_data.volumes.spec import Patches, VolumeSpec, volume_spec

pytest.importorskip("nibabel", reason="pip install 'qdq[medical]'")
IMAGE = InputSpec(name="image", dtype="float32", shape=("n", None, None, None, None))
LABEL = InputSpec(name="label", dtype="int64", shape=(None,) * 4)


def opened(source: Path, *inputs: InputSpec, **values: Any) -> Samples:
    return open_samples(source, inputs or [IMAGE], volume=volume_spec({"intensity": "stored", **values}))


def arrays(source: Path, **values: Any) -> list[np.ndarray]:
    return [sample["image"] for sample in opened(source, **values)]


def test_one_image_whole_as_it_is_stored(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", ramp(4, 5, 6), OBLIQUE)
    (found,) = arrays(path)
    np.testing.assert_array_equal(found, ramp(4, 5, 6)[None, None].astype(np.float32))
    assert opened(path).shapes()["image"].opt == (1, 1, 4, 5, 6)


@pytest.mark.parametrize("axes", ["cxyz", "czyx", "cyxz", "xyzc", "zcyx"])
def test_axes_are_in_the_models_order(tmp_path: Path, axes: str) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6, 2), np.diag([1, 2, 3, 1.0]))
    (found,) = arrays(path, axes=axes)
    np.testing.assert_array_equal(found[0], ramp(4, 5, 6, 2).transpose(["xyzc".index(a) for a in axes]))


def test_sizes_count_in_the_models_axes(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6), np.diag([1, 2, 3, 1.0]))
    (found,) = arrays(path, axes="czyx", spacing_mm=[1.5, None, 1], grid="edges")
    assert found.shape == (1, 1, 12, 5, 4)
    (found,) = arrays(path, axes="czyx", patch=[6, 5, 4], patches={"per_volume": 1})
    assert found.shape == (1, 1, 6, 5, 4)


def test_a_model_without_batch_axis_and_a_model_of_slices(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    four = InputSpec(name="image", dtype="float32", shape=(None, None, None, None))
    (found,) = (s["image"] for s in opened(path, four))
    assert found.shape == (1, 4, 5, 6)
    slices = [
        s["image"]
        for s in opened(path, four, axes="czyx", patch=[1, 5, 4], patches={"kind": "sliding", "per_volume": 9})
    ]
    assert len(slices) == 6
    np.testing.assert_array_equal(slices[2][0, 0], ramp(4, 5, 6)[:, :, 2].T)


def test_a_model_of_one_size_needs_a_patch(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(9, 8, 7))
    fixed = InputSpec(name="image", dtype="float32", shape=(1, 1, 8, "y", 4))
    with pytest.raises(DataError, match=r"the image is 9 x 8 x 7 as .* takes 8 x any x 4"):
        list(opened(path, fixed))
    assert len(list(opened(path, fixed, patch=[8, 8, 4]))) == 4


def test_a_small_image_is_padded_on_both_sides(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(5, 4, 4) + 1)
    (found,) = arrays(path, patch=[8, 4, 4], patches={"per_volume": 1}, pad=-7)
    assert (found[0, 0, 0] == -7).all() and (found[0, 0, 6:] == -7).all()
    np.testing.assert_array_equal(found[0, 0, 1:6], ramp(5, 4, 4) + 1)


@pytest.mark.parametrize("kind", ["random", "foreground"])
def test_patches_depend_on_seed_and_values_alone(tmp_path: Path, kind: str) -> None:
    for folder, names in (("one", "ab"), ("two", "zy")):
        for shift, name in enumerate(names):
            write_nifti(tmp_path / folder / f"{name}.nii", ramp(9, 9, 9) + shift)
    how = {"patch": [4, 4, 4], "patches": {"per_volume": 3, "kind": kind, "seed": 5}}
    one, two = opened(tmp_path / "one", **how), opened(tmp_path / "two", **how)
    assert len(one) == 6 and one.sha256() == two.sha256() == opened(tmp_path / "one", **how).sha256()
    other = opened(tmp_path / "one", **{**how, "patches": {**how["patches"], "seed": 6}})
    assert other.sha256() != one.sha256()
    whole = [s["image"].tobytes() for s in one]
    parts = [s["image"].tobytes() for n in range(2) for s in one.shard(n, 2)]
    assert sorted(parts) == sorted(whole) and len(set(whole)) > 3


def test_foreground_lies_around_the_label_or_what_is_bright(tmp_path: Path) -> None:
    image = np.zeros((20, 20, 20), np.int16)
    image[15:18, 2:5, 9:12] = 100
    write_nifti(tmp_path / "imagesTr/a_0000.nii", image)
    how = {"patch": [4, 4, 4], "patches": {"per_volume": 8, "kind": "foreground"}}
    assert all(patch.max() == 100 for patch in arrays(tmp_path / "imagesTr", **how))
    label = np.zeros((20, 20, 20), np.uint8)
    label[3, 16, 16] = 2
    write_nifti(tmp_path / "labelsTr/a.nii", label)
    found = list(opened(tmp_path, IMAGE, LABEL, **how))
    assert all(sample["image"].max() == 0 and sample["label"].max() == 2 for sample in found)
    assert all(sample["label"].shape == (1, 4, 4, 4) for sample in found)


def test_sliding_windows_cover_the_image(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(10, 4, 4))
    how = {"patch": [4, 4, 4], "patches": {"per_volume": 100, "kind": "sliding"}}
    samples = opened(path, **how)
    assert samples.len_or_none() is None
    found = [s["image"] for s in samples]
    assert [int(f[0, 0, 0, 0, 0]) // 16 for f in found] == [0, 2, 4, 6]
    assert samples.shapes()["image"].max == (1, 1, 4, 4, 4)
    assert starts_of(3, 10) == [0, 4, 6] and starts_of(1, 10) == [0]


def starts_of(per_volume: int, size: int) -> list[int]:
    from calib_data.volume import Volume

    volume = Volume(array=np.zeros((1, size, 4, 4)), affine=np.eye(4))
    return [start[0] for start in starts(volume, None, (4, 4, 4), Patches(kind="sliding", per_volume=per_volume))]


def test_the_box_of_what_is_not_zero(tmp_path: Path) -> None:
    image = np.zeros((8, 9, 10, 2), np.int16)
    image[2:4, 3, 5:9, 0], image[6, 3, 5, 1] = 1, 2
    path = write_nifti(tmp_path / "a.nii", image)
    assert arrays(path, crop="nonzero")[0].shape == (1, 2, 5, 1, 4)
    empty = write_nifti(tmp_path / "b.nii", np.zeros((3, 4, 5), np.int16))
    assert arrays(empty, crop="nonzero")[0].shape == (1, 1, 3, 4, 5)


def test_no_default_once_files_differ(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", ramp(4, 5, 6), np.diag([1, 1, 1, 1.0]))
    write_nifti(tmp_path / "b.nii", ramp(4, 5, 6), np.diag([-1, 1, 2, 1.0]))
    with pytest.raises(
        DataError, match=r"differ in their orientation \(RAS, as in case 1 .*; LAS, as in case 2 .*no default"
    ):
        opened(tmp_path)
    with pytest.raises(DataError, match=r"differ in their spacing \(1 x 1 x 1 mm, as in case 1 .*; 1 x 1 x 2 mm"):
        opened(tmp_path, orientation="RAS")
    assert len(arrays(tmp_path, orientation="RAS", spacing_mm="stored")) == 2
    assert len(arrays(tmp_path, orientation="stored", spacing_mm=[1, 1, 1], grid="centers")) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image, label: image.__setitem__((0, 0, 0), np.nan), "1 of its 120 voxels are NaN or infinite"),
        (lambda image, label: label.__setitem__((0, 0, 0), -1), "no whole numbers from 0 on"),
        (lambda image, label: label.__setitem__((0, 0, 0), 0.5), "no whole numbers from 0 on"),
    ],
)
def test_values_that_are_wrong(tmp_path: Path, change: Any, words: str) -> None:
    image, label = ramp(4, 5, 6, dtype="float32"), ramp(4, 5, 6, dtype="float32")
    change(image, label)
    write_nifti(tmp_path / "imagesTr/doe_0000.nii", image)
    write_nifti(tmp_path / "labelsTr/doe.nii", label)
    with pytest.raises(DataError, match=words) as caught:
        list(opened(tmp_path))
    assert "doe" not in str(caught.value) and str(caught.value).startswith("Cannot use case 1 of 1 (key ")


@pytest.mark.parametrize("volume", [None, volume_spec({"orientation": "stored"})])
def test_whole_numbers_into_a_float_model_need_an_intensity(tmp_path: Path, volume: VolumeSpec | None) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    with pytest.raises(DataError, match=r"whole numbers \(int16\) and the model takes float32.*`intensity: stored`"):
        list(open_samples(path, [IMAGE], volume=volume))
    write_nifti(path, ramp(4, 5, 6, dtype="float32"))
    assert len(list(open_samples(path, [IMAGE], volume=volume))) == 1


def test_the_label_of_another_grid_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "imagesTr/a_0000.nii", ramp(4, 5, 6))
    moved = np.eye(4)
    moved[1, 3] = 5
    for affine, how in (
        (np.diag([1, 1, 2, 1.0]), "1 x 1 x 2 mm, RAS against 4x5x6"),
        (np.diag([-1, 1, 1, 1.0]), "3 mm apart"),  # turned to RAS, and beside it
        (moved, "both 4x5x6 voxels of 1 x 1 x 1 mm, RAS, but up to 5 mm apart"),
    ):
        write_nifti(tmp_path / "labelsTr/a.nii", ramp(4, 5, 6, dtype="uint8"), affine)
        with pytest.raises(DataError, match=f"its label lies on another grid than its image: .*{how}"):
            list(opened(tmp_path))


def test_a_case_without_the_label_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has no label"):
        list(opened(write_nifti(tmp_path / "a.nii", ramp(4, 5, 6)), IMAGE, LABEL))


def test_several_inputs_and_arrays_are_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    other = InputSpec(name="age", dtype="float32", shape=(1,))
    with pytest.raises(DataError, match="has the inputs 'image', 'age'"):
        opened(path, IMAGE, other)
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 4, 4, 4), np.float32))
    with pytest.raises(DataError, match="Cannot use `volume:`"):
        opened(tmp_path / "x.npy", orientation="RAS")


def test_dtypes(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(4, 5, 6))
    whole = InputSpec(name="image", dtype="uint8", shape=IMAGE.shape)
    assert next(iter(opened(path, whole, dtype="uint8")))["image"].dtype == np.uint8
    write_nifti(tmp_path / "a.nii", ramp(4, 5, 60))
    with pytest.raises(DataError, match="not all whole numbers that uint8 holds"):
        list(opened(path, whole, dtype="uint8"))


def test_a_series_and_a_nifti_file_of_one_image_give_the_same_samples(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="pip install 'qdq[medical]'")
    array = np.random.default_rng(0).integers(0, 255, (12, 10, 8)).astype(np.uint8)
    stored = OBLIQUE[:, [1, 2, 0, 3]]
    write_nifti(tmp_path / "nifti/a.nii.gz", array, stored)
    write_nifti(tmp_path / "nifti/b.nii.gz", array[::-1], stored)
    flipped = stored.copy()
    flipped[:, 0] *= -1
    write_series(tmp_path / "dicom", array, stored, uid="1.2.1", seed=1)
    write_series(tmp_path / "dicom", array[::-1], stored, uid="1.2.2", seed=2)
    how = {"orientation": "LIA", "spacing_mm": [1, 1, 1], "grid": "edges", "intensity": {"zscore": "all"}}
    nifti, dicom = opened(tmp_path / "nifti", **how), opened(tmp_path / "dicom", **how)
    for one, two in zip(nifti, dicom, strict=True):
        np.testing.assert_allclose(one["image"], two["image"], atol=1e-5)
    stored_only = {"orientation": "LIA", "spacing_mm": "stored"}
    assert opened(tmp_path / "nifti", **stored_only).sha256() == opened(tmp_path / "dicom", **stored_only).sha256()


def test_json_of_a_spec_is_pickled_to_workers(tmp_path: Path) -> None:
    import pickle

    spec = volume_spec({"orientation": "RAS", "intensity": {"zscore": "all"}})
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert json.dumps(spec.to_mapping())
