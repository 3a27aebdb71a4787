"""Labels of a DICOM series as a DICOM segmentation object, which goes back to where the series came from.

a series' headers + labels on its grid -> one object: a binary segment for each structure, frame by frame on the slices
of the series, in its frame of reference, with references to its instances. The standard wants the patient and the study
in it (PS3.3 A.51): of these, and of all else, it takes the tags of `IDENTITY`, `REFERENCE` and the slices' geometry.
Nothing but such an object may hold them. Must not be written unless a user asks for this form.

Source: DICOM PS3.3 A.51 and C.8.20; highdicom 0.28.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.extras import need
from calib_data.sources.dicom import GEOMETRY
from calib_data.validation import DataError
from calib_data.volumes.case import Case, Origin, told
from qdq.core.errors import InputError
from qdq.deploy.volumes.decode import Structure

Array = npt.NDArray[Any]
IDENTITY = (  # may be empty in a series, and is then empty here
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
)
_VALID = {  # others are refused by DICOM's writers, and are left empty here
    "PatientSex": "[MFO]?",
    "PatientBirthDate": r"(\d{8})?",
    "StudyDate": r"(\d{8})?",
    "StudyTime": r"(\d\d){0,3}|\d{6}\.\d{1,6}",
}
ONE_PERSON = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID")
REFERENCE = ("StudyInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID")
TAGS = (*IDENTITY, *REFERENCE, *GEOMETRY, "SpecificCharacterSet", "InstanceNumber")
SERIES_NUMBER = 1000  # far from those of a scanner
UTF8, CODES = "ISO_IR 192", "pydicom.sr.codedict"
MOST_NAME = 64  # characters of a segment's label
WARNING = (
    "These objects hold name, identifiers, birth date and sex of the patient and the study's date, as DICOM demands: "
    "give them to nobody but where the series came from"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What made the labels: the name of a model's file, and the beginning of its sha256."""

    name: str
    version: str

    @property
    def said(self) -> str:
        """The name as one value of DICOM."""
        return "".join(c if c.isprintable() and c != "\\" else "_" for c in self.name)


def require_series(cases: Sequence[Case]) -> None:
    """Refuse early what cannot be written.

    Raises:
        InputError: a case is no DICOM series.
        MissingExtraError: highdicom is not installed.
    """
    need("highdicom", install="qdq[dicom-seg]", for_what="Writing DICOM SEG")
    if other := [case for case in cases if not (case.origins and case.origins[0].series)]:
        raise InputError(
            f"Cannot write DICOM SEG of {other[0].where}: it is no DICOM series, and such an object refers to the "
            "patient, the study and the slices of one. Give a folder of DICOM series, or write NIfTI."
        )


def dicom_seg(case: Case, labels: Array, structures: Sequence[Structure], made_by: Algorithm) -> bytes:
    """A DICOM file: a segment for each structure, numbered from 1 in their order.

    Args:
        case: a DICOM series; of several images, the first.
        labels: (column, row, slice) as a decoder makes them, on the grid of that series.
        structures: what is to be a segment.
        made_by: named in every segment.

    Raises:
        InputError: a name that DICOM does not hold.
        DataError: the series lacks what an object refers to, names more than one patient or study, or lies in several
            files of many frames each.
    """
    for name in (s.name for s in structures):
        if len(name) > MOST_NAME or "\\" in name or not name.isprintable() or not name.strip():
            raise InputError(
                f"The structure {name!r} cannot be a segment's label in DICOM: at most {MOST_NAME} printable "
                "characters and no backslash. Change the names under `structures:` in the recipe."
            )
    with told(case.where):
        return _written(case.origins[0], labels, structures, made_by)


