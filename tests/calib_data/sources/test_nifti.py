"""NIfTI images: values and places are nibabel's; nnU-Net's folders; what a header leaves open is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from image_files import OBLIQUE, ramp, write_nifti

from calib_data import DataError
from calib_data.sources import ImageForm, form_of
from calib_data.volumes.case import Case, keyed, told

nibabel = pytest.importorskip("nibabel", reason="pip install 'qdq[medical]'")


def cases(source: Path) -> list[Case]:
    form = form_of(str(source))
    assert isinstance(form, ImageForm)
    return keyed(form.cases(str(source)))


def refused(source: Path, words: str) -> None:
    (case,) = cases(source)
    with pytest.raises(DataError, match=words) as caught, told(case.where):
        case.image()
    assert source.name not in str(caught.value)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII"])
def test_values_dtype_and_place_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    (case,) = cases(write_nifti(tmp_path / name, ramp(4, 5, 6), OBLIQUE))
    volume = case.image()
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array[0], ramp(4, 5, 6))
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-6)  # the header holds float32
    np.testing.assert_array_equal(case.affine(), volume.affine)


@pytest.mark.parametrize(("slope", "inter"), [(0.5, -1024.0), (1.0, -1024.0), (2.0, 0.0)])
def test_scaled_values_become_float32(tmp_path: Path, slope: float, inter: float) -> None:
    image = nibabel.Nifti1Image(ramp(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(slope, inter)
    path = write_nifti(tmp_path / "a.nii", ramp(2, 3, 4))
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([slope, inter], "<f4").tobytes()
    path.write_bytes(raw)
    volume = cases(path)[0].image()
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0], (ramp(2, 3, 4) * slope + inter).astype(np.float32))


def test_a_fourth_axis_is_channels(tmp_path: Path) -> None:
    volume = cases(write_nifti(tmp_path / "a.nii", ramp(2, 3, 4, 5)))[0].image()
    np.testing.assert_array_equal(volume.array, np.moveaxis(ramp(2, 3, 4, 5), 3, 0))


def test_nnunets_channels_and_labels(tmp_path: Path) -> None:
    for case in ("b", "a"):
        for channel in (1, 0):
            write_nifti(tmp_path / f"imagesTr/{case}_{channel:04d}.nii.gz", ramp(2, 3, 4) + channel)
        write_nifti(tmp_path / f"labelsTr/{case}.nii.gz", ramp(2, 3, 4, dtype="uint8"))
    for source in (tmp_path, tmp_path / "imagesTr"):
        found = cases(source)
        assert [case.name for case in found] == ["a", "b"]
        assert [case.where.split(" (")[0] for case in found] == ["case 1 of 2", "case 2 of 2"]
        np.testing.assert_array_equal(found[0].image().array, [ramp(2, 3, 4), ramp(2, 3, 4) + 1])
        assert found[0].label is not None
        np.testing.assert_array_equal(found[0].label().array[0], ramp(2, 3, 4))


def test_channels_with_a_gap_or_on_other_grids_are_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "one/x_0000.nii", ramp(2, 3, 4))
    write_nifti(tmp_path / "one/x_0002.nii", ramp(2, 3, 4))
    with pytest.raises(DataError, match=r"numbered \[0, 2\]"):
        cases(tmp_path / "one")
    write_nifti(tmp_path / "two/x_0000.nii", ramp(2, 3, 4))
    write_nifti(tmp_path / "two/x_0001.nii", ramp(2, 3, 4), np.diag([1, 1, 2, 1.0]))
    (case,) = cases(tmp_path / "two")
    with pytest.raises(DataError, match=r"image 2 of it lies on another grid .* 1 x 1 x 2 mm"):
        case.image()


def test_several_kinds_of_images_are_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", ramp(2, 3, 4))
    (tmp_path / "b.mha").write_bytes(b"")
    with pytest.raises(DataError, match="NIfTI files and MetaImage files"):
        cases(tmp_path)


def test_a_header_without_codes_is_refused(tmp_path: Path) -> None:
    refused(write_nifti(tmp_path / "a.nii", ramp(4, 5, 6), np.diag([2, 2, 3, 1.0]), codes=0), "code 0")


def test_damaged_files_are_refused_without_a_name(tmp_path: Path) -> None:
    whole = gzip.compress(write_nifti(tmp_path / "w.nii", ramp(20, 20, 20)).read_bytes())
    (tmp_path / "doe_john.nii.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "doe_john.nii.gz", "end early or are damaged")
    (tmp_path / "doe_john.nii").write_bytes(b"\0" * 1000)
    refused(tmp_path / "doe_john.nii", "damaged, or of a form that is not known")
    (tmp_path / "doe.nii").write_bytes((tmp_path / "w.nii").read_bytes()[:5000])
    refused(tmp_path / "doe.nii", "damaged")


def test_colours_are_refused(tmp_path: Path) -> None:
    rgb = np.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(write_nifti(tmp_path / "a.nii", rgb), "real numbers are needed")


def test_a_header_of_terabytes_is_refused_before_they_are_asked_for(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", ramp(2, 3, 4))
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(raw)
    refused(path, "30000x30000x30000 values by its header; at most")


def test_forms_that_mirror_each_other_are_refused_and_finer_ones_are_not(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(ramp(4, 5, 6), np.eye(4))
    image.set_sform(np.diag([-1, 1, 1, 1]), code=1)
    image.set_qform(np.eye(4), code=1)
    nibabel.save(image, tmp_path / "a.nii")
    refused(tmp_path / "a.nii", "twice .* sform LAS and qform RAS")
    image.set_sform(np.array([[1, 0.1, 0, 3], [-0.1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), code=4)
    nibabel.save(image, tmp_path / "b.nii")  # as a registration leaves it
    np.testing.assert_allclose(cases(tmp_path / "b.nii")[0].affine(), image.get_sform())


def test_a_gzip_whose_checksum_is_wrong_or_cut_off_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(write_nifti(tmp_path / "w.nii", ramp(20, 20, 20)).read_bytes())
    for n, data in enumerate((whole[:-4], whole[:-8] + b"\0" * 8)):
        (tmp_path / f"{n}.nii.gz").write_bytes(data)
        refused(tmp_path / f"{n}.nii.gz", "its data end early or are damaged")
