"""Images of a service, one at a time and from any thread: the entry point of `engines.open(...).segment`.

inference.json -> `Served` -> a file, a folder or an array -> prepared, run window by window -> `SegmentedImage`.
What an image gives depends on nothing that came before it. Must not tell what an image is called.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from calib_data import InputSpec
from calib_data.sources import ImageForm, form_of
from calib_data.volume import Grid, Volume
from calib_data.volumes.case import Case
from calib_data.volumes.prepare import prepared
from calib_data.volumes.samples import CaseSamples, cases_of
from engines.core.documents import DocumentError, replace as changed
from engines.core.errors import OutOfMemoryError
from engines.core.files import write_atomic
from engines.verify.meaning import Graph
from qdq.core.errors import InputError
from qdq.core.resources import default_bytes
from qdq.deploy.volumes.decode import Structure
from qdq.deploy.volumes.evaluate import Segmenter, named
from qdq.deploy.volumes.inference import InferenceFile
from qdq.deploy.volumes.network import Network, Reader, Shapes, planned
from qdq.deploy.volumes.segment import names, nifti

Array = npt.NDArray[Any]
LOG = logging.getLogger("engines")
WHERE = "the image"  # what messages call it
CHANNELS = 16  # of an output that does not say how many it has


class Takes(Protocol):
    """An input or an output, as `engines.runtime.arrays.TensorSpec`."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def dtype(self) -> str:
        """Numpy's name."""

    @property
    def shape(self) -> tuple[int | None, ...]:
        """None where a size is open."""

    @property
    def ranges(self) -> tuple[Any, ...]:
        """`ShapeRange` of each optimization profile."""


