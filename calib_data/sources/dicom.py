"""DICOM images: a folder with one or many series, also in folders inside it; each series is a case.

files -> headers of allowed tags -> slices by series -> one stack, ordered along its normal, its steps checked -> pixels
with the rescaling of each slice. What libraries accept silently (a missing slice, a tilted gantry) is refused; what
lies beside the series in every study (localizers, screenshots, reports) is left out, and that is said.
It must not read a tag that is not in `TAGS`.

Source: DICOM PS3.3 C.7.6.2 (image plane), C.7.6.16 (multi-frame functional groups); pydicom.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from calib_data.extras import need
from calib_data.sources import ImageForm
from calib_data.validation import Array, DataError
from calib_data.volume import Affine, Volume, require_size
from calib_data.volumes.case import Case, Cases, Origin, told
from calib_data.volumes.files import refuse_others

GEOMETRY = (
    "SeriesInstanceUID",  # groups slices; only its keyed hash is ever told
    "Modality",
    "ImageType",  # only whether it says LOCALIZER
    "Rows",
    "Columns",
    "NumberOfFrames",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PhotometricInterpretation",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "PerFrameFunctionalGroupsSequence",
    "SharedFunctionalGroupsSequence",
)
PIXELS = (
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PlanarConfiguration",
    "PixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
TAGS = (*GEOMETRY, *PIXELS)
"""All that is read of a file, with its transfer syntax."""

MODALITIES = "CT MR PT NM US CR DX MG XA RF OT OPT SEG SR PR RTDOSE RTIMAGE RTSTRUCT"  # that are told
BESIDE = ("SEG", "RTDOSE")  # grids, but made of images
PHYSICAL = ("CT", "PT")  # their values are measurements, which no display rule may turn round
STEP_SHARE, STEP_MM = 0.05, 0.1  # by how much steps between slices may differ: dicom2nifti's bounds
LOOKED_AT = 2000  # files, before a folder counts as one without DICOM
ROUNDING = 1e-4  # of directions and of spacings in mm, between slices of one stack
TILT_DEGREES = 1.0  # between the slices' normal and the way from the first to the last


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slice:
    """One frame: where it lies (LPS millimetres), and how its stored values become numbers."""

    path: Path
    frame: int
    size: tuple[int, int]
    position: npt.NDArray[np.float64]
    rows_cols: npt.NDArray[np.float64]  # (2, 3): directions in which columns and rows count up
    spacing: tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float


class _NoPlaneError(DataError):
    """A file is an image, but none that lies in space."""


class _Series(NamedTuple):
    """What lies in a folder: series -> its slices; what kinds of image they are; what was left out, in words."""

    slices: dict[str, list[_Slice]]
    modalities: set[str]
    left_out: str


def owns(source: str) -> bool:
    """Whether a text names a DICOM file, or a folder that holds one and no arrays."""
    path = Path(source)
    if path.is_file():
        return _is_dicom(path)
    if not path.is_dir() or any(p.suffix in (".npz", ".npy") for p in path.iterdir()):
        return False
    return any(p.is_file() and _is_dicom(p) for p in islice(path.rglob("*"), LOOKED_AT))


def cases(source: str) -> Cases:
    """Each series as a case; left out is what `_series` leaves out.

    Raises:
        DataError: a header cannot be read, or the series are of several modalities.
    """
    refuse_others(Path(source), "DICOM")
    found = _series(Path(source))
    if len(found.modalities) > 1:
        raise DataError(
            f"The folder of the samples holds DICOM series of {' and '.join(sorted(found.modalities))}: a model takes "
            "one. Give a folder for each."
        )
    made = Cases(
        Case(
            name=uid,
            image=partial(_volume, some),
            affine=partial(_affine_of, some),
            origins=(Origin(files=_paths(some), series=uid, slices=partial(_placed, some)),),
        )
        for uid, some in found.slices.items()
    )
    made.left_out = found.left_out
    return made


def _placed(slices: Sequence[_Slice]) -> tuple[list[tuple[Path, int]], float]:
    """File and frame of each slice along its normal, and their distance in mm."""
    ordered, step = _stack(slices)
    return [(s.path, s.frame) for s in ordered], float(np.linalg.norm(step))


def _paths(slices: Sequence[_Slice]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(s.path for s in slices))


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return path.name != "DICOMDIR" and file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _files(path: Path) -> Iterator[Path]:
    """The DICOM files at or below a path, in an order that changes nothing."""
    below = [path] if path.is_file() else sorted(path.rglob("*"))
    return (p for p in below if p.is_file() and not p.name.startswith(".") and _is_dicom(p))


def _series(path: Path) -> _Series:
    """The series of a folder that are volumes, as far as headers tell.

    Left out are files without pixels or made of images (reports, segmentations), those that are marked as localizers,
    series without a place (screenshots, films), and beside a stack those of one slice or several directions.

    Raises:
        DataError: no file is a slice, or only some of a series are.
    """
    pydicom = need("pydicom", install="qdq[medical]", for_what="A DICOM image")
    found: dict[str, list[_Slice]] = defaultdict(list)
    placeless: dict[str, list[_NoPlaneError]] = defaultdict(list)
    kinds: dict[str, str] = {}
    left: Counter[str] = Counter()
    for number, file in enumerate(_files(path), 1):
        try:
            with told(f"DICOM file {number} in order of name"):
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*GEOMETRY])
                given, uid = str(header.get("Modality", "")), str(header.get("SeriesInstanceUID", ""))
                kind = given if given in MODALITIES.split() else "another kind"
                if "Rows" not in header or given in BESIDE:
                    left[f"no image ({kind})"] += 1
                elif "LOCALIZER" in header.get("ImageType", ""):
                    left["a localizer"] += 1
                else:
                    kinds[uid] = kind
                    found[uid] += _slices(header, file)
        except _NoPlaneError as error:
            placeless[uid].append(error)
    for uid, errors in placeless.items():
        if found.pop(uid, None) or not any(map(_stacked, found.values())):
            raise errors[0]
        left["an image without a place in space"] += len(errors)
    if any(map(_stacked, found.values())):
        for uid in [uid for uid, slices in found.items() if not _stacked(slices)]:
            left["of a series of one slice or of several directions, as localizers are"] += len(_paths(found.pop(uid)))
    said = "; ".join(f"{n} file{'s' * (n > 1)}, each {why}" if n > 1 else f"1 file, {why}" for why, n in left.items())
    if not found:
        raise DataError(f"its folder holds no DICOM series that is a volume ({said or 'no DICOM file'}).")
    taken = f"{len(found)} DICOM series {'are' if len(found) > 1 else 'is'} taken"
    left_out = f"{taken}, and beside {'them' if len(found) > 1 else 'it'} left out: {said}." if said else ""
    return _Series(slices=dict(found), modalities={kinds[uid] for uid in found}, left_out=left_out)


def _stacked(slices: Sequence[_Slice]) -> bool:
    """Whether there are several slices, all of one direction."""
    same = partial(np.allclose, rtol=0, atol=0.01)
    return len(slices) > 1 and all(same(s.rows_cols, slices[0].rows_cols) for s in slices)


def _alike(one: _Slice, other: _Slice) -> bool:
    """Whether two slices have one size, spacing and direction, but for how headers round."""
    near = partial(np.allclose, rtol=0, atol=ROUNDING)
    return one.size == other.size and near(one.rows_cols, other.rows_cols) and near(one.spacing, other.spacing)


def _slices(header: Any, file: Path) -> Iterator[_Slice]:
    """The frames of a file.

    Raises:
        DataError: they are no image planes.
    """
    if "PerFrameFunctionalGroupsSequence" in header:
        shared = header.get("SharedFunctionalGroupsSequence") or [{}]
        for n, own in enumerate(header.PerFrameFunctionalGroupsSequence):
            yield _slice(_frame_tags(own, shared[0]), header, file, n)
    elif int(header.get("NumberOfFrames") or 1) > 1:
        raise _NoPlaneError(
            "it has several frames and no place for each, so it is no volume (a film, or an old format)."
        )
    else:
        yield _slice(header, header, file, 0)


def _frame_tags(own: Any, shared: Any) -> Mapping[str, Any]:
    """Keyword -> value from the functional groups of a frame, else from those of all."""
    keywords = {
        "PlanePositionSequence": ("ImagePositionPatient",),
        "PlaneOrientationSequence": ("ImageOrientationPatient",),
        "PixelMeasuresSequence": ("PixelSpacing",),
        "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    }
    found: dict[str, Any] = {}
    for sequence, names in keywords.items():
        for group in (own, shared):
            if group.get(sequence):
                found |= {name: group.get(sequence)[0].get(name) for name in names}
                break
    return found


def _slice(tags: Any, header: Any, file: Path, frame: int) -> _Slice:
    needed = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    missing = [name for name in needed if tags.get(name) is None]
    if missing:
        raise _NoPlaneError(f"it has no {' and no '.join(missing)}, so it is no slice of a volume. Move it away.")
    if header.get("PhotometricInterpretation") == "MONOCHROME1" and header.get("Modality") in PHYSICAL:
        raise DataError(
            f"it is MONOCHROME1 and of modality {header.get('Modality')}, whose values are measurements: whether they "
            "are meant as they stand or inverted is not known. Write it as MONOCHROME2."
        )
    if header.get("ModalityLUTSequence"):
        raise DataError("its values stand in a table (ModalityLUTSequence), which is not read. Write them rescaled.")
    slope, intercept = tags.get("RescaleSlope"), tags.get("RescaleIntercept")
    between_rows, between_columns = (float(size) for size in tags.get("PixelSpacing"))
    return _Slice(
        path=file,
        frame=frame,
        size=(int(header.Rows), int(header.Columns)),
        position=np.array(tags.get("ImagePositionPatient"), np.float64),
        rows_cols=np.array(tags.get("ImageOrientationPatient"), np.float64).reshape(2, 3),
        spacing=(between_rows, between_columns),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
    )


def _stack(slices: Sequence[_Slice]) -> tuple[list[_Slice], npt.NDArray[np.float64]]:
    """The slices ordered along their normal, and the step from one to the next.

    Raises:
        DataError: several stacks, one slice, doubled or missing slices, a tilted gantry.
    """
    first = slices[0]
    stacks: list[_Slice] = []
    for one in slices:
        if not any(_alike(one, other) for other in stacks):
            stacks.append(one)
    if len(stacks) > 1:
        raise DataError(
            f"its {len(slices)} slices are {len(stacks)} stacks, of other sizes, spacings or directions: localizers, "
            "or several images in one series. Move those that do not belong to it away."
        )
    if len(slices) == 1:
        raise DataError("it has one slice, so the distance of slices is not known. Give the whole series.")
    normal = np.cross(*first.rows_cols)
    ordered = sorted(slices, key=lambda s: float(normal @ s.position))
    steps = np.diff([float(normal @ s.position) for s in ordered])
    usual = float(np.median(steps))
    doubled = int((steps < max(STEP_MM / 10, 0.05 * usual)).sum())
    if doubled:
        raise DataError(
            f"{doubled} of its {len(slices)} slices lie where another one lies: repetitions (echoes, times, b-values) "
            "in one series, or files twice. Give one slice for each place."
        )
    apart = np.abs(steps - usual)
    if (apart > STEP_MM + STEP_SHARE * usual).any():
        at = int(np.argmax(apart))
        raise DataError(
            f"the distance of its slices is {usual:.4g} mm, but {float(steps[at]):.4g} mm between slices {at + 1} and "
            f"{at + 2} of {len(slices)} along their normal: a slice is missing, or the spacing varies. Give the whole "
            "series, or one resampled to even steps."
        )
    way = ordered[-1].position - ordered[0].position
    tilt = float(np.degrees(np.arccos(min(1.0, float(normal @ way) / float(np.linalg.norm(way))))))
    if tilt > TILT_DEGREES:
        raise DataError(
            f"its slices are sheared by {tilt:.1f} degrees against their normal (a tilted gantry): no grid with right "
            "angles holds them. Give it corrected, as dcm2niix does."
        )
    return ordered, way / (len(slices) - 1)


def _affine(ordered: Sequence[_Slice], step: npt.NDArray[np.float64]) -> Affine:
    """(column, row, slice) to RAS+ millimetres."""
    first = ordered[0]
    affine = np.eye(4)
    affine[:3, 0] = first.rows_cols[0] * first.spacing[1]
    affine[:3, 1] = first.rows_cols[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _affine_of(slices: Sequence[_Slice]) -> Affine:
    return _affine(*_stack(slices))


def _volume(slices: Sequence[_Slice]) -> Volume:
    """The pixels of all slices.

    Raises:
        DataError: see `_stack`; or pixels in colour, damaged, or of a compression that nothing here reads.
    """
    ordered, step = _stack(slices)
    require_size((*ordered[0].size, len(ordered)))
    plain = all((s.slope, s.intercept) == (1, 0) for s in ordered)
    frames: dict[Path, Array] = {}
    planes = []
    for s in ordered:
        if s.path not in frames:
            frames = {s.path: _pixels(s.path)}  # one file at a time: an enhanced one holds all frames
        stored = frames[s.path][s.frame]
        if stored.shape != s.size:
            raise DataError("its pixels are in colour, or of another size than its header says; grey values are needed")
        value = stored if plain else (stored.astype(np.float64) * s.slope + s.intercept).astype(np.float32)
        planes.append(value.T)
    return Volume(array=np.stack(planes, axis=2)[None], affine=_affine(ordered, step))


def _pixels(path: Path) -> Array:
    """(frames, rows, columns): stored values, those of MONOCHROME1 inverted within their range.

    Raises:
        DataError: the compression needs a package that is not there.
    """
    pydicom = need("pydicom", install="qdq[medical]", for_what="A DICOM image")
    data = pydicom.dcmread(path, specific_tags=list(TAGS))
    if "PixelData" not in data:
        raise DataError("it has no pixels.")
    try:
        stored = np.asarray(data.pixel_array)
    except (RuntimeError, NotImplementedError, AttributeError):
        syntax = data.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise
        raise DataError(
            f"its pixels are compressed as {syntax.name}, and no decoder for that is installed, or they are damaged: "
            "pip install 'qdq[medical]'; for JPEG Lossless also pip install pylibjpeg-libjpeg (GPL)."
        ) from None
    if int(data.get("NumberOfFrames") or 1) == 1:
        stored = stored[None]
    if str(data.PhotometricInterpretation) == "MONOCHROME1":
        top = (1 << int(data.BitsStored)) - 1
        stored = (-1 - stored if int(data.PixelRepresentation) else top - stored).astype(stored.dtype)
    return stored


FORM = ImageForm(says="a folder of DICOM series", owns=owns, cases=cases)
