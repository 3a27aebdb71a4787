"""NRRD and MetaImage: text headers before raw, gzip, zlib or bzip2 data, in one file or in two.

header lines -> sizes, type, place -> data, the first axis fastest. Lines that are not known are not kept.

Source: https://teem.sourceforge.net/nrrd/format.html ; MetaIO's documentation, and ITK for what it leaves open (rows of
TransformMatrix are the axes' directions; both formats count in LPS unless NRRD's `space` says otherwise).
`tools/peer_simpleitk.py` holds this reader to SimpleITK.
"""

from __future__ import annotations

import bz2
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib_data.validation import Array, DataError
from calib_data.volume import Affine, Volume, require_size
from calib_data.volumes.files import ENDINGS, form_of_files

MOST_HEADER = 1 << 20  # bytes
_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "met_char"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t", "met_uchar"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t", "met_short"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t", "met_ushort"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "met_int"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t", "met_uint"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "signed long long int"), "i8"),
    **dict.fromkeys(("int64", "int64_t", "met_long_long"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int"), "u8"),
    **dict.fromkeys(("uint64", "uint64_t", "met_ulong_long"), "u8"),
    **dict.fromkeys(("float", "met_float"), "f4"),
    **dict.fromkeys(("double", "met_double"), "f8"),
}
_NO_CHANNELS = ("complex", "matrix", "quaternion")  # kinds of an axis whose values are parts of one
_SPACES = {  # name -> signs that make RAS of it
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1, -1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (1, 1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1, 1, 1)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What a header says; `sizes` with the fastest axis first, `channel_axis` None where there is none."""

    sizes: tuple[int, ...]
    dtype: np.dtype[np.generic]
    affine: Affine
    channel_axis: int | None
    encoding: str
    data: Path
    start: int  # byte at which the data begin; -1: they are the end of the file


def read(path: Path) -> Volume:
    """The image of a file.

    Raises:
        DataError: the header is not understood, or the data are not as long as it says.
    """
    header = _header(path)
    array = _values(header).reshape(header.sizes, order="F")
    channels = array[..., None] if header.channel_axis is None else np.moveaxis(array, header.channel_axis, -1)
    if channels.ndim != 4:
        raise DataError(f"it has the sizes {header.sizes}; three axes of space, and one of channels, are needed.")
    return Volume(array=np.moveaxis(channels, -1, 0), affine=header.affine)


def affine_of(path: Path) -> Affine:
    """Where the image lies, by its header."""
    return _header(path).affine


def _header(path: Path) -> _Header:
    with path.open("rb") as file:
        text = file.read(MOST_HEADER)
    meta = path.name.lower().endswith(ENDINGS["MetaImage"])
    return _metaimage(path, text) if meta else _nrrd(path, text)


def _nrrd(path: Path, text: bytes) -> _Header:
    end = min((at + 2 * n for n, at in ((1, text.find(b"\n\n")), (2, text.find(b"\r\n\r\n"))) if at >= 0), default=-1)
    if not text.startswith(b"NRRD") or (end < 0 and not path.name.lower().endswith(".nhdr")):
        raise DataError("its NRRD header does not begin with NRRD, or has no end.")
    lines = text[: end if end >= 0 else None].decode("latin-1").splitlines()[1:]
    fields = dict(line.split(": ", 1) for line in lines if ": " in line and ":=" not in line and line[0] != "#")
    given = {key.strip().lower(): value.strip() for key, value in fields.items()}
    sizes = tuple(map(int, _need(given, "sizes").split()))
    space = given.get("space", "").lower()
    if space not in _SPACES:
        raise DataError(f"its header has no space that is known ({' or '.join(_SPACES)}), so no place.")
    directions = [None if d == "none" else _vector(d) for d in _need(given, "space directions").split()]
    axes = [d for d in directions if d is not None]
    if len(axes) != 3 or len(directions) != len(sizes) or len(sizes) > 4:
        raise DataError(f"its header has {len(axes)} directions in space for {len(sizes)} axes; three are needed.")
    kinds = given.get("kinds", "").split()
    if other := next((kind for kind in kinds if any(part in kind.lower() for part in _NO_CHANNELS)), ""):
        raise DataError(f"its values are of kind {other[:40]}; real numbers, or channels of them, are needed.")
    skip = int(given.get("byte skip", "0"))
    if int(given.get("line skip", "0")) or (skip and skip != -1):
        raise DataError("its header skips lines or bytes of the data, which is not read. Write it without.")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.array(axes).T, _vector(given.get("space origin", "(0,0,0)"))
    inside = next((given[key] for key in ("data file", "datafile") if key in given), "")
    return _Header(
        sizes=sizes,
        dtype=_dtype(_need(given, "type"), big=given.get("endian", "little").lower() == "big"),
        affine=np.diag([*_SPACES[space], 1.0]) @ affine,
        channel_axis=directions.index(None) if None in directions else None,
        encoding={"gz": "gzip", "bz2": "bzip2"}.get(e := _need(given, "encoding").lower(), e),
        data=_beside(path, inside),
        start=-1 if skip == -1 else 0 if inside else end,
    )


def _metaimage(path: Path, text: bytes) -> _Header:
    lines, at = [], 0
    while (end := text.find(b"\n", at)) >= 0:
        lines.append(text[at:end].decode("latin-1").partition("="))
        at = end + 1
        if lines[-1][0].strip().lower() == "elementdatafile":
            break
    given = {key.strip().lower(): value.strip() for key, _, value in lines}
    inside = _need(given, "elementdatafile")
    sizes = tuple(map(int, _need(given, "dimsize").split()))
    if len(sizes) != 3:
        raise DataError(f"it has {len(sizes)} axes; three are needed.")
    if given.get("binarydata", "true").lower() != "true" or int(given.get("headersize", "0")):
        raise DataError("its data are text or begin after a header of their own, which is not read.")
    channels = int(given.get("elementnumberofchannels", "1"))
    spacing = np.array(_need(given, "elementspacing").split(), np.float64)
    matrix = next((given[k] for k in ("transformmatrix", "rotation", "orientation") if k in given), "")
    offset = next((given[k] for k in ("offset", "position", "origin") if k in given), "")
    if not matrix or not offset:
        raise DataError("its header has no TransformMatrix or no Offset, so no place. Write it with both.")
    affine = np.eye(4)
    affine[:3, :3] = np.array(matrix.split(), np.float64).reshape(3, 3).T * spacing
    affine[:3, 3] = np.array(offset.split(), np.float64)
    big = next((given[k] for k in ("binarydatabyteordermsb", "elementbyteordermsb") if k in given), "false")
    return _Header(
        sizes=(channels, *sizes) if channels > 1 else sizes,
        dtype=_dtype(_need(given, "elementtype"), big=big.lower() == "true"),
        affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine,
        channel_axis=0 if channels > 1 else None,
        encoding="zlib" if given.get("compresseddata", "false").lower() == "true" else "raw",
        data=path if inside.lower() == "local" else _beside(path, inside),
        start=at if inside.lower() == "local" else 0,
    )


def _values(header: _Header) -> Array:
    """All values, as long as the header says."""
    require_size(header.sizes)
    wanted = math.prod(header.sizes) * header.dtype.itemsize
    if min(header.sizes) < 1:
        raise DataError(f"it has the sizes {header.sizes}; at least one voxel is needed.")
    with header.data.open("rb") as file:
        if header.start < 0:
            file.seek(-wanted, 2)
        else:
            file.seek(header.start)
        if header.encoding == "raw":
            data = file.read(wanted)
        elif header.encoding in ("gzip", "zlib"):  # 32: either header
            data = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(file.read(), wanted)
        elif header.encoding == "bzip2":
            data = bz2.BZ2Decompressor().decompress(file.read(), wanted)
        else:
            raise DataError(
                "its data are encoded as text, or in a way that is not known; raw, gzip and bzip2 are read."
            )
    if len(data) != wanted:
        raise DataError(f"its data end {wanted - len(data)} bytes early. Write the file again.")
    return np.frombuffer(data, header.dtype).astype(header.dtype.newbyteorder("="), copy=False)


def _need(given: Mapping[str, str], key: str) -> str:
    if key not in given:
        raise DataError(f"its header has no line {key!r}. Write the file again.")
    return given[key]


def _dtype(name: str, *, big: bool) -> np.dtype[np.generic]:
    if name.lower() not in _TYPES:
        raise DataError("its header names a type of values that is not known.")
    return np.dtype((">" if big else "<") + _TYPES[name.lower()])


def _vector(text: str) -> list[float]:
    return [float(part) for part in text.strip("()").split(",")]


def _beside(path: Path, name: str) -> Path:
    """The file of the data; it must lie in the header's folder."""
    if not name:
        return path
    if name != Path(name).name:
        raise DataError("its data lie in another folder or in several files. Put header and data into one folder.")
    return path.with_name(name)


KINDS = ("NRRD", "MetaImage")
FORM = form_of_files("NRRD or MetaImage files", KINDS, read, affine_of)
