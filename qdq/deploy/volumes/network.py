"""A session or an engine as a function from patches to channels, and what these channels are.

ONNX Runtime session, or Polygraphy runner of an engine -> `Network` -> patches (n, c, i, j, k) in, (n, channels, i, j,
k) out, whatever axes and batch the model has. What the float model gives first decides what channels are (`Reader`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from calib_data.validation import InputSpec
from engines.core import onnx_runtime as ort
from engines.core.documents import replace
from engines.core.errors import EngineError
from engines.verify.meaning import FirstSample, Graph, meanings
from qdq.build.keys.segmentation import Segmentation
from qdq.build.keys.window import Window
from qdq.core.errors import InputError
from qdq.deploy.volumes.decode import Classes, Decoder, Regions

Array = npt.NDArray[Any]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
MOST_KNOWN = 8  # shapes: a window has one, and whole images of many sizes must not fill the memory
Infer = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Arrays by input name -> arrays by output name."""


def inferring(opened: Any) -> Infer:
    """An ONNX Runtime session, or an active Polygraphy runner, whose results are copied: it uses their memory again.

    A function of this kind is taken as it is.

    Raises:
        EngineError: when it is called, and the run fails.
    """
    if hasattr(opened, "get_inputs"):
        return lambda sample: next(ort.run(opened, [sample]))
    if not hasattr(opened, "infer"):
        found: Infer = opened
        return found

    def run(sample: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            return {name: np.array(found) for name, found in opened.infer(dict(sample)).items()}
        except ort.failures() as error:
            raise EngineError(f"Running the engine on a patch failed: {error}") from error

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model's input lies against (n, c, i, j, k).

    Attributes:
        axes: of the input without a batch axis: c, and letters for axes of space.
        batch: patches in a run, None for any number; 0: the input has no batch axis.
        flat: the axis of i, j, k that the input lacks, for it takes slices.
    """

    axes: str
    batch: int | None
    flat: int | None

    @classmethod
    def of(cls, spec: InputSpec, axes: str, sizes: tuple[int, ...]) -> Layout:
        """Of a model's input, for patches of sizes along i, j, k; `axes` as of `calib_data.volumes.spec.VolumeSpec`.

        Raises:
            InputError: it has another rank.
        """
        rank, flat = len(spec.shape), None if "z" in axes else 2
        if flat is None and rank == len(axes) and 1 in sizes:
            flat = sizes.index(1)
            axes = axes.replace(axes.replace("c", "")[flat], "")
        if rank not in (len(axes), len(axes) + 1):
            raise InputError(
                f"Input {spec.name} has {rank} axes, and images have {axes}, with a batch axis or without: for slices "
                "of volumes give a patch with a 1, or a window of two numbers."
            )
        first = spec.shape[0] if rank > len(axes) else 0
        return cls(axes=axes, batch=first if isinstance(first, int) else None, flat=flat)

    def sizes(self, spec: InputSpec) -> tuple[int, ...]:
        """What the model takes along i, j, k; 0: anything."""
        shape = spec.shape[self.batch != 0 :]
        found = [n if isinstance(n, int) else 0 for a, n in zip(self.axes, shape, strict=True) if a != "c"]
        if self.flat is not None:
            found.insert(self.flat, 1)
        return tuple(found)

    def require_channels(self, found: int, spec: InputSpec) -> None:
        """Refuse an image of other channels than the model's.

        Raises:
            InputError: it is one.
        """
        wanted = spec.shape[self.batch != 0 :][self.axes.index("c")]
        if isinstance(wanted, int) and wanted != found:
            raise InputError(
                f"The image has {found} channel{'s' * (found > 1)}, and input {spec.name} of the model takes {wanted}. "
                "nnU-Net's CASE_0000, CASE_0001, image2 of a list, and a fourth axis of NIfTI are channels."
            )

    def fed(self, patches: Array, dtype: str) -> Array:
        """Patches in the axes and the type of the input."""
        array = patches if self.flat is None else patches.squeeze(2 + self.flat)
        array = np.moveaxis(array, 1, 1 + self.axes.index("c"))
        return np.ascontiguousarray(array if self.batch != 0 else array[0], dtype)

    def placed(self, found: Array, channels: int) -> Array:
        """An output, whose channels lie on an axis, as (n, channels, i, j, k)."""
        array = np.moveaxis(found, channels, 1 if self.batch != 0 else 0)
        array = array if self.batch != 0 else array[None]
        return np.ascontiguousarray(array if self.flat is None else np.expand_dims(array, 2 + self.flat), np.float32)


def output_of(opened: Any) -> str:
    """The first output of a session that is a tensor; "" of a runner, which tells when it runs."""
    if not hasattr(opened, "get_inputs"):
        return ""
    return next((o.name for o in opened.get_outputs() if str(o.type).startswith("tensor(")), "")


@dataclass(slots=True, kw_only=True)
class Reader:
    """What the channels of an output are, decided by the first that the float model gives.

    Attributes:
        graph: the float model; None where only values tell.
        output: name of the output; "" takes the first.
        asked: by the recipe.
        task: as in `engines.verify.meaning.meanings`.
        class_axis: as there.
        known: shapes -> what was read of the graph for them, shared by readers of one model.
    """

    graph: ModelProto | None
    output: str
    asked: Segmentation
    task: str = "auto"
    class_axis: int | None = None
    known: dict[Shapes, Graph] = field(default_factory=dict, repr=False)
    _found: tuple[Decoder, int] | None = None

    def channels(self, fed: Mapping[str, Array], values: Array) -> int:
        """The axis of the output's channels.

        Raises:
            InputError: it is no segmentation, or has other channels than the recipe says.
        """
        if self._found is None:
            self._found = self._decided(fed, values)
        return self._found[1]

    @property
    def decoder(self) -> Decoder:
        """What makes labels of the channels; only once an output was seen."""
        assert self._found is not None
        return self._found[0]

    def _read(self, first: FirstSample) -> Graph | None:
        """The graph for the shapes of a sample."""
        if self.graph is None:
            return None
        key = (
            *((name, tuple(shape)) for name, shape in first.inputs.items()),
            *((n, a.shape) for n, a in first.outputs.items()),
        )
        if key not in self.known:
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            self.known[key] = Graph(self.graph, first)
        return self.known[key]

    def _decided(self, fed: Mapping[str, Array], values: Array) -> tuple[Decoder, int]:
        asked, regions = self.asked, self.asked.regions
        first = FirstSample(inputs={name: a.shape for name, a in fed.items()}, outputs={self.output: values})
        task = "segmentation" if self.task == "auto" and asked.overlapping is not None else self.task
        meant = meanings(self._read(first), first, task=task, class_axis=self.class_axis)[self.output]
        alone = meant.axis is None and meant.task != "labels" and values.ndim > 3 and values.shape[1] == 1
        if (meant.axis is None and not alone) or values.dtype.kind not in "fV":
            raise InputError(
                f"Output {self.output} is no segmentation whose windows can be blended: {meant.why}. Scores of classes "
                "at the input's positions are needed; --class-axis says on which axis they lie."
            )
        axis = 1 if meant.axis is None else meant.axis
        channels, parts, names = values.shape[axis], tuple(regions.values()), tuple(regions)
        overlapping = asked.overlapping
        if overlapping is None:
            overlapping = channels == 1 or bool(meant.masks)
        if not overlapping:
            if beyond := next((name for name, some in regions.items() if max(some) >= channels), None):
                raise InputError(f"Structure {beyond!r} has a label beyond the {channels} channels of {self.output}.")
            return Classes(channels=channels, names=names, parts=parts), axis
        if parts and len(parts) != channels:
            raise InputError(f"The recipe has {len(parts)} structures, and output {self.output} {channels} channels.")
        within = bool(values.min() >= 0 and values.max() <= 1)
        threshold = 0.5 if meant.masks or within else 0.0
        order = asked.regions_class_order
        return Regions(channels=channels, threshold=threshold, order=order, names=names, parts=parts), axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A model as `Sliding` calls it: its one input, how that lies, and what is read of its output."""

    infer: Infer
    spec: InputSpec
    layout: Layout
    reader: Reader

    def __call__(self, patches: Array) -> Array:
        """Patches (n, c, i, j, k) -> (n, channels, i, j, k) FP32."""
        size = 1 if self.layout.batch == 0 else self.layout.batch or len(patches)
        made = []
        for begin in range(0, len(patches), size):
            some = patches[begin : begin + size]
            missing = size - len(some)
            full = np.concatenate([some, some[:1].repeat(missing, 0)]) if missing else some
            fed = {self.spec.name: self.layout.fed(full, self.spec.dtype)}
            outputs = self.infer(fed)
            found = outputs[self.reader.output or next(iter(outputs))]
            made.append(self.layout.placed(found, self.reader.channels(fed, found))[: len(some)])
        return made[0] if len(made) == 1 else np.concatenate(made)


def planned(
    spec: InputSpec, axes: str, given: Window | None, patch: tuple[int, ...] | None, pad: float
) -> tuple[Window, Layout]:
    """The window to use, and how the model's input lies in it.

    Args:
        spec: of the model's one input.
        axes: as of `calib_data.volumes.spec.VolumeSpec`.
        given: by the user; None takes the sizes that the model has, else those of `patch`, else the whole volume.
        patch: of the samples, in the order of `axes`.
        pad: what the samples are padded with.

    Raises:
        InputError: the model takes other sizes.
    """
    window = given or Window(patch=(*patch, 1)[:3] if patch else (0, 0, 0), pad_value=pad)
    if len(window.patch) == 2:
        slices = "z" in axes
        sizes = (1, *window.patch) if slices else (*window.patch, 1)
        window = replace(window, patch=sizes, mirror=tuple(a + slices for a in window.mirror))
    layout = Layout.of(spec, axes, window.patch)
    own = layout.sizes(spec)
    if given and any(n and m and n != m for n, m in zip(own, window.patch, strict=True)):
        raise InputError(
            f"The window's patch is {' x '.join(map(str, given.patch))}, and the model takes "
            f"{' x '.join(map(str, own))} (0: any size). Give that patch, or leave out --window."
        )
    return replace(window, patch=tuple(n or m for n, m in zip(own, window.patch, strict=True))), layout
