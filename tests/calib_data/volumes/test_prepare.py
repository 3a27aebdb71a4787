"""Each file of a case is read once, and its label is held to its grid, whoever prepares the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import OBLIQUE, ramp, write_nifti

from calib_data import DataError
from calib_data.sources import nifti
from calib_data.volume import Volume
from calib_data.volumes import prepare
from calib_data.volumes.case import Case, keyed
from calib_data.volumes.spec import VolumeSpec

nibabel = pytest.importorskip("nibabel", reason="pip install 'qdq[medical]'")


def case(folder: Path, label: np.ndarray) -> Case:
    write_nifti(folder / "imagesTr" / "a_0000.nii", ramp(4, 5, 6), OBLIQUE)
    write_nifti(folder / "labelsTr" / "a.nii", label, OBLIQUE)
    (found,) = keyed(nifti.FORM.cases(str(folder)))
    return found


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> VolumeSpec:
    """A bundle whose transforms keep every second voxel."""

    def image(case: Case, bundle: str) -> Volume:
        whole = case.image()
        affine = whole.affine.copy()
        affine[:3, :3] *= 2
        return Volume(array=whole.array[:, ::2, ::2, ::2].astype(np.float32), affine=affine)

    monkeypatch.setattr(prepare, "bundle_image", image)
    return VolumeSpec(bundle="configs/inference.json")


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    load = nibabel.load

    def counted(path: Path) -> Any:
        opened.append(path.name)
        return load(path)

    monkeypatch.setattr(nibabel, "load", counted)
    one = case(tmp_path, ramp(4, 5, 6) // 100)
    said = prepare.described(one, VolumeSpec(intensity="stored"))
    assert said["label"] == "label 0, 1" and sorted(opened) == ["a.nii", "a_0000.nii"]
    opened.clear()
    made = prepare.prepared(one, VolumeSpec(intensity="stored"))
    assert made.truth is not None and sorted(opened) == ["a.nii", "a_0000.nii"]


def test_the_label_of_a_bundles_case(tmp_path: Path, bundle: VolumeSpec) -> None:
    made = prepare.prepared(case(tmp_path, ramp(4, 5, 6) // 100), bundle)
    assert made.image.grid == (2, 3, 3) and made.file.shape == (4, 5, 6) and made.label is None
    assert made.truth is not None
    np.testing.assert_array_equal(made.truth.array[0], ramp(4, 5, 6) // 100)


@pytest.mark.parametrize(
    ("label", "words"),
    [(ramp(4, 5, 7), "its label lies on another grid"), (ramp(4, 5, 6) - 1, "no whole numbers from 0 on")],
)
def test_a_label_that_is_none_of_a_bundles_case(
    tmp_path: Path, bundle: VolumeSpec, label: np.ndarray, words: str
) -> None:
    with pytest.raises(DataError, match=f"^Cannot use case 1 of 1.*: {words}|{words}"):
        prepare.prepared(case(tmp_path, label), bundle)
