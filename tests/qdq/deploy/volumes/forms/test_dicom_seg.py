"""DICOM segmentation objects, read back by pydicom alone, hold the labels of the NIfTI files where the slices lie."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from clinic import classes_of, image, save, thresholds
from image_files import OBLIQUE, write_enhanced, write_series

from qdq.cli.main import main

pydicom = pytest.importorskip("pydicom", reason="pip install 'qdq[medical]'")
pytest.importorskip("highdicom", reason="pip install 'qdq[dicom-seg]'")
RECIPE = """
volume: {orientation: stored, intensity: stored}
window: {patch: [8, 8, 8], overlap: 0.25}
segmentation: {structures: {background: 0, graue Substanz: 1, weiß: 2}}
"""
GRID = (20, 17, 12)


def qdq(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def patient(data: Any, index: int) -> None:
    """A person with a name outside ASCII, and a study."""
    data.SpecificCharacterSet = "ISO_IR 100"
    data.PatientName, data.PatientID, data.PatientBirthDate = "Doe^Jané", "P-42", "19420517"
    data.StudyInstanceUID, data.FrameOfReferenceUID = "1.2.3.40", "1.2.3.41"
    data.InstitutionName = data.PatientComments = data.StudyDescription = "Saint Elsewhere"


def series(folder: Path, seed: int, each: Any = patient) -> np.ndarray:
    array = (100 * image(seed, GRID)).astype(np.int16)
    write_series(folder, array, OBLIQUE, uid=f"1.2.3.{seed}", seed=seed, each=each)
    return array


@pytest.fixture
def place(tmp_path: Path) -> Path:
    onnx.save(thresholds(100, 200), tmp_path / "float.onnx")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "key").write_bytes(b"k" * 32)
    return tmp_path


def segmented(place: Path, form: str, *more: object, data: str = "data") -> Result:
    words = ("--data", place / data, "--recipe", place / "recipe.yaml", "--case-key", place / "key", *more)
    return qdq("segment", place / "float.onnx", *words, "--form", form, "-o", place / form)


def masks(path: Path, grid: tuple[int, ...] = GRID) -> dict[str, np.ndarray]:
    """Each segment on the grid of OBLIQUE, (column, row, slice), frame by frame where its position says."""
    made = pydicom.dcmread(path)
    names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in made.SegmentSequence}
    found = {name: np.zeros(grid, np.uint8) for name in names.values()}
    lps = np.linalg.inv(np.diag([-1.0, -1.0, 1.0, 1.0]) @ OBLIQUE)
    frames = made.pixel_array.reshape(-1, made.Rows, made.Columns)
    for frame, groups in zip(frames, made.PerFrameFunctionalGroupsSequence, strict=True):
        at = lps @ [*map(float, groups.PlanePositionSequence[0].ImagePositionPatient), 1]
        np.testing.assert_allclose(at[:2], 0, atol=1e-3)
        name = names[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        found[name][:, :, round(at[2])] = frame.T
    return found


def test_segments_are_the_labels_of_the_nifti_files(place: Path) -> None:
    arrays = {f"1.2.3.{n}": series(place / "data" / "folder", n) for n in (1, 2)}
    assert segmented(place, "nifti").exit_code == 0
    done = segmented(place, "dicom-seg")
    assert done.exit_code == 0, done.output
    assert "hold name, identifiers, birth date and sex of the patient" in done.stderr.replace("\n", " ")
    made = sorted((place / "dicom-seg").glob("*.dcm"))
    plain = sorted((place / "nifti").glob("*.nii.gz"))
    assert [p.name.partition(".")[0] for p in made] == [p.name.partition(".")[0] for p in plain] and len(made) == 2
    for one, other, (uid, array) in zip(made, plain, arrays.items(), strict=True):
        labels = np.asarray(nib.load(other).dataobj)
        np.testing.assert_array_equal(labels, classes_of(array, 100, 200))
        found = masks(one)
        assert list(found) == ["graue Substanz", "weiß"]
        for value, mask in enumerate(found.values(), 1):
            np.testing.assert_array_equal(mask, labels == value)
        data = pydicom.dcmread(one)
        assert (data.StudyInstanceUID, data.FrameOfReferenceUID) == ("1.2.3.40", "1.2.3.41")
        assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == uid and data.SeriesInstanceUID != uid
        (source,) = data.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence
        files = [pydicom.dcmread(p) for p in (place / "data" / "folder").iterdir()]
        (slice_,) = [f for f in files if f.SOPInstanceUID == source.ReferencedSOPInstanceUID]
        placed = data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(slice_.ImagePositionPatient, placed, atol=1e-4)
        assert slice_.SeriesInstanceUID == uid
        assert data.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "float"


def test_only_what_the_standard_wants_of_the_patient_goes_along(place: Path) -> None:
    series(place / "data", 1)
    assert segmented(place, "dicom-seg").exit_code == 0
    (path,) = (place / "dicom-seg").glob("*.dcm")
    assert path.stat().st_mode & 0o077 == 0
    data = pydicom.dcmread(path)
    assert str(data.PatientName) == "Doe^Jané" and data.PatientID == "P-42" and data.StudyDate == ""
    assert b"Elsewhere" not in path.read_bytes() and "Jané" not in path.name
    assert "Jan" not in (place / "dicom-seg" / "labels.json").read_text()


def test_headers_that_round_slice_by_slice(place: Path) -> None:
    def each(data: Any, index: int) -> None:
        patient(data, index)
        for keyword, by in (("ImageOrientationPatient", 2e-5), ("ImagePositionPatient", 4e-5), ("PixelSpacing", 1e-6)):
            setattr(data, keyword, [f"{float(v) + index % 3 * by:.7f}" for v in getattr(data, keyword)])

    array = series(place / "data", 1, each)
    assert segmented(place, "dicom-seg").exit_code == 0
    (path,) = (place / "dicom-seg").glob("*.dcm")
    for value, mask in enumerate(masks(path).values(), 1):
        np.testing.assert_array_equal(mask, classes_of(array, 100, 200) == value)


def test_frames_of_one_file(place: Path) -> None:
    array = series(place / "plain", 1)
    (place / "data").mkdir()
    order = write_enhanced(place / "data" / "one.dcm", place / "plain")
    assert segmented(place, "dicom-seg").exit_code == 0
    (path,) = (place / "dicom-seg").glob("*.dcm")
    expected = array * 2.0
    expected[:, :, order] += np.arange(len(order))
    for value, mask in enumerate(masks(path).values(), 1):
        np.testing.assert_array_equal(mask, classes_of(expected, 100, 200) == value)


def test_frames_of_two_files_are_refused(place: Path) -> None:
    series(place / "plain", 1)
    (place / "data").mkdir()
    for half, files in enumerate(np.array_split(sorted((place / "plain").iterdir()), 2)):
        (place / str(half)).mkdir()
        for path in files:
            path.rename(place / str(half) / path.name)
        write_enhanced(place / "data" / f"{half}.dcm", place / str(half))
    assert segmented(place, "nifti").exit_code == 0
    done = segmented(place, "dicom-seg")
    assert done.exit_code == 2 and "its 12 frames lie in 2 files" in done.stderr and "case 1 of 1" in done.stderr


def test_channels_that_overlap_are_segments_that_overlap(place: Path) -> None:
    onnx.save(thresholds(100, 200, sigmoid=True), place / "float.onnx")
    (place / "recipe.yaml").write_text(RECIPE.replace("segmentation: {", "segmentation: {activation: sigmoid, "))
    array = series(place / "data", 1)
    done = segmented(place, "dicom-seg")
    assert done.exit_code == 0, done.output
    (path,) = (place / "dicom-seg").glob("*.dcm")
    assert pydicom.dcmread(path).SegmentsOverlap == "YES"
    for above, mask in zip((100, 200), masks(path).values(), strict=True):
        np.testing.assert_array_equal(mask, array > above)


def test_an_image_in_which_nothing_is_found(place: Path) -> None:
    write_series(place / "data", np.zeros(GRID, np.int16), OBLIQUE, each=patient)
    done = segmented(place, "dicom-seg")
    assert done.exit_code == 0, done.output
    (path,) = (place / "dicom-seg").glob("*.dcm")
    assert not any(mask.any() for mask in masks(path).values())


def test_what_is_no_series_is_refused(place: Path) -> None:
    save(place / "data", [image(0)])
    done = segmented(place, "dicom-seg")
    assert done.exit_code == 2 and "it is no DICOM series" in done.stderr and "case 1 of 1" in done.stderr
    assert not (place / "dicom-seg").exists()


@pytest.mark.parametrize(("keyword", "code"), [("FrameOfReferenceUID", 2), ("StudyInstanceUID", 2), ("PatientID", 0)])
def test_a_series_that_lacks_a_tag(place: Path, keyword: str, code: int) -> None:
    def each(data: Any, index: int) -> None:
        patient(data, index)
        delattr(data, keyword)

    series(place / "data", 1, each)
    done = segmented(place, "dicom-seg")
    assert done.exit_code == code and (f"have no {keyword}" in done.stderr) == bool(code)
    assert (place / "dicom-seg").exists() == (not code)


@pytest.mark.parametrize("keyword", ["PatientID", "PatientName", "StudyInstanceUID"])
def test_slices_of_two_patients_are_nobodys(place: Path, keyword: str) -> None:
    def other(data: Any, index: int) -> None:
        patient(data, index)
        if index == 7:
            setattr(data, keyword, "1.2.3.99")

    series(place / "data", 1, other)
    done = segmented(place, "dicom-seg")
    assert done.exit_code == 2 and f"its slices differ in {keyword}" in done.stderr and "1.2.3" not in done.stderr
    assert not (place / "dicom-seg").exists()


def test_a_models_name_is_one_value(place: Path) -> None:
    series(place / "data", 1)
    (place / "float.onnx").rename(place / "a\\b.onnx")
    words = ("--data", place / "data", "--recipe", place / "recipe.yaml", "--form", "dicom-seg", "-o", place / "out")
    assert qdq("segment", place / "a\\b.onnx", *words).exit_code == 0
    (path,) = (place / "out").glob("*.dcm")
    assert pydicom.dcmread(path).SeriesDescription == "Segmentation by a_b"


def test_a_name_that_is_no_segments_label(place: Path) -> None:
    (place / "recipe.yaml").write_text(RECIPE.replace("weiß", "w" * 65))
    series(place / "data", 1)
    done = segmented(place, "dicom-seg")
    assert done.exit_code == 2 and "at most 64 printable characters" in done.stderr


def test_highdicom_that_is_absent_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(place / "data", 1)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    done = segmented(place, "dicom-seg")
    assert done.exit_code == 3 and "pip install 'qdq[dicom-seg]'" in done.stderr


def test_labels_of_both_forms_are_not_mixed(place: Path) -> None:
    series(place / "data", 1)
    assert segmented(place, "nifti").exit_code == 0
    done = qdq(
        *("segment", place / "float.onnx", "--data", place / "data", "--recipe", place / "recipe.yaml"),
        *("--case-key", place / "key", "--form", "dicom-seg", "-o", place / "nifti"),
    )
    assert done.exit_code == 2 and "of another form" in done.stderr


def test_a_map_says_which_image_labels_are_of(place: Path) -> None:
    series(place / "data" / "Jané", 1)
    series(place / "data" / "Jané", 2)
    done = segmented(place, "nifti", "--write-map", place / "map.csv")
    assert done.exit_code == 0 and "which can identify patients" in done.stderr.replace("\n", " ")
    assert "Jan" not in done.output and (place / "map.csv").stat().st_mode & 0o777 == 0o600
    rows = [line.split(",") for line in (place / "map.csv").read_text().splitlines()]
    assert rows[0] == ["labels", "case", "key", "image", "source", "series"]
    files = sorted(p.name for p in (place / "nifti").glob("*.nii.gz"))
    for number, (row, name) in enumerate(zip(rows[1:], files, strict=True), 1):
        key = name.split("-")[2].partition(".")[0]
        assert row == [name, str(number), key, "1", str(place / "data" / "Jané"), f"1.2.3.{number}"]


def test_a_map_of_channels_and_one_that_cannot_be_written(place: Path) -> None:
    save(place / "data", [image(0)])
    listed = place / "list.json"
    listed.write_text('[{"image": "data/imagesTr/doe_0_0000.nii.gz", "case": "x"}]')
    recipe = ("--recipe", place / "recipe.yaml", "-o", place / "out")
    words = ("segment", place / "float.onnx", "--data", listed, *recipe, "--write-map")
    assert qdq(*words, place / "map.csv").exit_code == 0
    assert (place / "map.csv").read_text().splitlines()[1].endswith(f"1,{place}/data/imagesTr/doe_0_0000.nii.gz,")
    for bad, why in ((place / "no" / "map.csv", "its folder does not exist"), (listed, "it is an input")):
        done = qdq(*words, bad)
        assert done.exit_code == 2 and why in done.stderr
