"""Float model and candidate on whole volumes: labels of both on each image's own grid, measured against each other.

images -> each prepared as the recipe says -> both networks window by window -> labels on the image's grid ->
`MaskReport` of each structure, also of both against labels where there are any -> `VolumeReport`. One case is in memory
at a time. Must not tell what a case is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from calib_data import Samples
from calib_data.extras import need
from calib_data.volumes.case import Case, told
from calib_data.volumes.prepare import prepared
from calib_data.volumes.samples import CaseSamples
from engines.verify.volumes import CaseReport, MaskReport, VolumeComparison, VolumeReport, summed
from qdq.build.keys.segmentation import WholeVolumes
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.core.resources import default_bytes
from qdq.deploy.volumes.decode import Structure
from qdq.deploy.volumes.measures import measured
from qdq.deploy.volumes.network import Network, Reader, inferring, output_of, planned
from qdq.deploy.volumes.restore import decoded_onto, labels_onto
from qdq.deploy.volumes.slices import Keeper
from qdq.deploy.volumes.sliding import Sliding, output

if TYPE_CHECKING:
    from calib_data.volume import Box, Grid, Volume

Array = npt.NDArray[Any]


class Segmenter:
    """One model over images."""

    def __init__(self, opened: Any, source: CaseSamples, whole: WholeVolumes, reader: Reader) -> None:
        """Of a session, or of an engine's runner.

        Args:
            opened: as of `inferring`.
            source: the images, what is done to them, and the model's input.
            whole: window, and what channels are.
            reader: shared by models that are compared.

        Raises:
            InputError: the window does not fit the model.
        """
        self.source = source
        spec, given = self.source.spec, self.source.inputs[0]
        window, layout = planned(given, spec.axes, whole.window, spec.patch, spec.pad)
        self._whole, self._reader, self._given, self._layout = whole, reader, given, layout
        network = Network(infer=inferring(opened), spec=given, layout=layout, reader=reader)
        self.sliding = Sliding(run=network, window=window)

    @property
    def said(self) -> str:
        """How results come to the image's grid, in words."""
        if self._whole.segmentation.resample == "labels":
            return "labels, each voxel's the nearest"
        thick = ", the nearest slice where slices are thick" if self.source.spec.separate_z == "auto" else ""
        return f"interpolated channels, decoded there{thick}"

    def labels(self, image: Volume, grid: Grid) -> Array:
        """The labels of a prepared image, on its file's grid.

        Raises:
            InputError: the image has other channels than the model takes; voxels or results that are not finite;
                channels of the result that do not fit the memory.
        """
        self._layout.require_channels(len(image.array), self._given)
        if self._whole.segmentation.resample == "logits":
            values = output(self.sliding, image.array, most=default_bytes())
            separate = self.source.spec.separate_z == "auto"
            return decoded_onto(values, image.place, grid, self._reader.decoder, separate_z=separate)
        labels: Array = np.zeros(0)
        for part in self.sliding.parts(image.array):
            decoder = self._reader.decoder
            if not labels.size:
                labels = np.zeros(image.grid, decoder.dtype)
            labels[part.place] = decoder.labels(part.values)
        return labels_onto(labels, image.place, grid)


def active(opened: Any) -> AbstractContextManager[Any]:
    """A session as it is, or a runner that can run within."""
    return nullcontext(opened) if hasattr(opened, "get_inputs") else opened


