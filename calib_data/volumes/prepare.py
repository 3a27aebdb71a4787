"""A case into what a model sees of it: the whole image, in the order of the model's axes.

Case -> read, checked -> turned -> cropped -> normalized -> resampled -> `Prepared`: voxels, label, and where they lie.
The affine goes along, so that what a model finds can be brought back onto the file's grid.
It must not cut patches, nor change an image in a way that the recipe does not name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calib_data.validation import DataError
from calib_data.volume import STORED, Grid, Volume, box_of
from calib_data.volumes.case import Case, check_label, told
from calib_data.volumes.intensity import normalized
from calib_data.volumes.monai import bundle_image
from calib_data.volumes.resample import resampled
from calib_data.volumes.spec import Patches, VolumeSpec, differing

SAME_MM = 0.001  # spacings that differ by less, in share, are one


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A whole image as a model sees it.

    Attributes:
        image: channels and the axes of space in the order of the recipe's `axes`, float32.
        label: one channel on the same grid, in its own type; None where the case has none.
        foreground: the label; without one, voxels above the mean of the file's values in some channel, 1 and 0; None
            where no patches are drawn around it.
        file: the file's grid.
        truth: the label as its file has it, on the file's grid, its axes in the order and direction of the image's.
    """

    image: Volume
    label: Volume | None
    foreground: Volume | None
    file: Grid
    truth: Volume | None


def prepared(case: Case, spec: VolumeSpec) -> Prepared:
    """Read a case and do to it what the recipe says, but for patches.

    Raises:
        DataError: the case cannot be read, or is not what the recipe is for; says which case, and no name.
    """
    with told(case.where):
        return _made(case, *_read(case), spec)


def _read(case: Case) -> tuple[Volume, Volume | None]:
    """Image and label as the files have them, the label's axes in the order and direction of the image's."""
    image = case.image()
    label = case.label().oriented(image.orientation) if case.label else None
    _check_values(image)
    if label is not None:
        check_label(label, image)
    return image, label


def _made(case: Case, image: Volume, truth: Volume | None, spec: VolumeSpec) -> Prepared:
    """What becomes of what was read."""
    if spec.bundle:  # reads the files by itself; ours tells their grid, and refuses what it would not
        seen = _turned(bundle_image(case, spec.bundle), spec)
        _check_values(seen)
        return Prepared(image=seen, label=None, foreground=_above_mean(seen), file=image.place, truth=truth)
    if spec.intensity is None and image.array.dtype.kind in "biu" and np.dtype(spec.dtype).kind == "f":
        raise DataError(
            f"its values are whole numbers ({image.array.dtype}) and the model takes {spec.dtype}: say with "
            "`intensity:` under `volume:` how its training scaled them, or take them as they are with "
            "`intensity: stored`."
        )
    wanted = spec.patches is not None and spec.patches.kind == "foreground"
    marked = _above_mean(image) if wanted and truth is None else truth
    found, *marks = (_turned(v, spec) for v in (image, marked) if v is not None)
    if spec.crop:
        found, *marks = _cropped([found, *marks])
    if spec.normalize == "before":
        found = Volume(array=normalized(found.array, spec.intensity), affine=found.affine)
    found, marks = _on_spacing(found, spec), [_on_spacing(v, spec, label=True) for v in marks]
    if spec.normalize == "after":
        found = Volume(array=normalized(found.array, spec.intensity), affine=found.affine)
    mark = next(iter(marks), None)
    label = None if truth is None else mark
    return Prepared(image=found, label=label, foreground=mark, file=image.place, truth=truth)


def geometry(case: Case, spec: VolumeSpec) -> tuple[str, tuple[float, float, float]]:
    """Orientation of a file's axes; and its spacing in millimetres, in the order of the recipe's axes.

    Raises:
        DataError: its header cannot be read, or does not say.
    """
    with told(case.where):
        volume = Volume(array=np.zeros((1, 1, 1, 1), np.uint8), affine=case.affine())
        return volume.orientation, _turned(volume, spec).spacing_mm


