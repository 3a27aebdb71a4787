"""Cases as samples of a model: each prepared when it is read, cut into patches, in the model's axes and dtype.

`open_cases` -> `CaseSamples`, a source as those of files of arrays are; it holds one image at a time.
It must not keep an image, nor tell what a case is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from calib_data.sources import ArrayForm, ImageForm, RawSample, SampleShapes
from calib_data.validation import Array, DataError, InputSpec
from calib_data.volumes.case import Case, Cases, keyed
from calib_data.volumes.patches import patched
from calib_data.volumes.prepare import prepared, require_one_geometry
from calib_data.volumes.spec import Patches, VolumeSpec

LABEL = "label"
"""The name of the labels' array, for a model's evaluation: (1, spatial axes of the recipe) of whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSamples:
    """The patches of all cases, one case after the other; without a patch, each whole image.

    Attributes:
        cases: keyed.
        spec: what is done to each.
        inputs: the model's one input, and `LABEL` where it is asked for.
        left_out: as of `Cases`.
        shapes_seen: index -> shapes, of samples that were read.
    """

    cases: Sequence[Case]
    spec: VolumeSpec
    inputs: Sequence[InputSpec]
    left_out: str = ""
    shapes_seen: dict[int, SampleShapes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int | None:
        """Number of samples; None where that depends on how large the images are."""
        if self._patches is None:
            return len(self.cases)
        return None if self._patches.kind == "sliding" else len(self.cases) * self._patches.per_volume

    def read(self, indices: range) -> Iterator[RawSample]:
        """Prepare one case after the other; a case without wanted samples is not read where that is known before."""
        patches, number = self._patches, 0
        each = None if patches and patches.kind == "sliding" else patches.per_volume if patches else 1
        for case in self.cases:
            if each is not None and not any(n in indices for n in range(number, number + each)):
                number += each
                continue
            if indices and number > indices[-1]:
                return
            for sample in self._of(case):
                if number in indices:
                    shapes = {name: array.shape for name, array in sample.arrays.items()}
                    self.shapes_seen[number] = SampleShapes(sample.where, shapes)
                    yield sample
                number += 1

    def shapes(self, indices: range) -> Iterator[SampleShapes]:
        """Those of the same samples; read where they were not before."""
        for i in range(
            indices.start, indices.stop if self.count is None else min(indices.stop, self.count), indices.step
        ):
            if i not in self.shapes_seen and not any(True for _ in self.read(range(i, i + 1))):
                return
            yield self.shapes_seen[i]

    @property
    def _patches(self) -> Patches | None:
        return (self.spec.patches or Patches()) if self.spec.patch else None

    def _of(self, case: Case) -> Iterator[RawSample]:
        """The samples of a case."""
        made = prepared(case, self.spec)
        label = made.label
        if label is None and len(self.inputs) > 1:
            why = "it has no label" if made.truth is None else "a MONAI bundle's transforms do not see its label"
            raise DataError(f"Cannot use {case.where}: {why}, and labels of samples are asked for.")
        if self.spec.patch is None:
            yield self._sample(case.where, made.image.array, label.array if label else None)
            return
        patch = (*self.spec.patch, 1)[:3]
        image, label, starts = patched(made, self.spec)
        for number, start in enumerate(starts, 1):
            window = (slice(None), *(slice(s, s + p) for s, p in zip(start, patch, strict=True)))
            cut = label.array[window] if label else None
            yield self._sample(f"{case.where}, patch {number}", image.array[window], cut)

    def _sample(self, where: str, image: Array, label: Array | None) -> RawSample:
        """In the axes of the recipe, with a batch axis; a model of slices gets no axis where the patch has size 1."""
        spec, axes, sizes = self.inputs[0], self.spec.axes, list(image.shape[1:])
        if self.spec.flat:
            sizes.pop()
        batch = len(spec.shape) > len(axes)
        if not batch and self.spec.patch and 1 in self.spec.patch:
            at = self.spec.patch.index(1)
            sizes.pop(at)
            axes, batch = axes.replace(self.spec.spatial[at], ""), True
        array = np.moveaxis(image.reshape(len(image), *sizes), 0, axes.index("c"))
        if self.spec.patch is None:
            self._require_size(array.shape, axes, spec.shape[batch:], where)
        arrays = {spec.name: _as_dtype(array[None] if batch else array, self.spec.dtype, where)}
        for wanted in self.inputs[1:]:
            if label is not None:
                arrays[wanted.name] = label.astype(np.int64).reshape(1, *sizes)
        return RawSample(where, arrays)

    def _require_size(self, shape: Sequence[int], axes: str, model: Sequence[int | str | None], where: str) -> None:
        """Refuse a whole image of another size than the model's, with the key that cuts it."""
        pairs = [(n, m) for axis, n, m in zip(axes, shape, model, strict=False) if axis != "c"]
        if any(isinstance(m, int) and m != n for n, m in pairs):
            size = " x ".join(str(n) for n, _ in pairs)
            needed = " x ".join(str(m) if isinstance(m, int) else "any" for _, m in pairs)
            raise DataError(
                f"Cannot use {where}: the image is {size} as the model would get it, and the model takes {needed}. Cut "
                f"it with `patch:` under `volume:` in a recipe, and `spacing_mm:` if its voxels have another size."
            )


def cases_of(form: ImageForm, source: str, key: bytes | None) -> Cases:
    """The keyed cases of a text that a form of images owns; nothing that is said holds a path.

    Raises:
        DataError: there is none, or what is there cannot be read.
    """
    try:
        found = form.cases(source)
    except OSError as error:
        raise DataError(f"Cannot list the images: {error.strerror}. Check the rights of what --data names.") from None
    if not found:
        raise DataError("No samples: there is no image where --data points to.")
    cases = Cases(keyed(found, key))
    cases.left_out = found.left_out
    return cases


def open_cases(
    form: ImageForm, source: str, inputs: Sequence[InputSpec], spec: VolumeSpec | None, key: bytes | None
) -> CaseSamples:
    """The samples of a text that a form of images owns.

    Args:
        form: owns it.
        source: the text.
        inputs: the model's one input; or that and `LABEL`.
        spec: what is done to each image; None only where all images agree in orientation and spacing.
        key: of the cases' keys.

    Raises:
        DataError: the model has several inputs; there is no case; what the recipe leaves open differs between files.
    """
    own = [one for one in inputs if one.name != LABEL] or list(inputs)
    if len(own) != 1:
        raise DataError(
            f"The model has the inputs {', '.join(repr(one.name) for one in own)}, and images are samples of a model "
            "of one: its channels. Save .npz files for this model, with an array for each input."
        )
    cases = cases_of(form, source, key)
    given = [*own, *(i for i in inputs if i is not own[0])]
    found = CaseSamples(cases=cases, spec=spec or VolumeSpec(), inputs=given, left_out=cases.left_out)
    require_one_geometry(cases, found.spec)
    return found


def label_form(form: ImageForm, source: str, spec: VolumeSpec | None) -> dict[str, ArrayForm]:
    """The labels' array, by its rank, where the cases have labels."""
    rank = len((spec or VolumeSpec()).axes)
    return {LABEL: ArrayForm((1,) * rank, np.dtype("int64"))} if any(c.label for c in form.cases(source)) else {}


def _as_dtype(array: Array, dtype: str, where: str) -> Array:
    """The array in the recipe's dtype.

    Raises:
        DataError: values are no whole numbers, or too large for it.
    """
    wanted = np.dtype(dtype)
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        if (array != np.rint(array)).any() or array.min() < limits.min or array.max() > limits.max:
            raise DataError(
                f"Cannot use {where}: its values, from {array.min():g} to {array.max():g}, are not all whole numbers "
                f"that {dtype} holds. Leave `intensity` out, or take dtype: float32."
            )
    return array.astype(wanted)
