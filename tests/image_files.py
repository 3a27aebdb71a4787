"""Images that tests write: NIfTI, NRRD and MetaImage files, DICOM series."""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OBLIQUE = np.array([[-0.8, -0.1, 0, 20], [0.1, -0.8, 0, -30], [0, 0, 2.5, 10], [0, 0, 0, 1.0]])


def ramp(*grid: int, dtype: str = "int16") -> np.ndarray:
    """Values that are all different, as far as the dtype goes."""
    return np.arange(np.prod(grid)).reshape(grid).astype(dtype)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None, *, codes: int = 1) -> Path:
    """An image with the sform's and qform's code."""
    import nibabel

    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, code=codes)
    image.set_qform(image.affine, code=codes)
    if not codes:
        image.header.set_zooms(np.abs(np.linalg.norm(image.affine[:3, :3], axis=0)))
    path.parent.mkdir(exist_ok=True, parents=True)
    nibabel.save(image, path)
    return path


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    seed: int = 0,
    each: Callable[[Any, int], None] = lambda slice_, index: None,
    uid: str = "",
    syntax: str = "1.2.840.10008.1.2.1",
) -> Path:
    """A DICOM series of (column, row, slice), a file a slice, with names that say nothing of their order.

    `each` changes a slice's data set before it is written; `affine` is in RAS+ millimetres.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, MRImageStorage, generate_uid

    folder.mkdir(exist_ok=True, parents=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    series = uid or generate_uid()
    names = np.random.default_rng(seed).permutation(array.shape[2])
    for index in range(array.shape[2]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1")
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = MRImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.SeriesInstanceUID, data.Modality = series, "MR"
        data.Rows, data.Columns = array.shape[1], array.shape[0]
        data.PixelSpacing = [f"{spacing[1]:.10g}", f"{spacing[0]:.10g}"]
        data.ImageOrientationPatient = [f"{v:.10g}" for n in (0, 1) for v in lps[:3, n] / spacing[n]]
        data.ImagePositionPatient = [f"{v:.10g}" for v in (lps @ [0, 0, index, 1])[:3]]
        data.InstanceNumber = int(names[index])
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        bits = array.dtype.itemsize * 8
        data.BitsAllocated = data.BitsStored = bits
        data.HighBit, data.PixelRepresentation = bits - 1, int(array.dtype.kind == "i")
        pixels = np.ascontiguousarray(array[:, :, index].T)
        data.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
        data["PixelData"].VR = "OB" if bits == 8 else "OW"
        each(data, index)
        if syntax != "1.2.840.10008.1.2.1":
            data.compress(syntax, generate_instance_uid=False)
        data.save_as(folder / f"file{names[index]:04d}{seed}", enforce_file_format=True)
    return folder


def write_enhanced(path: Path, folder: Path) -> list[int]:
    """One file of the slices of a series in the order of their names; values twice theirs plus the frame's number.

    Returns which slice along its normal each frame is.
    """
    from pydicom import Dataset, dcmread
    from pydicom.uid import EnhancedMRImageStorage

    slices = [dcmread(file) for file in sorted(folder.iterdir())]
    whole, frames = slices[0], []
    for number, one in enumerate(slices):
        frame = Dataset()
        for sequence, keyword in (
            ("PlanePositionSequence", "ImagePositionPatient"),
            ("PlaneOrientationSequence", "ImageOrientationPatient"),
        ):
            inside = Dataset()
            setattr(inside, keyword, getattr(one, keyword))
            setattr(frame, sequence, [inside])
        value = Dataset()
        value.RescaleSlope, value.RescaleIntercept = 2, number
        frame.PixelValueTransformationSequence = [value]
        frames.append(frame)
    way = np.cross(*np.array(whole.ImageOrientationPatient, float).reshape(2, 3))
    order = np.argsort(np.argsort([way @ np.array(one.ImagePositionPatient, float) for one in slices]))
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = whole.PixelSpacing
    shared.PixelMeasuresSequence = [measures]
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = [shared], frames
    pixels = b"".join(one.PixelData for one in slices)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(whole, keyword)
    whole.NumberOfFrames, whole.PixelData = len(slices), pixels
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    whole.save_as(path, enforce_file_format=True)
    return [int(n) for n in order]


LPS = np.diag([-1.0, -1.0, 1.0, 1.0]) @ OBLIQUE
PACK = {"raw": bytes, "gzip": gzip.compress, "bzip2": bz2.compress}


def vector(values: np.ndarray) -> str:
    return "(" + ",".join(f"{v:.17g}" for v in values) + ")"


def write_nrrd(path: Path, array: np.ndarray, *, encoding: str = "raw", big: bool = False, data: str = "") -> Path:
    """An image (i, j, k), or (channels, i, j, k), in LPS; `data` is the name of a second file."""
    axes = " ".join(vector(LPS[:3, n]) for n in range(3))
    channels = array.ndim == 4
    lines = [
        "NRRD0005",
        "# a remark",
        f"type: {array.dtype.name.replace('float32', 'float')}",
        f"dimension: {array.ndim}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, array.shape))}",
        f"kinds: {'vector ' if channels else ''}domain domain domain",
        f"space directions: {'none ' if channels else ''}{axes}",
        f"endian: {'big' if big else 'little'}",
        f"encoding: {encoding}",
        f"space origin: {vector(LPS[:3, 3])}",
        "patient:=Doe",
        *([f"data file: {data}"] if data else []),
    ]
    pixels = array.astype(array.dtype.newbyteorder(">" if big else "<")).tobytes(order="F")
    packed = PACK[encoding](pixels)
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + (b"" if data else packed))
    if data:
        path.with_name(data).write_bytes(packed)
    return path


def write_mha(path: Path, array: np.ndarray, *, compressed: bool = False, big: bool = False, data: str = "") -> Path:
    """An image (i, j, k), or (channels, i, j, k)."""
    spacing = np.linalg.norm(LPS[:3, :3], axis=0)
    matrix = (LPS[:3, :3] / spacing).T.ravel()
    kind = {"int16": "MET_SHORT", "uint8": "MET_UCHAR", "float32": "MET_FLOAT"}[array.dtype.name]
    pixels = array.astype(array.dtype.newbyteorder(">" if big else "<")).tobytes(order="F")
    packed = zlib.compress(pixels) if compressed else pixels
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        f"BinaryDataByteOrderMSB = {big}",
        f"CompressedData = {compressed}",
        *([f"CompressedDataSize = {len(packed)}"] if compressed else []),
        f"TransformMatrix = {' '.join(f'{v:.17g}' for v in matrix)}",
        f"Offset = {' '.join(f'{v:.17g}' for v in LPS[:3, 3])}",
        f"ElementSpacing = {' '.join(f'{v:.17g}' for v in spacing)}",
        f"DimSize = {' '.join(map(str, array.shape[-3:]))}",
        *([f"ElementNumberOfChannels = {len(array)}"] if array.ndim == 4 else []),
        f"ElementType = {kind}",
        f"ElementDataFile = {data or 'LOCAL'}",
    ]
    path.write_bytes("\n".join(lines).encode() + b"\n" + (b"" if data else packed))
    if data:
        path.with_name(data).write_bytes(packed)
    return path
