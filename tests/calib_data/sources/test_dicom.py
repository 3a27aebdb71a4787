"""DICOM series: ordered along their normal, rescaled slice by slice; what is no even stack is refused, with why."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import OBLIQUE, ramp, write_enhanced, write_series

from calib_data import DataError, InputSpec
from calib_data.sources import case_list, dicom
from calib_data.volume import Volume
from calib_data.volumes.case import Case, keyed, told
from calib_data.volumes.samples import open_cases
from calib_data.volumes.spec import VolumeSpec

pydicom = pytest.importorskip("pydicom", reason="pip install 'qdq[medical]'")
GRID = (4, 5, 6)
IMAGE = InputSpec(name="image", dtype="float32", shape=(1, 1, None, None, None))
Each = Callable[[Any, int], None]


def one(path: Path) -> Case:
    """The only case of a folder or file."""
    (found,) = dicom.cases(str(path))
    return found


def read(path: Path) -> Volume:
    """Its image."""
    return one(path).image()


def moved(by: Callable[[int], tuple[float, float, float]]) -> Each:
    """Adds something to each slice's position, in LPS millimetres."""

    def each(data: Any, index: int) -> None:
        data.ImagePositionPatient = [float(a) + b for a, b in zip(data.ImagePositionPatient, by(index), strict=True)]

    return each


def refused(folder: Path, words: str) -> None:
    (case,) = keyed(dicom.cases(str(folder)))
    with pytest.raises(DataError, match=words), told(case.where):
        case.image()


def test_shuffled_files_give_the_volume_and_its_place(tmp_path: Path) -> None:
    volume = read(write_series(tmp_path, ramp(*GRID), OBLIQUE))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array[0], ramp(*GRID))
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-6)  # positions are decimal text of 10 digits
    np.testing.assert_array_equal(one(tmp_path).affine(), volume.affine)
    assert dicom.owns(str(tmp_path)) and not dicom.owns(str(tmp_path / "nothing"))


def test_series_are_cases_in_folders_of_folders(tmp_path: Path) -> None:
    write_series(tmp_path / "a", ramp(*GRID), OBLIQUE, uid="1.2.3.1")
    write_series(tmp_path / "a", ramp(*GRID) + 1, OBLIQUE, uid="1.2.3.2", seed=1)
    write_series(tmp_path / "b" / "c", ramp(*GRID) + 2, OBLIQUE, uid="1.2.3.3")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    found = keyed(dicom.cases(str(tmp_path)))
    assert [int(case.image().array.min()) for case in found] == [0, 1, 2]
    assert [case.origins[0].series for case in found] == ["1.2.3.1", "1.2.3.2", "1.2.3.3"]
    (tmp_path / "list.csv").write_text("image\nb\n")
    assert int(case_list.cases(str(tmp_path / "list.csv"))[0].image().array.min()) == 2
    (tmp_path / "list.csv").write_text("image\n.\n")
    with pytest.raises(DataError, match=r"row 1 of 1 of the list of cases \(image\): it names 3 images; one is needed"):
        case_list.cases(str(tmp_path / "list.csv"))


def test_rescale_of_each_slice(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        data.Modality, data.RescaleSlope, data.RescaleIntercept = "PT", index + 0.5, -1024

    volume = read(write_series(tmp_path, ramp(*GRID), OBLIQUE, each=each))
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0], (ramp(*GRID) * (np.arange(6) + 0.5) - 1024).astype(np.float32))


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_monochrome1_is_inverted_in_its_range(tmp_path: Path, dtype: str) -> None:
    def each(data: Any, index: int) -> None:
        data.PhotometricInterpretation = "MONOCHROME1"

    stored = ramp(*GRID, dtype=dtype)
    volume = read(write_series(tmp_path, stored, OBLIQUE, each=each))
    np.testing.assert_array_equal(volume.array[0], 255 - stored if dtype == "uint8" else -1 - stored)


