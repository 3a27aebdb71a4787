"""The parts of an image that are samples, and the padding of one that is smaller.

Source: nnU-Net v2, inference/sliding_window_prediction.py (steps, centred padding).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from calib_data.volume import Volume
from calib_data.volumes.prepare import Prepared
from calib_data.volumes.spec import Patches, VolumeSpec

Start = tuple[int, ...]


def padded(volume: Volume, patch: Sequence[int], value: float = 0) -> Volume:
    """At least as large as the patch: centred, an odd voxel at the end.

    >>> padded(Volume(array=np.ones((1, 5, 1, 1)), affine=np.eye(4)), (8, 1, 1)).array[0, :, 0, 0]
    array([0., 1., 1., 1., 1., 1., 0., 0.])
    """
    missing = [max(0, p - n) for p, n in zip(patch, volume.grid, strict=True)]
    if not any(missing):
        return volume
    before = [m // 2 for m in missing]
    around = [(0, 0), *((b, m - b) for b, m in zip(before, missing, strict=True))]
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array(before, float)
    return Volume(array=np.pad(volume.array, around, constant_values=value), affine=affine)


class Patched(NamedTuple):
    """What patches are cut of: image and label at least as large as they are, and their first voxels."""

    image: Volume
    label: Volume | None
    starts: list[Start]


def patched(made: Prepared, spec: VolumeSpec) -> Patched:
    """The patches of a prepared image, as its recipe says; the whole image where that has no patch."""
    if spec.patch is None:
        return Patched(image=made.image, label=made.label, starts=[(0, 0, 0)])
    patch = (*spec.patch, 1)[:3]
    image = padded(made.image, patch, spec.pad)
    marks = made.foreground and padded(made.foreground, patch)
    found = starts(image, marks, patch, spec.patches or Patches())
    return Patched(image=image, label=made.label and padded(made.label, patch), starts=found)


def steps(size: int, patch: int, step: float = 0.5) -> list[int]:
    """Starts of windows that cover an axis, evenly spread, at most `step` of a patch, or one voxel, apart.

    >>> steps(110, 64), steps(97, 96), steps(200, 96), steps(512, 128)[:3], steps(5, 8)
    ([0, 23, 46], [0, 1], [0, 35, 69, 104], [0, 64, 128], [0])
    """
    if size <= patch:
        return [0]
    count = math.ceil((size - patch) / max(1, patch * step)) + 1
    return [round((size - patch) / (count - 1) * i) for i in range(count)]


def starts(image: Volume, foreground: Volume | None, patch: Sequence[int], how: Patches) -> list[Start]:
    """First voxels of the patches of an image that is at least as large; they depend on the seed and the values alone.

    `sliding`: `per_volume` of all windows, evenly chosen, or all where there are fewer. `foreground`: the patch holds
    a voxel of it near its centre; an empty one is as `random`.
    """
    room = [n - p for n, p in zip(image.grid, patch, strict=True)]
    if how.kind == "sliding":
        windows = list(product(*(steps(n, p) for n, p in zip(image.grid, patch, strict=True))))
        chosen = np.unique(np.linspace(0, len(windows) - 1, how.per_volume).round().astype(int))
        return [windows[n] for n in chosen]
    digest = hashlib.sha256(np.ascontiguousarray(image.array).data).digest()
    random = np.random.default_rng([how.seed, int.from_bytes(digest[:8], "little")])
    if how.kind == "foreground":
        voxels = np.flatnonzero(foreground.array[0]) if foreground else np.zeros(0, int)
        if len(voxels):
            picked = np.unravel_index(voxels[random.integers(0, len(voxels), how.per_volume)], image.grid)
            return [
                tuple(int(np.clip(v - p // 2, 0, r)) for v, p, r in zip(voxel, patch, room, strict=True))
                for voxel in zip(*picked, strict=True)
            ]
    drawn = random.integers(0, np.array(room) + 1, (how.per_volume, 3))
    return [tuple(map(int, start)) for start in drawn]
