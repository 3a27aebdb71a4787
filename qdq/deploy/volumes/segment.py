"""Labels of images as files on their own grids, with the names of structures.

a model or an engine + images -> `Segmenter` -> one file for each image, named by its number and key, and labels.json;
all or none. A NIfTI file holds labels, the grid, and in a comment the names; nothing of the image's file goes into it.
Channels that overlap without an order are written beside each other, along a fourth axis. A user may ask for DICOM
segmentation objects (`dicom_seg`) in its place. Must not tell what a case is called.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from calib_data import InputSpec, Samples
from calib_data.extras import need
from calib_data.volume import Grid
from calib_data.volumes.case import Case
from calib_data.volumes.prepare import prepared
from engines.backends.backend import backend_named
from engines.core import arithmetic
from engines.core.files import sha256_file
from engines.verify.covered import require_covered
from qdq.build.engine import compiled, engine_backend
from qdq.build.keys.segmentation import WholeVolumes
from qdq.core.errors import InputError
from qdq.core.files import folder_beside, move_all
from qdq.core.progress import Progress
from qdq.deploy.volumes.decode import Structure
from qdq.deploy.volumes.evaluate import Segmenter, active, images_of, named
from qdq.deploy.volumes.forms.dicom_seg import Algorithm, dicom_seg, require_series
from qdq.deploy.volumes.network import Reader, output_of
from qdq.measure.inference.inputs import input_specs
from qdq.model.storage import load

Array = npt.NDArray[Any]
FORMS = {"nifti": ".nii.gz", "dicom-seg": ".dcm"}
DIGITS = 16  # of a model's sha256
COMMENT, LABELS, SCANNER = 6, "label", 1  # NIfTI-1: code of a plain text extension, intent, code of a space


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmented:
    """What was written to a folder.

    Attributes:
        files: name of the labels of each case, in their order.
        cases: keyed.
        said: how the labels were made, one sentence.
    """

    files: tuple[str, ...]
    cases: Sequence[Case]
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model that can run: its file, a session or a runner, what it takes; and its graph, where that is known."""

    path: Path
    model: Any
    inputs: tuple[InputSpec, ...]
    graph: ModelProto | None


def opened(path: Path, *, custom_ops: Sequence[str] = ()) -> Opened:
    """A model's file, float or Q/DQ, computed in the types that it has; or an engine, on a GPU.

    Raises:
        InputError, EngineError: it cannot be read, or is not the one that the SHA256SUMS beside it names.
        MissingRuntimeError: no GPU here runs the engine.
    """
    require_covered(path)
    if path.suffix == ".onnx":
        model = load(path)
        session = arithmetic.session(model.proto, directory=model.directory, where=str(path), custom_ops=custom_ops)
        return Opened(path=path, model=session, inputs=input_specs(model), graph=model.proto)
    runner = backend_named(engine_backend(path)).runner(str(path), name="engine")
    with runner:
        takes = runner.get_input_metadata(use_numpy_dtypes=False)
    inputs = tuple(
        InputSpec(
            name=name,
            dtype=found.dtype.name,
            shape=tuple(n if isinstance(n, int) and n > 0 else None for n in found.shape),
        )
        for name, found in takes.items()
    )
    graph: ModelProto | None = None
    with suppress(InputError):  # the model need not lie beside its engine
        graph = load(compiled(path).model).proto
    return Opened(path=path, model=runner, inputs=inputs, graph=graph)