def test_monochrome1_of_measurements_is_refused(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        data.PhotometricInterpretation, data.Modality = "MONOCHROME1", "CT"

    with pytest.raises(DataError, match="MONOCHROME1 and of modality CT"):
        dicom.cases(str(write_series(tmp_path, ramp(*GRID), OBLIQUE, each=each)))


@pytest.mark.parametrize(
    ("keyword", "plugin"),
    [("RLELossless", "pydicom"), ("JPEG2000Lossless", "openjpeg"), ("JPEGLSLossless", "jpeg_ls")],
)
def test_pixels_compressed_without_loss(tmp_path: Path, keyword: str, plugin: str) -> None:
    pytest.importorskip(plugin, reason="pip install 'qdq[medical]'")
    array = np.random.default_rng(0).integers(-1024, 3000, (64, 72, 4)).astype(np.int16)
    volume = read(write_series(tmp_path, array, OBLIQUE, syntax=getattr(pydicom.uid, keyword)))
    np.testing.assert_array_equal(volume.array[0], array)


def test_a_compression_without_decoder_is_named(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
        data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True

    refused(write_series(tmp_path, ramp(*GRID), OBLIQUE, each=each), "compressed as JPEG Lossless.*pip install")


def test_a_missing_slice_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path, ramp(4, 5, 7), OBLIQUE)
    gone = next(
        path for path in tmp_path.iterdir() if round(float(pydicom.dcmread(path).ImagePositionPatient[2]), 3) == 17.5
    )
    gone.unlink()  # index 3 of 0 to 6
    refused(tmp_path, "is 2.5 mm, but 5 mm between slices 3 and 4 of 6 .* a slice is missing")


def test_uneven_steps_are_refused_and_rounded_ones_are_not(tmp_path: Path) -> None:
    write_series(tmp_path / "round", ramp(*GRID), OBLIQUE, each=moved(lambda n: (0, 0, 0.02 * (n % 2))))
    assert read(tmp_path / "round").array.shape == (1, *GRID)
    write_series(tmp_path / "uneven", ramp(*GRID), OBLIQUE, each=moved(lambda n: (0, 0, 0.5 * (n > 3))))
    refused(tmp_path / "uneven", "is 2.5 mm, but 3 mm between slices 4 and 5")


def test_directions_that_differ_as_headers_round_are_one(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        data.ImageOrientationPatient = [1, 0.00004 + 0.00002 * (index % 2), 0, 0, 1, 0]

    write_series(tmp_path, ramp(*GRID), np.diag([-1, -1, 2.5, 1.0]), each=each)
    write_series(tmp_path / "more", ramp(*GRID), np.diag([-1, -1, 2.5, 1.0]))
    found = dicom.cases(str(tmp_path))
    assert [case.image().grid for case in found] == [GRID, GRID] and not found.left_out


def test_doubled_slices_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, ramp(*GRID), OBLIQUE, each=moved(lambda n: (0, 0, -2.5 * (n == 3))))
    refused(tmp_path, "1 of its 6 slices lie where another one lies")


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    shift = 2.5 * np.tan(np.radians(15))
    write_series(tmp_path, ramp(*GRID), np.diag([-1, -1, 2.5, 1.0]), each=moved(lambda n: (0, float(shift) * n, 0)))
    refused(tmp_path, "sheared by 15.0 degrees")


def test_a_localizer_in_the_series_is_refused(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        if index == 2:
            data.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    refused(write_series(tmp_path, ramp(*GRID), OBLIQUE, each=each), "its 6 slices are 2 stacks")


def scout(data: Any, index: int) -> None:
    """Three planes, as a localizer has them."""
    data.ImageOrientationPatient = [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]][index]


def marked_scout(data: Any, index: int) -> None:
    data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def report(data: Any, index: int) -> None:
    data.Modality = "SR"
    for keyword in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "PixelData"):
        delattr(data, keyword)


def screenshot(data: Any, index: int) -> None:
    data.Modality = "OT"
    del data.ImagePositionPatient


def segmentation(data: Any, index: int) -> None:
    data.Modality = "SEG"


