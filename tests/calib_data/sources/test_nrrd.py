"""NRRD and MetaImage: raw and compressed, either byte order, channels, data apart; places as SimpleITK's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import OBLIQUE, ramp, write_mha, write_nrrd

from calib_data import DataError
from calib_data.sources import form_of, nrrd
from calib_data.volumes.case import told


def written(folder: Path) -> list[tuple[Path, np.ndarray]]:
    """Files of every form, with the channels that they hold."""
    grid = ramp(4, 5, 6)
    many = np.stack([grid, grid + 1])
    return [
        (write_nrrd(folder / "a.nrrd", grid), grid[None]),
        (write_nrrd(folder / "b.nrrd", grid, encoding="gzip", big=True), grid[None]),
        (write_nrrd(folder / "c.nrrd", many, encoding="gzip"), many),
        (write_nrrd(folder / "e.nrrd", grid, encoding="bzip2"), grid[None]),
        (write_nrrd(folder / "d.nhdr", grid.astype("float32"), encoding="gzip", data="d.raw.gz"), grid[None]),
        (write_mha(folder / "a.mha", grid), grid[None]),
        (write_mha(folder / "b.mha", grid.astype("float32"), compressed=True), grid[None]),
        (write_mha(folder / "c.mha", many, big=True), many),
        (write_mha(folder / "d.mhd", grid.astype("uint8"), compressed=True, data="d.zraw"), grid[None]),
    ]


def test_values_and_places(tmp_path: Path) -> None:
    for path, expected in written(tmp_path):
        volume = nrrd.read(path)
        np.testing.assert_array_equal(volume.array, expected, err_msg=path.name)
        np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-12)
        np.testing.assert_array_equal(nrrd.affine_of(path), volume.affine)
        assert volume.array.dtype.isnative and form_of(str(path)) is nrrd.FORM


def test_as_simpleitk_reads_them(tmp_path: Path) -> None:
    itk = pytest.importorskip("SimpleITK", reason="pip install SimpleITK")
    for path, expected in (pair for pair in written(tmp_path) if pair[0].name != "e.nrrd"):  # it reads no bzip2
        image = itk.ReadImage(str(path))
        array = itk.GetArrayFromImage(image)
        array = array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
        np.testing.assert_array_equal(array.transpose(0, 3, 2, 1), expected, err_msg=path.name)
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        np.testing.assert_allclose(nrrd.affine_of(path), np.diag([-1, -1, 1, 1]) @ affine, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("signed short int", "int16"),
        ("unsigned short int", "uint16"),
        ("long long int", "int64"),
        ("ulonglong", "uint64"),
    ],
)
def test_names_of_types(tmp_path: Path, name: str, dtype: str) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", ramp(4, 5, 6, dtype=dtype))
    path.write_bytes(path.read_bytes().replace(f"type: {dtype}".encode(), f"type: {name}".encode()))
    found = nrrd.read(path).array
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[0], ramp(4, 5, 6))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"NRRD0005", b"NOPE0005", "does not begin with NRRD"),
        (b"space: left-posterior-superior", b"space: scanner-xyz", "no space that is known"),
        (b"encoding: raw", b"encoding: hex", "encoded as text"),
        (b"kinds: domain", b"kinds: 3D-matrix", "values are of kind 3D-matrix"),
        (b"type: int16", b"type: block", "type of values that is not known"),
        (b"sizes: 4 5 6", b"sizes: 4 5 7", "end 40 bytes early"),
        (b"sizes: 4 5 6", b"sizes: 4 5 six", "damaged"),
        (b"sizes: 4 5 6", b"sizes: 4 0 6", "at least one voxel"),
        (b"encoding: raw", b"encoding: raw\nline skip: 2", "skips lines"),
        (b"encoding: raw", b"encoding: raw\ndata file: ../x.raw", "in another folder"),
        (b"encoding: raw\n", b"", "no line 'encoding'"),
    ],
)
def test_headers_that_are_wrong(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    path = write_nrrd(tmp_path / "a.nrrd", ramp(4, 5, 6))
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(DataError, match=words), told("case 1 of 1"):
        nrrd.read(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"NDims = 3\n", b"", ""),
        (b"Offset", b"Offsat", "no Offset, so no place"),
        (b"DimSize = 4 5 6", b"DimSize = 4 5", "2 axes"),
        (b"MET_SHORT", b"MET_STRING", "type of values"),
        (b"CompressedData = False", b"CompressedData = True", "damaged"),
    ],
)
def test_metaimage_headers_that_are_wrong(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    path = write_mha(tmp_path / "a.mha", ramp(4, 5, 6))
    path.write_bytes(path.read_bytes().replace(old, new))
    if not words:
        assert nrrd.read(path).grid == (4, 5, 6)  # a line that tells nothing
        return
    with pytest.raises(DataError, match=words), told("case 1 of 1"):
        nrrd.read(path)