def require_one_geometry(cases: Sequence[Case], spec: VolumeSpec) -> None:
    """Require that what the recipe leaves open is the same in all files.

    Raises:
        DataError: orientations or spacings differ, and the recipe does not say which is wanted.
    """
    if spec.bundle or (spec.orientation is not None and spec.spacing_mm is not None):
        return
    letters, spacings = {}, {}
    for case in cases:
        letters[case.where], spacings[case.where] = geometry(case, spec)
    if spec.orientation is None and len(set(letters.values())) > 1:
        raise differing(letters, "orientation")
    first = next(iter(spacings.values()), (1.0, 1.0, 1.0))
    same = all(np.allclose(spacing, first, rtol=SAME_MM, atol=0) for spacing in spacings.values())
    if spec.spacing_mm is None and not same:
        said = {where: " x ".join(f"{size:.4g}" for size in sizes) + " mm" for where, sizes in spacings.items()}
        raise differing(said, "spacing_mm")


def described(case: Case, spec: VolumeSpec) -> dict[str, str]:
    """What a case holds and what becomes of it, in words without a name."""
    with told(case.where):
        image, truth = _read(case)
        made, stored = _made(case, image, truth, spec), _said(image, spec)
    label = "" if truth is None else f"label {', '.join(f'{v:g}' for v in np.unique(truth.array)[:12])}"
    found = {"case": case.where, "stored": stored, "seen": _said(made.image, spec), "label": label}
    return {**found, "samples": _samples(made, spec)}


def _samples(made: Prepared, spec: VolumeSpec) -> str:
    """Which parts are samples, and what is done where that does not fit the image."""
    if not spec.patch:
        return "the whole image"
    how, patch = spec.patches or Patches(), (*spec.patch, 1)[:3]
    text = f"{how.per_volume} {how.kind} patches of {'x'.join(map(str, spec.patch))}"
    if any(n < p for n, p in zip(made.image.grid, patch, strict=True)):
        text += f"; the image is smaller and padded with {spec.pad:g}"
    if how.kind == "foreground" and (made.foreground is None or not made.foreground.array.any()):
        text += "; there is no foreground, so they are random"
    return text


def _said(volume: Volume, spec: VolumeSpec) -> str:
    channels = f"{len(volume.array)} channel{'s' * (len(volume.array) > 1)}"
    values = f"{volume.array.dtype} {float(volume.array.min()):.4g} to {float(volume.array.max()):.4g}"
    return f"{channels} of {spec.said(volume)}, {values}"


def _above_mean(image: Volume) -> Volume:
    means = image.array.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64)
    return Volume(array=(image.array > means).any(axis=0)[None].astype(np.uint8), affine=image.affine)


def _check_values(image: Volume) -> None:
    if image.array.dtype.kind == "f" and (bad := int(np.count_nonzero(~np.isfinite(image.array)))):
        raise DataError(
            f"{bad} of its {image.array.size} voxels are NaN or infinite; every one must be a number. Set them to what "
            "the model's training had there, for instance 0 or air."
        )


def _turned(volume: Volume, spec: VolumeSpec) -> Volume:
    """In the recipe's orientation, with i, j, k in the order of its axes; pictures keep z, of size 1, last."""
    turned = volume.oriented(spec.orientation or STORED)
    if spec.flat and turned.grid[2] != 1:
        raise DataError(f"it has {turned.grid[2]} slices, and axes is {spec.axes}, without z.")
    order = ["xyz".index(axis) for axis in (*spec.spatial, "z")[:3]]
    return Volume(array=turned.array.transpose(0, *(n + 1 for n in order)), affine=turned.affine[:, [*order, 3]])


def _cropped(volumes: Sequence[Volume]) -> list[Volume]:
    """The box of the first one's voxels that are not 0 in some channel; the whole image where there is none."""
    box = box_of((volumes[0].array != 0).any(axis=0))
    if box[0].stop == 0:
        return list(volumes)
    affine = volumes[0].affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.array([side.start for side in box], float)
    return [Volume(array=v.array[(slice(None), *box)], affine=affine) for v in volumes]


def _on_spacing(volume: Volume, spec: VolumeSpec, *, label: bool = False) -> Volume:
    """The volume on the recipe's spacing, where it names one."""
    if spec.spacing_mm is None or spec.spacing_mm == STORED or spec.grid is None:
        return volume
    wanted = (*spec.spacing_mm, None)[:3]
    a, b, c = (own if size is None else size for size, own in zip(wanted, volume.spacing_mm, strict=True))
    if label:
        return resampled(volume, (a, b, c), grid=spec.grid, order=0)
    thick = spec.separate_z == "auto"
    return resampled(volume, (a, b, c), grid=spec.grid, order=spec.order, separate=thick, order_z=spec.order_z)