@pytest.mark.parametrize(
    ("each", "slices", "said"),
    [
        (scout, 3, "3 files, each of a series of one slice or of several directions, as localizers are"),
        (marked_scout, 2, "2 files, each a localizer"),
        (lambda data, index: None, 1, "1 file, of a series of one slice or of several directions, as localizers are"),
        (report, 1, r"1 file, no image \(SR\)"),
        (screenshot, 2, "2 files, each an image without a place in space"),
        (segmentation, 1, r"1 file, no image \(SEG\)"),
    ],
)
def test_what_lies_beside_a_series_is_left_out_and_said(tmp_path: Path, each: Each, slices: int, said: str) -> None:
    write_series(tmp_path, ramp(*GRID), OBLIQUE, uid="1.2.3.1")
    write_series(tmp_path / "more", ramp(7, 8, slices), OBLIQUE, uid="1.2.3.2", seed=1, each=each)
    found = dicom.cases(str(tmp_path))
    assert re.fullmatch(f"1 DICOM series is taken, and beside it left out: {said}.", found.left_out)
    (case,) = found
    np.testing.assert_array_equal(case.image().array[0], ramp(*GRID))
    np.testing.assert_array_equal(read(tmp_path).array[0], ramp(*GRID))
    cases = open_cases(dicom.FORM, str(tmp_path), [IMAGE], VolumeSpec(intensity="stored"), None)
    assert cases.left_out == found.left_out
    (tmp_path / "list.csv").write_text("image\n.\n")
    assert case_list.cases(str(tmp_path / "list.csv")).left_out == f"Row 1 (image): {found.left_out}"
    assert not dicom.cases(str(write_series(tmp_path / "alone", ramp(*GRID), OBLIQUE))).left_out


def test_localizers_marked_in_the_series_of_the_slices(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        if index == 5:
            marked_scout(data, index)
            data.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    found = dicom.cases(str(write_series(tmp_path, ramp(*GRID), OBLIQUE, each=each)))
    assert found[0].image().grid == (4, 5, 5) and "1 file, a localizer" in found.left_out


def test_a_series_with_a_slice_without_place_is_not_left_out(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        if index == 2:
            del data.ImagePositionPatient

    write_series(tmp_path / "whole", ramp(*GRID), OBLIQUE)
    with pytest.raises(DataError, match="has no ImagePositionPatient"):
        dicom.cases(str(write_series(tmp_path, ramp(*GRID), OBLIQUE, each=each, seed=1)))


@pytest.mark.parametrize("each", [report, marked_scout])
def test_a_folder_of_nothing_but_reports_or_localizers(tmp_path: Path, each: Each) -> None:
    with pytest.raises(DataError, match=r"no DICOM series that is a volume \(2 files, each (no image|a localizer)"):
        dicom.cases(str(write_series(tmp_path, ramp(4, 5, 2), OBLIQUE, each=each)))


def test_one_slice_is_refused(tmp_path: Path) -> None:
    refused(write_series(tmp_path, ramp(4, 5, 1), OBLIQUE), "it has one slice")


def test_several_modalities_are_refused(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        data.Modality = "CT"

    write_series(tmp_path / "mr", ramp(*GRID), OBLIQUE)
    write_series(tmp_path / "ct", ramp(*GRID), OBLIQUE, each=each)
    with pytest.raises(DataError, match="series of CT and MR"):
        dicom.cases(str(tmp_path))


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_a_slice_without_a_place_is_refused(tmp_path: Path, keyword: str) -> None:
    def each(data: Any, index: int) -> None:
        delattr(data, keyword)

    with pytest.raises(DataError, match=f"has no {keyword}"):
        dicom.cases(str(write_series(tmp_path, ramp(*GRID), OBLIQUE, each=each)))


def test_a_table_of_values_is_refused(tmp_path: Path) -> None:
    def each(data: Any, index: int) -> None:
        table = pydicom.Dataset()
        table.LUTDescriptor, table.LUTData = [2, 0, 16], [0, 5]
        table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
        data.ModalityLUTSequence = [table]

    with pytest.raises(DataError, match="ModalityLUTSequence"):
        dicom.cases(str(write_series(tmp_path, ramp(*GRID), OBLIQUE, each=each)))


def test_enhanced_frames_have_places_and_rescaling_of_their_own(tmp_path: Path) -> None:
    order = write_enhanced(tmp_path / "enhanced.dcm", write_series(tmp_path / "plain", ramp(*GRID), OBLIQUE))
    assert order != sorted(order)
    expected = ramp(*GRID) * 2.0
    expected[:, :, order] += np.arange(len(order))
    volume = read(tmp_path / "enhanced.dcm")
    np.testing.assert_array_equal(volume.array[0], expected)
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-6)
