"""A DICOM with names in every text tag, file and folder leaves no trace in any output, searched byte by byte."""

from __future__ import annotations

import json
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from image_files import ramp, write_nifti, write_series
from models import segmenter

from calib_data import DataError
from calib_data.sources import dicom, nifti
from calib_data.volumes.case import Case, keyed, read_case_key, told
from calib_data.volumes.samples import cases_of
from qdq.cli.main import main

pydicom = pytest.importorskip("pydicom", reason="pip install 'qdq[medical]'")
pytest.importorskip("scipy", reason="pip install 'qdq[medical]'")

NAME, DATE, UID = "Zaphodbeeble", "19420517", "1.2.826.0.1.3680043.8.498.4242"
AFFINE = np.diag([-1.0, -1.0, 2.5, 1.0])
RECIPE = """
tune: 'off'
volume:
  orientation: RAS
  spacing_mm: [1, 1, 1]
  grid: edges
  intensity: {zscore: all}
  patch: [16, 16, 16]
  patches: {per_volume: 1}
"""
KEPT = {"ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Modality", "PhotometricInterpretation"}


def marks() -> Iterator[tuple[int, str, str]]:
    """A mark for every element of groups 8 to 40 whose value is text, a date or an identifier."""
    from pydicom.datadict import DicomDictionary

    texts = {"LO", "SH", "PN", "ST", "LT", "UT", "AE", "UC", "UR"}
    left = KEPT | {"SOPClassUID", "SeriesInstanceUID", "SpecificCharacterSet"}
    for tag, (vr, vm, _, retired, keyword) in DicomDictionary.items():
        if retired or not keyword or vm not in ("1", "1-n") or keyword in left or not 0x0008 <= tag >> 16 <= 0x0040:
            continue
        value = {"DA": DATE, "UI": UID, "CS": NAME.upper()}.get(vr, NAME if vr in texts else "")
        if value:
            yield tag, vr, value


MARKS = [*marks()]


def marked(data: Any, index: int) -> None:
    """Marks in a slice, nested, private and before the file too."""
    for tag, vr, value in MARKS:
        data.add_new(tag, vr, value)
    nested = pydicom.Dataset()
    nested.PatientName, nested.PatientID = NAME, NAME
    data.RequestAttributesSequence = [nested]
    data.private_block(0x0011, NAME, create=True).add_new(1, "LO", NAME)
    data.preamble = (NAME.encode() * 20)[:128]


@pytest.fixture
def patient(tmp_path: Path) -> Path:
    """Two series in a folder with a name, in files with names; one file's header is damaged in a folder beside."""
    folder = tmp_path / "in" / f"{NAME}_{DATE}"
    for number in range(2):
        array = np.random.default_rng(number).integers(0, 255, (16, 16, 8)).astype(np.uint8)
        write_series(folder / f"{NAME}{number}", array, AFFINE, each=marked, seed=number, uid=f"{UID}.{number}")
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.rename(path.with_name(f"{NAME}{path.name}.dcm"))
    return folder


def traces(folder: Path, *more: str) -> list[str]:
    """Where a mark stands, in any letters, in the bytes of files, in their names, or in texts."""
    marks = [NAME.lower().encode(), DATE.encode(), UID.encode()]
    read = [(str(p.relative_to(folder)), p.read_bytes()) for p in folder.rglob("*") if p.is_file()]
    found = [name for name, data in read if any(mark in (name.encode() + data).lower() for mark in marks)]
    return found + [text for text in more if any(mark in text.lower().encode() for mark in marks)]


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(word) for word in words])
    return done.exit_code, done.output + done.stderr


def test_the_marks_are_there(patient: Path) -> None:
    assert len(traces(patient)) == 16
    data = pydicom.dcmread(next(p for p in patient.rglob("*.dcm")))
    assert sum(NAME.lower() in str(e.value).lower() for e in data) > 200


