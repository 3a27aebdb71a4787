"""From the network's grid back to the image's own: where each voxel of the one lies on the other, by their affines.

labels, or logits channel by channel + both grids -> labels on the image's grid, 0 where the network saw nothing.
Turned, flipped, cropped and resampled grids are all one map for each axis: index on the network's grid = scale x index
on the image's + offset. Labels take the nearest voxel. Logits are interpolated along each axis, the outermost value
beyond the last centre, and decoded on the image's grid, as nnU-Net exports. Must not run a network.

nnU-Net takes the nearest slice along an axis of thick slices (`calib_data.volumes.resample.thick_axis`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.volume import Grid
from calib_data.volumes.resample import thick_axis
from qdq.core.errors import InputError
from qdq.deploy.volumes.decode import Decoder

Array = npt.NDArray[Any]
_SKEW = 0.05  # of a voxel: how far an axis may lead aside from one end to the other
_EDGE = 1e-4  # of a voxel: what rounding moves a position


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Axis:
    """One axis of the target: which axis of the source it runs along, and where each of its voxels lies there."""

    source: int
    at: npt.NDArray[np.float64]
    seen: npt.NDArray[np.bool_]  # within the source


def labels_onto(labels: Array, source: Grid, target: Grid) -> Array:
    """Label values on another grid, each of the nearest voxel; 0 beyond the source.

    Raises:
        InputError: the grids are turned against each other by more than right angles.
    """
    axes = _axes(source, target)
    nearest = [np.clip(np.floor(a.at + 0.5).astype(np.int64), 0, source.shape[a.source] - 1) for a in axes]
    turned = labels.transpose([a.source for a in axes])
    found = turned[np.ix_(*nearest)]
    for n, axis in enumerate(axes):
        if not axis.seen.all():
            np.moveaxis(found, n, 0)[~axis.seen] = 0
    return found


def decoded_onto(
    values: Array, source: Grid, target: Grid, decoder: Decoder, *, separate_z: bool = False, block: int = 32
) -> Array:
    """Logits interpolated onto another grid and decoded there.

    Args:
        values: (channels, i, j, k) on the source's grid.
        source: the network's grid.
        target: the image's grid.
        decoder: makes labels of channels.
        separate_z: take the nearest slice along an axis of thick slices.
        block: slices of the target in memory at a time, in all of one channel.

    Raises:
        InputError: the grids are turned against each other by more than right angles.
    """
    axes = _axes(source, target)
    spacing = [0.0] * 3
    for axis, length in zip(axes, target.spacing_mm, strict=True):
        spacing[axis.source] = length
    coarse = thick_axis(source.spacing_mm, spacing) if separate_z else None
    labels = np.zeros(target.shape, decoder.dtype)
    turned = values.transpose(0, *(1 + a.source for a in axes))
    for begin in range(0, target.shape[0], block):
        rows = slice(begin, begin + block)
        best = np.empty(labels[rows].shape, np.float32)
        for index, channel in enumerate(turned):
            for n, axis in enumerate(axes):
                at = axis.at[rows] if n == 0 else axis.at
                channel = _along(channel, n, at, nearest=axis.source == coarse)
            decoder.channel(labels[rows], best, channel, index)
    for n, axis in enumerate(axes):
        if not axis.seen.all():
            np.moveaxis(labels, n, 0)[~axis.seen] = 0
    return labels


def _along(values: Array, axis: int, at: npt.NDArray[np.float64], *, nearest: bool) -> Array:
    """Values at positions along one axis, linear between two voxels."""
    last = values.shape[axis] - 1
    if nearest:
        return np.take(values, np.clip(np.floor(at + 0.5).astype(np.int64), 0, last), axis)
    held = np.clip(at, 0, last)
    below = np.minimum(np.floor(held).astype(np.int64), max(last - 1, 0))
    share = (held - below).astype(np.float32)
    if not share.any():
        return np.take(values, below, axis)
    shape = [1] * values.ndim
    shape[axis] = -1
    low, high = np.take(values, below, axis), np.take(values, np.minimum(below + 1, last), axis)
    return np.asarray(low + (high - low) * share.reshape(shape), np.float32)


def _axes(source: Grid, target: Grid) -> list[_Axis]:
    """For each axis of the target: where its voxels lie on the source."""
    between = np.linalg.inv(source.affine) @ target.affine
    turn = between[:3, :3]
    order = [int(np.argmax(np.abs(turn[:, n]))) for n in range(3)]
    off = turn.copy()
    off[order, range(3)] = 0
    if sorted(order) != [0, 1, 2] or (np.abs(off) * target.shape).max() > _SKEW:
        raise InputError(
            "The network's grid is turned against the image's by more than right angles, so labels have no place on "
            "it. Preprocess with flips, permutations, crops and a spacing only."
        )
    found = []
    for n, a in enumerate(order):
        at = np.arange(target.shape[n]) * turn[a, n] + between[a, 3]
        seen = (at >= -0.5 - _EDGE) & (at <= source.shape[a] - 0.5 + _EDGE)
        found.append(_Axis(source=a, at=np.asarray(at), seen=np.asarray(seen)))
    return found