class Runs(Protocol):
    """What runs, as `engines.Predictor`."""

    @property
    def inputs(self) -> Sequence[Takes]:
        """Of the model."""

    @property
    def outputs(self) -> Sequence[Takes]:
        """Of the model."""

    @property
    def sha256(self) -> str:
        """Of the Q/DQ model."""

    @property
    def graph(self) -> ModelProto | None:
        """Of the Q/DQ model; None where it is not there."""

    def run(self, sample: Mapping[str, Array]) -> dict[str, Array]:
        """From any thread."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentedImage:
    """The labels of an image on its own grid.

    Attributes:
        affine: (4, 4) float64, voxel index to RAS+ millimetres.
        names: structure -> its label value or values; of channels that overlap, its index along the fourth axis.
        said: how the labels were made, one sentence.
    """

    affine: npt.NDArray[np.float64]
    names: dict[str, int | list[int]]
    said: str
    _labels: Array = field(repr=False)
    _structures: tuple[Structure, ...]

    @property
    def array(self) -> Array:
        """(i, j, k) labels, 0 the background; of channels that overlap (i, j, k, channel), 1 where it is."""
        if any(s.bit is not None for s in self._structures):
            return np.stack([s.mask(self._labels) for s in self._structures], axis=-1).astype(np.uint8)
        return self._labels

    def to_bytes(self) -> bytes:
        """The content of a .nii.gz file, with the names of structures in a comment; nothing of the image's file.

        Raises:
            MissingExtraError: nibabel is not installed.
        """
        i, j, k = self._labels.shape
        return nifti(self._labels, Grid(shape=(i, j, k), affine=self.affine), self._structures)

    def save(self, path: Path | str) -> None:
        """Write a NIfTI file, whole or not at all.

        Raises:
            InputError: its name ends neither in .nii nor in .nii.gz, or the folder is not writable.
        """
        if not str(path).endswith((".nii", ".nii.gz")):
            raise InputError(f"Cannot write {path}: labels are NIfTI, so its name must end in .nii or .nii.gz.")
        content = self.to_bytes()
        write_atomic(path, content if str(path).endswith(".gz") else gzip.decompress(content), error=InputError)


class Served:
    """How one opened model segments images.

    Attributes:
        batch: windows in a run, at most; less once a run of so many did not fit the memory.
        said: the windows and what they are, one sentence.
    """

    def __init__(self, model: Runs, content: bytes) -> None:
        """For a model and the content of its inference.json.

        Raises:
            InputError: it is of another model or version, or its window does not fit the model.
        """
        try:
            self._file = InferenceFile.from_json(content)
        except DocumentError as error:
            raise InputError(f"Cannot use inference.json: {error}.") from None
        if self._file.model != model.sha256:
            raise InputError(
                f"inference.json is of another model: it names the sha256 {self._file.model[:12]}…, and the model that "
                f"was opened has {model.sha256[:12]}…. Put the file of this model there, or deploy again."
            )
        if len(model.inputs) != 1:
            raise InputError(f"The model has {len(model.inputs)} inputs; a network of images has one.")
        own, self._model, self._lock = model.inputs[0], model, threading.Lock()
        self._known: dict[Shapes, Graph] = {}
        self._given = InputSpec(name=own.name, dtype=own.dtype, shape=own.shape)
        spec = self._spec = self._file.spec
        self._window, layout = planned(self._given, spec.axes, self._file.window, spec.patch, spec.pad)
        self._splits, self._layout = layout.batch is None, layout
        self.batch, self.said = self._most(own), self._window.said

    def __call__(self, volume: Any, affine: Any = None) -> SegmentedImage:
        """The labels of an image; see `engines.Predictor.segment`.

        Raises:
            InputError: it is no single image, or of another grid or other channels than the model takes.
            DataError: the file is damaged, or not what the recipe is for.
            EngineError: a run failed.
        """
        case, file = _case(volume, affine), self._file
        file.require_alike(case)
        source = CaseSamples(cases=(case,), spec=self._spec, inputs=(self._given,))
        whole = changed(file.whole, window=changed(self._window, batch=self.batch))
        reader = self._reader()
        one = Segmenter(self._infer, source, whole, reader)
        made = prepared(case, self._spec)
        with named(case):
            labels = one.labels(made.image, made.file)
        structures = reader.decoder.structures
        said = f"{one.sliding.window.said}; {reader.decoder.said}; on the image's own grid by {one.said}"
        return SegmentedImage(
            affine=made.file.affine, names=names(structures), said=said, _labels=labels, _structures=structures
        )

    def warm_up(self) -> None:
        """Run one window of zeros; axes that the window leaves open have 32 voxels."""
        sizes = tuple(n or 32 for n in self._window.patch)
        wanted = self._given.shape[self._layout.batch != 0 :][self._layout.axes.index("c")]
        patches = np.zeros((1, wanted if isinstance(wanted, int) else 1, *sizes), np.float32)
        Network(infer=self._infer, spec=self._given, layout=self._layout, reader=self._reader())(patches)

    def _reader(self) -> Reader:
        """A new one for each image; what was read of the graph is kept."""
        file = self._file
        return Reader(
            graph=self._model.graph,
            output=self._model.outputs[0].name,
            asked=file.segmentation,
            task=file.task,
            class_axis=file.class_axis,
            known=self._known,
        )

    def _most(self, own: Takes) -> int:
        """Windows in a run: all that a profile of an engine takes, what the recipe says elsewhere.

        On a CPU more windows at a time gain nothing (two networks, 1 to 8 windows: 0.95 to 1.10 of the time). The
        outputs have to fit a quarter of the memory.
        """
        if not self._splits:
            return self._layout.batch or 1
        most = max((int(r.max[0]) for r in own.ranges), default=self._window.batch)
        voxels = math.prod(n or 1 for n in self._window.patch)
        sizes = [n for n in self._model.outputs[0].shape[1:] if n is not None]
        channels = max(1, math.prod(sizes) // voxels) if len(sizes) == len(own.shape) - 1 else CHANNELS
        return max(1, min(most, default_bytes() // 4 // (8 * channels * voxels)))

    def _infer(self, sample: Mapping[str, Array]) -> Mapping[str, Array]:
        """A run, in smaller parts where it does not fit the memory."""
        ((name, array),) = sample.items()
        while True:
            batch = self.batch
            try:
                if not self._splits or len(array) <= batch:
                    return self._model.run({name: array})
                parts = [self._model.run({name: array[n : n + batch]}) for n in range(0, len(array), batch)]
                return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            except OutOfMemoryError:
                tried = min(batch, len(array))
                if not self._splits or tried == 1:
                    raise
                self._take_less(tried)

    def _take_less(self, tried: int) -> None:
        with self._lock:
            if self.batch >= tried:  # else another thread found out before
                self.batch = tried // 2
                LOG.warning(
                    "A run of %d windows needs more memory than there is: %d at a time from now on.", tried, self.batch
                )


def _case(volume: Any, affine: Any) -> Case:
    """One image without a name.

    Raises:
        InputError: it is none, or several.
        DataError: there is nothing.
    """
    if isinstance(volume, str | os.PathLike):
        if affine is not None:
            raise InputError("An affine belongs to an array; a file has its own. Leave it out.")
        form = form_of(os.fspath(volume))
        if not isinstance(form, ImageForm):
            raise InputError("segment takes one image (NIfTI, DICOM, NRRD, MetaImage), and arrays lie there.")
        cases = cases_of(form, os.fspath(volume), None)
        if len(cases) != 1:
            raise InputError(f"segment takes one image, and {len(cases)} lie there: give one of them.")
        return replace(cases[0], label=None, where=WHERE, key="")
    array = np.asarray(volume)
    if array.dtype.kind not in "biuf" or array.ndim not in (3, 4):
        raise InputError(
            f"segment takes a path or an array (i, j, k) or (channels, i, j, k) of numbers, and got "
            f"{type(volume).__name__} of {array.dtype} {array.shape}."
        )
    if affine is None:
        raise InputError(
            "segment needs the affine of an array, (4, 4): voxel index to RAS+ millimetres. Without it nobody knows "
            "which side is left: segment(array, affine)."
        )
    place = _placed(affine)
    image = Volume(array=array[None] if array.ndim == 3 else array, affine=place)
    return Case(name="", image=lambda: image, affine=lambda: place, where=WHERE)


def _placed(affine: Any) -> npt.NDArray[np.float64]:
    """The affine of an array, checked.

    Raises:
        InputError: it is none.
    """
    try:
        place = np.asarray(affine, np.float64)
    except (TypeError, ValueError):
        place = np.empty(0)
    if place.shape != (4, 4) or not np.isfinite(place).all() or not np.linalg.det(place):
        raise InputError(
            "segment needs the affine of an array as (4, 4) finite numbers, voxel index to RAS+ millimetres, whose "
            f"axes have a length; got {type(affine).__name__} of the shape {np.shape(affine)}."
        )
    return place