def test_no_trace_in_any_output(patient: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'qdq[cpu]'")
    pytest.importorskip("tensorrt_rtx", reason="pip install 'qdq[cpu]'")
    pytest.importorskip("matplotlib", reason="pip install 'qdq[plot]'")
    out = tmp_path / "out"
    out.mkdir()
    model = out / "model.onnx"
    onnx.save(segmenter(spatial=("x", "y", "z")), model)
    recipe = out / "recipe.yaml"
    recipe.write_text(RECIPE)
    for words in (
        ("data", patient, "--recipe", recipe, "--preview", out / "p.png", "--write-recipe", out / "w.yaml", "--json"),
        ("calibrate", model, "--data", patient, "--recipe", recipe, "-o", out / "table.json"),
        ("deploy", model, "--data", patient, "--recipe", recipe, "--out", out / "build"),
        ("segment", model, "--data", patient, "--recipe", recipe, "-o", out / "labels"),
    ):
        code, text = run(*words, "-v", "--log-file", out / f"{words[0]}.log")
        assert code == 0, text
        assert traces(out, text) == []
    assert len(list((out / "build").iterdir())) >= 6 and len(list((out / "labels").iterdir())) == 3


def test_traces_stand_only_where_they_were_asked_for(
    patient: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("highdicom", reason="pip install 'qdq[dicom-seg]'")
    out, labels, table = tmp_path / "out", tmp_path / "labels", tmp_path / "map.csv"
    out.mkdir()
    onnx.save(segmenter(spatial=("x", "y", "z")), out / "model.onnx")
    (out / "recipe.yaml").write_text(RECIPE)
    code, text = run(
        *("segment", out / "model.onnx", "--data", patient, "--recipe", out / "recipe.yaml", "-o", labels),
        *("--form", "dicom-seg", "--write-map", table, "-v", "--log-file", out / "run.log"),
    )
    assert code == 0 and traces(out, text, caplog.text) == []
    assert sorted(traces(labels)) == sorted(p.name for p in labels.glob("*.dcm")) and len(traces(labels)) == 2
    for path in labels.glob("*.dcm"):
        found = {e.keyword for e in pydicom.dcmread(path).iterall() if NAME.lower() in str(e.value).lower()}
        dated = {e.keyword for e in pydicom.dcmread(path).iterall() if DATE in str(e.value)}
        assert found == {"PatientName", "PatientID", "IssuerOfPatientID", "StudyID", "AccessionNumber"}
        assert dated == {"PatientBirthDate", "StudyDate"}
    assert table.read_text().count(NAME) == 4 and not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("damage", ["truncated", "missing", "header", "label"])
def test_no_trace_in_an_error(patient: Path, tmp_path: Path, damage: str) -> None:
    files = sorted(patient.rglob("*.dcm"))
    if damage == "missing":
        files[5].unlink()
    elif damage == "truncated":
        files[5].write_bytes(files[5].read_bytes()[:-100])
    elif damage == "header":
        raw = files[5].read_bytes()
        files[5].write_bytes(raw[:400] + b"\xff" * 200 + raw[600:])
    else:
        write_nifti(patient / "imagesTr" / f"{NAME}_0000.nii", ramp(4, 4, 4))
        write_nifti(patient / "labelsTr" / f"{NAME}.nii", ramp(4, 4, 5))
        patient = patient / "imagesTr"
    log = tmp_path / "out" / "run.log"
    log.parent.mkdir()
    code, text = run("data", patient, "-v", "--log-file", log)
    assert code == 2, text
    assert "case 1 of" in text or "DICOM file" in text or "case 2 of" in text
    assert traces(log.parent, text) == []


def test_only_allowed_tags_are_read(patient: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    read = pydicom.dcmread

    def watched(path: Path, **options: Any) -> Any:
        asked.append(set(options["specific_tags"]))
        return read(path, **options)

    monkeypatch.setattr(pydicom, "dcmread", watched)
    dicom.cases(str(patient))[0].image()
    assert asked and set().union(*asked) == set(dicom.TAGS)
    people = re.compile("Name|Date|Time|Birth|ID$|Comment|Description|Study|Institution|Address|Physician")
    assert [tag for tag in dicom.TAGS if people.search(tag)] == ["SeriesInstanceUID"]  # only to group by


@pytest.mark.parametrize(
    "error",
    [ValueError(NAME), FileNotFoundError(2, "No such file", NAME), KeyError(NAME), EOFError(NAME), MemoryError(NAME)],
)
def test_what_a_library_says_is_not_repeated(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"^Cannot use case 1: ") as caught, told("case 1"):
        warnings.warn(NAME, stacklevel=1)
        logging.getLogger("pydicom").warning(NAME)
        raise error
    assert NAME not in "".join(traceback.format_exception(caught.value)).replace("NAME", "") and not caplog.text
    assert logging.getLogger("pydicom").level <= logging.CRITICAL


def test_a_folder_that_cannot_be_listed_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    write_nifti(tmp_path / NAME / "imagesTr" / "a.nii", ramp(4, 5, 6))
    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(DataError, match=r"^Cannot list the images: Permission denied\.") as caught:
        cases_of(nifti.FORM, str(tmp_path / NAME), None)
    assert NAME not in str(caught.value)


def test_keys_are_keyed_hashes(tmp_path: Path) -> None:
    def of(key: bytes | None) -> list[str]:
        cases = [Case(name=name, image=lambda: None, affine=lambda: None) for name in (NAME, "b")]  # type: ignore[arg-type,return-value]
        assert NAME not in repr(cases)
        return [case.key for case in keyed(cases, key)]

    assert of(b"k" * 32) == of(b"k" * 32) != of(b"l" * 32)
    assert of(None) == of(None) and len({*of(None), *of(b"k" * 32)}) == 4
    file = tmp_path / "case.key"
    file.write_bytes(b"k" * 32)
    assert of(read_case_key(file)) == of(b"k" * 32)
    file.write_bytes(b"short")
    with pytest.raises(DataError, match="has 5 bytes; at least 16"):
        read_case_key(file)
    with pytest.raises(DataError, match="Cannot read the key of cases"):
        read_case_key(tmp_path / "nothing")


def test_the_users_key_tells_cases_apart_from_run_to_run(tmp_path: Path) -> None:
    write_nifti(tmp_path / "in" / "a.nii", ramp(4, 5, 6))
    (tmp_path / "case.key").write_bytes(bytes(range(32)))
    told = [run("data", tmp_path / "in", "--json", "--case-key", tmp_path / "case.key")[1] for _ in range(2)]
    (seen,) = json.loads(told[0][: told[0].rindex("}") + 1])["images"]
    assert told[0] == told[1] and seen["case"].startswith("case 1 of 1 (key ")
