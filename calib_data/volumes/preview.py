"""A picture of what a model will see: three planes of each channel, with the letters of the axes' ends.

prepared images -> PNG. Every plane is drawn as the array has it: its first axis to the right, its second upwards;
pictures as they are looked at.
It must not know what a case is called.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from calib_data.extras import need
from calib_data.validation import Array
from calib_data.volume import ENDS, Volume
from calib_data.volumes.case import Case
from calib_data.volumes.patches import Start, patched
from calib_data.volumes.prepare import prepared
from calib_data.volumes.spec import VolumeSpec

MOST_CASES, MOST_CHANNELS, MOST_PATCHES = 6, 4, 8
_PLANES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))  # axis to the right, axis upwards, axis cut through
_OPPOSITE = {end: other for ends in ENDS for end, other in zip(ends, reversed(ends), strict=True)}


def preview(cases: Sequence[Case], spec: VolumeSpec) -> bytes:
    """A PNG of the first cases: a row for each channel, with its range of values, spacing and shape.

    Labels are drawn over the image, and the patches that are taken of it as frames.

    Raises:
        DataError: a case is not what the recipe is for.
        MissingExtraError: Matplotlib is not installed.
    """
    figures = need("matplotlib.figure", install="qdq[plot]", for_what="A preview")
    rows = [row for case in cases[:MOST_CASES] for row in _rows(case, spec)]
    figure = figures.Figure(figsize=(12, 4.6 * len(rows)), layout="constrained")
    planes: Sequence[tuple[int, int, int]] = _PLANES
    if spec.flat:
        planes = [(spec.spatial.index("x"), spec.spatial.index("y"), 2)]
    for panel, (title, image, label, frames) in zip(np.ravel(figure.subfigures(len(rows), 1)), rows, strict=True):
        panel.suptitle(title, fontsize=10)
        for axes, plane in zip(np.ravel(panel.subplots(1, len(planes))), planes, strict=True):
            _draw(axes, plane, image, label, frames, spec)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def _rows(case: Case, spec: VolumeSpec) -> Iterator[tuple[str, Volume, Volume | None, list[Start]]]:
    """Title, one channel, label and patches, for each channel."""
    made = prepared(case, spec)
    image, label, frames = patched(made, spec)
    for n, channel in enumerate(image.array[:MOST_CHANNELS], 1):
        low, high, mean = float(channel.min()), float(channel.max()), float(channel.mean(dtype=np.float64))
        values = f"values {low:.4g} to {high:.4g}, mean {mean:.4g}"
        title = f"{case.where}, channel {n} of {len(image.array)}: {values}; {spec.said(image)}"
        yield title, Volume(array=channel[None], affine=image.affine), label, frames[:MOST_PATCHES]


def _draw(
    axes: Any,
    plane: tuple[int, int, int],
    image: Volume,
    label: Volume | None,
    frames: Sequence[Start],
    spec: VolumeSpec,
) -> None:
    """One plane through the middle."""
    right, up, cut = plane
    at, names = image.grid[cut] // 2, (*spec.spatial, "z")[:3]
    array, letters, spacing = image.array[0], image.orientation, image.spacing_mm
    how: dict[str, Any] = {
        "origin": "upper" if spec.flat else "lower",
        "aspect": spacing[up] / spacing[right],
        "interpolation": "nearest",
    }
    low, high = float(array.min()), float(array.max())
    axes.imshow(_plane(array, plane, at), cmap="gray", vmin=low, vmax=high, **how)
    if label is not None:
        axes.imshow(np.ma.masked_equal(_plane(label.array[0], plane, at), 0), cmap="tab20", alpha=0.45, **how)
    for start in frames if spec.patch else ():
        size = (*(spec.patch or ()), 1)[:3]
        if start[cut] <= at < start[cut] + size[cut]:
            corner = (start[right] - 0.5, start[up] - 0.5)
            axes.add_patch(_rectangle(corner, size[right], size[up]))
    axes.tick_params(labelsize=7)
    if spec.flat:
        return
    ends = ((0.5, 0.97, letters[up]), (0.5, 0.03, _OPPOSITE[letters[up]]))
    sides = ((0.97, 0.5, letters[right]), (0.03, 0.5, _OPPOSITE[letters[right]]))
    for x, y, letter in (*ends, *sides):
        axes.text(x, y, letter, transform=axes.transAxes, color="yellow", ha="center", va="center", fontsize=11)
    axes.set_title(f"{names[cut]} = {at} of {image.grid[cut]}", fontsize=9)
    axes.set_xlabel(f"{names[right]}, {letters[right]} is right", fontsize=8)
    axes.set_ylabel(f"{names[up]}, {letters[up]} is up", fontsize=8)


def _plane(array: Array, plane: tuple[int, int, int], at: int) -> Array:
    """One slice, rows upwards."""
    right, up, cut = plane
    found: Array = np.take(array, [at], cut).squeeze(cut)
    return found.T if right < up else found


def _rectangle(corner: tuple[float, float], width: int, height: int) -> Any:
    patches = need("matplotlib.patches", install="qdq[plot]", for_what="A preview")
    return patches.Rectangle(corner, width, height, fill=False, edgecolor="tab:orange", linewidth=1)
