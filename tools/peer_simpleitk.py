"""Hold the reader of NRRD and MetaImage to files that SimpleITK writes, and to some that it reads and cannot write.

    python tools/peer_simpleitk.py

Needs SimpleITK beside qdq, which qdq itself does not. Every type of values, compressed or not, in one file or in two,
one channel or two, thick voxels on a turned grid, a mirrored one, and the same with bytes in the other order (turned by
hand in the file). A file counts as read where values and type are the same and the affine is within 1e-6; what we do
not read must be refused. Prints a row for each group, and ends with 1 where any file is neither.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as itk

from calib_data.sources import nrrd
from calib_data.validation import DataError

TYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
SHAPE, SPACING, ORIGIN = (7, 6, 5), (0.7, 0.9, 3.1), (-31.5, 12.25, 40.125)
NEAR = 1e-6


def directions() -> dict[str, np.ndarray]:
    """The identity, a rotation about an axis of no symmetry, and that mirrored."""
    axis = np.array([1.0, -2.0, 0.5]) / np.linalg.norm([1.0, -2.0, 0.5])
    cross = np.cross(np.eye(3), axis)
    turned = np.eye(3) + np.sin(0.6) * cross + (1 - np.cos(0.6)) * cross @ cross
    return {"straight": np.eye(3), "turned": turned, "mirrored": turned @ np.diag([-1.0, 1.0, 1.0])}


def image_of(dtype: str, channels: int, direction: np.ndarray, shape: tuple[int, ...] = SHAPE) -> Any:
    """Values over the whole range of a type."""
    sizes = (*shape, channels) if channels > 1 else shape
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
    rng = np.random.default_rng(0)
    values = rng.integers(limits.min, limits.max, sizes, dtype, endpoint=True) if limits else rng.normal(size=sizes)
    image = itk.GetImageFromArray(values.astype(dtype), isVector=channels > 1)
    if len(shape) == 3:
        image.SetSpacing(SPACING)
        image.SetOrigin(ORIGIN)
        image.SetDirection(direction.ravel().tolist())
    return image


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Group and file."""
    number = 0
    for ending in (".nrrd", ".nhdr", ".mha", ".mhd"):
        for compressed in (False, True):
            for way, direction in directions().items():
                for dtype in TYPES:
                    for channels in (1, 2):
                        number += 1
                        path = folder / f"{number}{ending}"
                        itk.WriteImage(image_of(dtype, channels, direction), str(path), useCompression=compressed)
                        yield f"{ending}, {'compressed' if compressed else 'raw'}, {way}", path
    for ending, old, new in (
        (".nrrd", b"endian: little", b"endian: big"),
        (".mha", b"BinaryDataByteOrderMSB = False", b"BinaryDataByteOrderMSB = True"),
    ):
        for dtype in ("int16", "float32"):
            path = folder / f"big-{dtype}{ending}"
            itk.WriteImage(image_of(dtype, 1, directions()["turned"]), str(path), useCompression=False)
            data = path.read_bytes()
            pixels = np.dtype(dtype).itemsize * int(np.prod(SHAPE))
            head, body = data[:-pixels].replace(old, new), np.frombuffer(data[-pixels:], dtype).byteswap().tobytes()
            path.write_bytes(head + body)
            yield f"{ending}, big-endian", path
    path = folder / "text.nrrd"
    itk.WriteImage(image_of("int16", 1, np.eye(3)), str(path), useCompression=False)
    data, pixels = path.read_bytes(), 2 * int(np.prod(SHAPE))
    text = " ".join(map(str, np.frombuffer(data[-pixels:], "int16"))).encode()
    path.write_bytes(data[:-pixels].replace(b"encoding: raw", b"encoding: ascii") + text)
    yield ".nrrd, as text", path
    for ending in (".nrrd", ".mha"):
        for shape, name in (((6, 5), "2 axes"), ((3, 7, 6, 5), "4 axes")):
            path = folder / f"{len(shape)}{ending}"
            itk.WriteImage(image_of("int16", 1, np.eye(3), shape), str(path))
            yield f"{ending}, {name}", path
        path = folder / f"complex{ending}"
        whole = image_of("float32", 1, np.eye(3))
        itk.WriteImage(itk.RealAndImaginaryToComplex(whole, whole), str(path))
        yield f"{ending}, complex numbers", path


def difference(path: Path) -> str:
    """What is otherwise than SimpleITK has it, "" where nothing is; "refused" with why."""
    theirs = itk.ReadImage(str(path))
    try:
        ours = nrrd.read(path)
    except DataError as error:
        return f"refused: {error}"
    array = itk.GetArrayFromImage(theirs)
    array = np.moveaxis(array, -1, 0) if theirs.GetNumberOfComponentsPerPixel() > 1 else array[None]
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(theirs.GetDirection(), (3, 3)) * theirs.GetSpacing()
    affine[:3, 3] = theirs.GetOrigin()
    if ours.array.dtype != array.dtype or not np.array_equal(ours.array, array.transpose(0, 3, 2, 1)):
        return "values differ"
    apart = float(np.abs(ours.affine - np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine).max())
    return "" if apart <= NEAR else f"place differs by {apart:.3g}"


def main() -> int:
    """Compare, print, and say whether all is as it should be."""
    groups: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for group, path in files(Path(folder)):
            groups[group].append(difference(path))
    print(f"SimpleITK {itk.Version().VersionString()}")
    for group, found in groups.items():
        same, others = found.count(""), sorted({f for f in found if f})
        print(f"{group}: {same} of {len(found)} alike{''.join(f'; {other}' for other in others)}")
    return int(any(f and not f.startswith("refused") for found in groups.values() for f in found))


if __name__ == "__main__":
    sys.exit(main())
