"""NIfTI images: a file, or a folder of files (`calib_data.volumes.files`).

The first three axes are space; further ones are channels. Nothing of the header but geometry and scaling is used.

Source: nibabel (sform before qform; `x = raw * slope + inter`).
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np

from calib_data.extras import need
from calib_data.validation import DataError
from calib_data.volume import Affine, Volume, orientation_of, require_size
from calib_data.volumes.files import form_of_files

SLACK = 1 << 20  # bytes behind the last voxel that are not asked about


def affine_of(path: Path) -> Affine:
    """Where the image lies, by its header.

    Raises:
        DataError: the header does not say.
    """
    return _affine(_opened(path))


def read(path: Path) -> Volume:
    """The image of a file.

    Raises:
        DataError: it has no place in space, or values that are no real numbers.
    """
    image = _opened(path)
    affine = _affine(image)
    require_size(image.shape)
    array = np.asanyarray(image.dataobj)
    _check_gzip(path, most=int(image.dataobj.offset) + math.prod(image.shape) * image.get_data_dtype().itemsize + SLACK)
    if array.dtype.kind not in "biuf":
        raise DataError(f"its voxels are {array.dtype.name}; real numbers are needed. Split colours into channels.")
    if (image.dataobj.slope, image.dataobj.inter) != (1, 0):
        array = array.astype(np.float32)
    if array.ndim < 3:
        array = array.reshape(*array.shape, *[1] * (3 - array.ndim))
    array = array.reshape(*array.shape[:3], -1)
    return Volume(array=np.moveaxis(array, 3, 0), affine=affine)


def _opened(path: Path) -> Any:
    nibabel = need("nibabel", install="qdq[medical]", for_what="A NIfTI image")
    return nibabel.load(path)


def _affine(image: Any) -> Affine:
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        raise DataError(
            "its header says nowhere in which direction its axes run (sform and qform have code 0): readers guess, and "
            "their guesses mirror each other. Set it: image.set_sform(affine, code=1) in nibabel."
        )
    if int(image.header["sform_code"]) and int(image.header["qform_code"]):
        ways = [orientation_of(form) for form in (image.get_sform(), image.get_qform())]
        if ways[0] != ways[1]:
            raise DataError(
                f"its header says twice in which direction its axes run, sform {ways[0]} and qform {ways[1]}: some "
                "readers take the one, some the other, so the image may be mirrored. Set the wrong one's code to 0: "
                "image.set_qform(None, code=0) in nibabel."
            )
    return np.asarray(image.affine, np.float64)


def _check_gzip(path: Path, most: int) -> None:
    """Read on to the end, where the checksum stands: who stops behind the last voxel never compares it.

    Raises:
        DataError: it goes on for more than `most` bytes; a few compressed ones may stand for any number.
    """
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return
    with gzip.open(path) as stream:
        while piece := stream.read(1 << 20):
            most -= len(piece)
            if most < 0:
                raise DataError("it holds more data than its header says. Write the file again.")


KINDS = ("NIfTI",)
FORM = form_of_files("a NIfTI file or a folder of them (nnU-Net's imagesTr too)", KINDS, read, affine_of)