@contextmanager
def named(case: Case) -> Iterator[None]:
    """Say of which case an error of ours is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"Cannot use {case.where}: {error}") from None


def images_of(samples: Samples) -> CaseSamples:
    """The source of samples that are images.

    Raises:
        InputError: they are arrays.
    """
    if isinstance(samples.source, CaseSamples):
        return samples.source
    raise InputError(
        f"{samples.origin} holds arrays, which have no place in space: whole volumes need images (NIfTI, DICOM, NRRD). "
        "Give such a folder, or leave out the window and the limits of volumes."
    )


def require_volumes(samples: Samples, whole: WholeVolumes) -> None:
    """Refuse early what would fail after a long calibration.

    Raises:
        InputError: the samples are no images, or the window does not fit the model.
        MissingExtraError: scipy is not installed.
    """
    source = images_of(samples)
    planned(source.inputs[0], source.spec.axes, whole.window, source.spec.patch, source.spec.pad)
    need("scipy.spatial", install="qdq[medical]", for_what="Measuring whole volumes")


def compare_volumes(
    reference: Any,
    candidate: Any,
    samples: Samples,
    whole: WholeVolumes,
    *,
    graph: ModelProto,
    task: str = "auto",
    class_axis: int | None = None,
    names: tuple[str, str] = ("float model", "candidate"),
    pictures: Keeper | None = None,
    on_progress: Progress | None = None,
) -> VolumeReport:
    """Run both on every image, and measure what they find.

    Args:
        reference: an ONNX Runtime session of the float model.
        candidate: a session, or a runner of an engine.
        samples: of images; every image counts, whatever patches are cut of it.
        whole: window, and what channels are.
        graph: the float model.
        task: as in `engines.verify.meaning.meanings`.
        class_axis: as there.
        names: of both, for the report.
        pictures: keeps slices of the images where both disagree most; None keeps no voxel.

    Raises:
        InputError: the samples are no images; the model's first output is no segmentation; the window does not fit.
        DataError: a case cannot be used.
    """
    reader = Reader(
        graph=graph, output=output_of(reference), asked=whole.segmentation, task=task, class_axis=class_axis
    )
    ours, theirs = (Segmenter(model, images_of(samples), whole, reader) for model in (reference, candidate))
    kept: list[list[CaseReport]] = [[], [], []]
    cases = ours.source.cases
    with active(reference), active(candidate):
        for done, case in enumerate(cases):
            if on_progress:
                on_progress(done, len(cases), "Check volumes")
            made = prepared(case, ours.source.spec)
            grid, true = made.file, None if made.truth is None else _whole(made.truth.array[0])
            with named(case):
                before, after = (side.labels(made.image, grid) for side in (ours, theirs))
            if pictures is not None:
                with told(case.where):
                    pictures.see(case, grid.affine, before, after)
            del made
            structures = reader.decoder.structures
            pairs = [(after, before, False)] + ([(before, true, True), (after, true, True)] if true is not None else [])
            for side, (found, against, of_file) in zip(kept, pairs, strict=False):
                report = _measured(found, against, structures, grid.spacing_mm, of_file=of_file)
                side.append(CaseReport(case=case.key, structures=report))
    if on_progress:
        on_progress(len(cases), len(cases), "Check volumes")
    described = [(names[1], names[0]), (names[0], "labels"), (names[1], "labels")]
    compared = [
        VolumeComparison(
            found=found,
            true=true_name,
            cases=tuple(side),
            structures=tuple(summed(s.name, [c.structures[s.name] for c in side]) for s in reader.decoder.structures),
            without_truth=len(cases) - len(side),
        )
        for (found, true_name), side in zip(described, kept, strict=True)
        if side
    ]
    return VolumeReport(
        cases=len(cases),
        window=ours.sliding.said,
        grid=ours.said,
        decoded=reader.decoder.said,
        windows=ours.sliding.runs,
        repeated=ours.sliding.repeated,
        to_float=compared[0],
        to_labels=tuple(compared[1:]),
    )


def _whole(label: Array) -> Array:
    """A label's values, which are whole numbers, in a type of those."""
    return label.astype(np.min_scalar_type(int(label.max()))) if label.dtype.kind == "f" else label


def _measured(
    found: Array, true: Array, structures: Sequence[Structure], spacing_mm: Sequence[float], *, of_file: bool
) -> dict[str, MaskReport]:
    """Each structure, within the box that holds it on both sides; `of_file` where the truth is a label file."""
    boxes = [_boxes(found, structures, of_file=False), _boxes(true, structures, of_file=of_file)]
    reports = {}
    for structure, *some in zip(structures, *boxes, strict=True):
        box = _around([b for b in some if b is not None])
        mask = structure.mask(found[box])
        other = structure.truth(true[box]) if of_file else structure.mask(true[box])
        reports[structure.name] = measured(mask, other, spacing_mm)
    return reports


def _boxes(labels: Array, structures: Sequence[Structure], *, of_file: bool) -> Iterator[Box | None]:
    """The box of each structure, None where it is empty."""
    ndimage = need("scipy.ndimage", install="qdq[medical]", for_what="Measuring whole volumes")
    if any(s.bit is not None for s in structures) and not of_file:
        for structure in structures:
            yield next(iter(ndimage.find_objects(structure.mask(labels).view(np.uint8))), None)
        return
    found = ndimage.find_objects(labels)
    for structure in structures:
        some = [found[v - 1] for v in structure.values if 0 < v <= len(found) and found[v - 1] is not None]
        yield _around(some) if some else None


def _around(boxes: Sequence[Box]) -> Box:
    """The box around boxes; one without voxels around none."""
    i, j, k = (
        slice(min((b[a].start for b in boxes), default=0), max((b[a].stop for b in boxes), default=0)) for a in range(3)
    )
    return i, j, k