def _written(origin: Origin, labels: Array, structures: Sequence[Structure], made_by: Algorithm) -> bytes:
    """The bytes of the object, sources in the order of k, or one of many frames in its own order."""
    highdicom, pydicom = (need(m, install="qdq[dicom-seg]", for_what="DICOM SEG") for m in ("highdicom", "pydicom"))
    slices, step = origin.slices()
    paths = [*dict.fromkeys(path for path, _ in slices)]
    if 1 < len(paths) < len(slices):
        raise DataError(
            f"its {len(slices)} frames lie in {len(paths)} files, and a DICOM SEG refers to slices in a file each, or "
            "to the frames of one file. Write NIfTI, or give the files as series of their own."
        )
    sources = [_source(path, step) for path in paths]
    if mixed := [name for name in ONE_PERSON if len({str(source.get(name, "")) for source in sources}) > 1]:
        raise DataError(
            f"its slices differ in {', '.join(mixed)}, and a DICOM SEG is of one patient and study. Find out whose "
            "they are, or write NIfTI."
        )
    for source in sources[1:]:  # rounded slice by slice, which the reader allows and highdicom does not
        source.ImageOrientationPatient, source.PixelSpacing = (
            sources[0].ImageOrientationPatient,
            sources[0].PixelSpacing,
        )
    turned = labels.transpose(2, 1, 0)  # slices, rows, columns
    if len(paths) < len(slices):
        turned = turned[np.argsort([frame for _, frame in slices])]
    made = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=_segments(turned, structures),
        segmentation_type="BINARY",
        segment_descriptions=[_described(n, s.name, made_by) for n, s in enumerate(structures, 1)],
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=_shared(sources[0], "PixelMeasuresSequence").PixelSpacing,
            slice_thickness=step,
            spacing_between_slices=step,
        ),
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="qdq",
        manufacturer_model_name="qdq segment",
        software_versions=version("qdq"),
        device_serial_number="none",
        content_label="SEGMENTATION",
        specific_character_set=UTF8,
    )
    made.SeriesDescription = f"Segmentation by {made_by.said}"[:MOST_NAME]
    file = io.BytesIO()
    pydicom.dcmwrite(file, made, enforce_file_format=True)
    return file.getvalue()


def _source(path: Path, step: float) -> Any:
    """The tags of a slice that an object takes from it; what of the patient is absent is empty.

    Raises:
        DataError: what cannot be empty is absent.
    """
    pydicom = need("pydicom", install="qdq[medical]", for_what="A DICOM image")
    found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*TAGS])
    if missing := [name for name in REFERENCE if not found.get(name)]:
        raise DataError(f"its slices have no {' and no '.join(missing)}, which a DICOM SEG refers to. Write NIfTI.")
    found.decode()
    found.SliceThickness = step  # that of a file is nominal, and may be absent
    for name in IDENTITY:
        if name not in found and name != "IssuerOfPatientID":
            setattr(found, name, "")
        if name in _VALID and not re.fullmatch(_VALID[name], str(found.get(name))):
            setattr(found, name, "")
    if "PerFrameFunctionalGroupsSequence" in found:  # highdicom looks for what all frames have in what is shared
        shared = (found.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
        found.SharedFunctionalGroupsSequence = [shared]
        for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            if name not in shared:
                setattr(shared, name, found.PerFrameFunctionalGroupsSequence[0][name].value)
    return found


def _shared(source: Any, group: str) -> Any:
    """What holds the tags of a group: the slice, or what all frames share."""
    return source.SharedFunctionalGroupsSequence[0][group][0] if "SharedFunctionalGroupsSequence" in source else source


def _segments(labels: Array, structures: Sequence[Structure]) -> Array:
    """Numbers of segments (slices, rows, columns); where segments overlap, a last axis of one mask for each."""
    numbers = np.zeros(labels.shape, np.min_scalar_type(len(structures)))
    for number, structure in enumerate(structures, 1):
        there = structure.mask(labels)
        if numbers[there].any():
            return np.stack([s.mask(labels) for s in structures], axis=-1).view(np.uint8)
        numbers[there] = number
    return numbers


def _described(number: int, name: str, made_by: Algorithm) -> Any:
    """A segment; the recipe names structures in words, so that their code says tissue and no more."""
    highdicom, codes = (need(m, install="qdq[dicom-seg]", for_what="DICOM SEG") for m in ("highdicom", CODES))
    tissue, learned = codes.codes.SCT.Tissue, codes.codes.cid7162.ArtificialIntelligence
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=tissue,
        segmented_property_type=tissue,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=made_by.said[:MOST_NAME], family=learned, version=made_by.version
        ),
    )