def segment(
    model: Opened,
    samples: Samples,
    whole: WholeVolumes,
    out: Path,
    *,
    form: str = "nifti",
    task: str = "auto",
    class_axis: int | None = None,
    on_progress: Progress | None = None,
) -> Segmented:
    """Segment every image; files of the same names in `out` are replaced, labels of other names are refused.

    Args:
        model: of `opened`.
        samples: of images.
        whole: window, and what channels are.
        out: a folder, made if need be.
        form: one of `FORMS`.
        task: as in `engines.verify.meaning.meanings`.
        class_axis: as there.

    Raises:
        InputError: as `Segmenter`; `out` is not writable, or holds labels of other images or another key; `form` is
            dicom-seg, and a case is no DICOM series.
        DataError: a case cannot be used.
    """
    write = _writer(form, model.path)
    own = output_of(model.model) or (model.graph.graph.output[0].name if model.graph else "")
    reader = Reader(graph=model.graph, output=own, asked=whole.segmentation, task=task, class_axis=class_axis)
    one = Segmenter(model.model, images_of(samples), whole, reader)
    cases = one.source.cases
    digits = max(3, len(str(len(cases))))
    if form == "dicom-seg":
        require_series(cases)
    written = [f"case-{number:0{digits}}-{case.key}{FORMS[form]}" for number, case in enumerate(cases, 1)]
    if older := {path.name for end in FORMS.values() for path in out.glob(f"case-*{end}")}.difference(written):
        raise InputError(
            f"{out} holds {len(older)} label file{'s' * (len(older) > 1)} of other images, of another form or of a run "
            "with another key, and nothing would tell them from this run's. Choose another folder, or remove them; "
            "--case-key FILE gives an image the same name in every run."
        )
    with folder_beside(out) as folder, active(model.model):
        for done, (case, name) in enumerate(zip(cases, written, strict=True)):
            if on_progress:
                on_progress(done, len(cases), "Segment")
            made = prepared(case, one.source.spec)
            grid = made.file
            with named(case):
                labels = one.labels(made.image, grid)
            del made
            with named(case):
                path = folder / name
                path.touch(mode=0o600 if form == "dicom-seg" else 0o666)  # one names a patient
                path.write_bytes(write(case, labels, grid, reader.decoder.structures))
        if on_progress:
            on_progress(len(cases), len(cases), "Segment")
        (folder / "labels.json").write_text(json.dumps(names(reader.decoder.structures), indent=1) + "\n")
        move_all(folder, out)
    said = f"{one.sliding.said}; {reader.decoder.said}; on the image's own grid by {one.said}"
    return Segmented(files=tuple(written), cases=cases, said=said)


def _writer(form: str, model: Path) -> Callable[[Case, Array, Grid, Sequence[Structure]], bytes]:
    """What makes the bytes of a label file.

    Raises:
        MissingExtraError: its package is not installed.
    """
    if form == "nifti":
        need("nibabel", install="qdq[medical]", for_what="Writing NIfTI")
        return lambda case, labels, grid, structures: nifti(labels, grid, structures)
    made_by = Algorithm(name=model.stem, version=sha256_file(model)[:DIGITS])
    return lambda case, labels, grid, structures: dicom_seg(case, labels, structures, made_by)


def names(structures: Sequence[Structure]) -> dict[str, int | list[int]]:
    """Label values by name, as nnU-Net's dataset.json has them; of bits, the index along the fourth axis."""
    bits: dict[str, int | list[int]] = {s.name: s.bit for s in structures if s.bit is not None}
    if bits:
        return bits
    values = {s.name: s.values[0] if len(s.values) == 1 else list(s.values) for s in structures}
    return {"background": 0, **values}


def nifti(labels: Array, grid: Grid, structures: Sequence[Structure]) -> bytes:
    """A compressed NIfTI file: labels on a grid, and the names of structures.

    The compressed form holds no name and no time, so that one result gives the same bytes.

    Raises:
        MissingExtraError: nibabel is not installed.
    """
    nib = need("nibabel", install="qdq[medical]", for_what="Writing NIfTI")
    if any(s.bit is not None for s in structures):
        labels = np.stack([s.mask(labels) for s in structures], axis=-1).astype(np.uint8)
    image = nib.Nifti1Image(labels, grid.affine)
    image.set_sform(grid.affine, SCANNER)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(LABELS)
    comment = json.dumps(names(structures)).encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension(COMMENT, comment))
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
