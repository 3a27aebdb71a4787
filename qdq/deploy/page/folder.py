"""The files of a run, read and checked: nothing else is needed to make its page.

DIR (report.json, plan.json, table.json, X.engine.json, measured.jsonl, provenance.json, slices.npz) -> `Run`
report.json of `qdq compare` -> `Comparison`. Must not run, measure or change anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.backends.layers import LayerTable
from engines.core.documents import DocumentError, schema_of
from engines.core.files import read_file
from engines.verify.covered import Covered, read_sums
from engines.verify.manifest import Manifest
from qdq.build.measured.forms import TimedForm
from qdq.core.errors import InputError
from qdq.core.files import read_document
from qdq.deploy.compare.result import Comparison
from qdq.deploy.report.report import DeployReport
from qdq.deploy.trace.provenance import NAME as TRACED
from qdq.deploy.volumes.slices import Slice, read_slices
from qdq.measure.table import CalibrationTable
from qdq.plan.plan import Plan

PAGE, REPORT, SLICES, MEASURED = "report.html", "report.json", "slices.npz", "measured.jsonl"
FRONT = "front.json"
MAKES = "Give a folder that `qdq deploy` or `qdq demo` wrote, or the JSON file of `qdq compare`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One deployment; None of what its folder lacks.

    Attributes:
        name: of the folder, without where it lies.
        provenance: of the run, as its file has it.
        slices: pictures; () unless they are asked for.
    """

    name: str
    report: DeployReport
    plan: Plan | None
    table: CalibrationTable | None
    layers: LayerTable | None
    manifest: Manifest | None
    forms: tuple[TimedForm, ...]
    provenance: dict[str, Any] | None
    slices: tuple[Slice, ...] = ()


def page_beside(path: Path) -> Path:
    """Where the page of a folder, or of a JSON file, lies: report.html beside report.json, x.html beside x.json."""
    return path / PAGE if path.is_dir() else path.with_name(f"{path.name.removesuffix('.json')}.html")


def read(path: Path, *, with_images: bool = False) -> Run | Comparison:
    """What lies in a folder, or in a JSON file.

    Args:
        path: a folder, or the JSON file of a report.
        with_images: read pictures of samples too.

    Raises:
        InputError: no run is there, a file is damaged or of another version, or there are no pictures.
        AlteredFileError: a file of a run is another than SHA256SUMS says.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        content = json.loads(read_file(file))
    except FileNotFoundError:
        what = f"it has no {REPORT}" if path.is_dir() else "there is no such file or folder"
        raise InputError(f"Cannot make a page of {path}: {what}. {MAKES}.") from None
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error.strerror or error}. {MAKES}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"Cannot make a page of {file}: it is not JSON ({error}). {MAKES}.") from None
    found = schema_of(content)
    kind = str(found).partition("/")[0]
    if kind == Comparison.FORMAT.partition("/")[0]:
        if with_images:
            raise InputError(f"There are no pictures in {file}: `qdq compare` keeps none. Leave out --with-images.")
        return read_document(file, Comparison, "comparison")
    if kind != DeployReport.FORMAT.partition("/")[0]:
        raise InputError(f"Cannot make a page of {file}: its schema is {found!r}, which is no run. {MAKES}.")
    return _run(file, with_images)


def _run(file: Path, with_images: bool) -> Run:
    folder, report = file.parent, read_document(file, DeployReport, "report")
    plan, table = folder / "plan.json", folder / "table.json"
    engine = _engine_of(folder, report.model_file)
    layers = folder / f"{engine}.json" if engine else None
    manifest = folder / f"{engine}.manifest.json" if engine else None
    own = [file, plan, table, folder / MEASURED, folder / TRACED, folder / SLICES]
    _require_unaltered(folder, [*own, *(path for path in (layers, manifest) if path)])
    pictures: tuple[Slice, ...] = ()
    if with_images:
        if not (folder / SLICES).is_file():
            raise InputError(
                f"There are no pictures in {folder}: {SLICES} is missing. Deploy whole volumes with --with-images, "
                "which keeps slices of your images."
            )
        pictures = read_slices(folder / SLICES)
    return Run(
        name=folder.absolute().name,
        report=report,
        plan=Plan.load(plan) if plan.is_file() else None,
        table=CalibrationTable.load(table) if table.is_file() else None,
        layers=read_document(layers, LayerTable, "layer table") if layers and layers.is_file() else None,
        manifest=read_document(manifest, Manifest, "manifest") if manifest and manifest.is_file() else None,
        forms=_forms(folder / MEASURED),
        provenance=_provenance(folder / TRACED),
        slices=pictures,
    )


def _require_unaltered(folder: Path, files: Iterable[Path]) -> None:
    """Hold files to SHA256SUMS where it names them: a page must not tell of a report that someone changed."""
    sums = read_sums(folder)
    held = {file.name: sums[file.name] for file in files if file.name in sums and file.is_file()}
    Covered(folder=folder, engine="", onnx="", manifest=None, sums=held).verify()


def _engine_of(folder: Path, model_file: str) -> str:
    """The name of the engine that belongs to a model file: the stem that both share; '' where there is none."""
    names = sorted(path.name.removesuffix(".json") for path in folder.glob("*.engine.json"))
    return next((name for name in names if model_file.startswith(f"{name.removesuffix('.engine')}.")), "")


def _forms(path: Path) -> tuple[TimedForm, ...]:
    if not path.is_file():
        return ()
    found = []
    for number, line in enumerate(read_file(path).decode(errors="replace").splitlines(), 1):
        try:
            found.append(TimedForm.from_json(line))
        except DocumentError as error:
            raise InputError(f"Cannot use line {number} of {path}: {error}.") from None
    return tuple(found)


def _provenance(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"Cannot use the provenance {path}: it is not JSON ({error}). Deploy again.") from None
    if not isinstance(content, dict):
        raise InputError(f"Cannot use the provenance {path}: it holds no object. Deploy again.")
    return content
