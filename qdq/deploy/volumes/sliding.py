"""A network over a whole volume, window by window; what no later window touches is handed over at once.

volume (c, i, j, k) -> padded to the patch -> windows in order along one axis, weighted sums in one slab -> `Part` after
part of the mean output -> a consumer, which makes labels of it. Memory: the volume, what the consumer keeps, outputs of
a batch, and one slab: channels x patch length x the other two axes, FP32. Where that is more than the memory given,
the second axis is cut into strips, one after the other; windows on a seam are then run once for each strip, which
`Sliding.repeated` counts. Neither the order of sums at a voxel nor any value depends on it. Must not know what the
channels mean.

nnU-Net adds up in FP16; here it is FP32, with nnU-Net's FP16 weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.build.keys.window import PADDINGS, Window
from qdq.core.errors import InputError
from qdq.core.resources import default_bytes, said_bytes

Array = npt.NDArray[Any]
Run = Callable[[Array], Array]
"""Patches (n, c, i, j, k) FP32 -> outputs (n, channels, i, j, k) FP32, one for each, in memory that may be changed."""

Start = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The mean output where it is final.

    Attributes:
        place: along i, j, k of the volume.
        values: (channels, i, j, k) FP32; the memory is used again once the next part is asked for.
    """

    place: tuple[slice, slice, slice]
    values: Array


@dataclass(slots=True, kw_only=True)
class Sliding:
    """A network, and how its window goes over volumes.

    Attributes:
        run: the network.
        window: sizes, steps and weights.
        repeated: windows that were run once more because a slab did not fit the memory.
        runs: windows in all, with the repeated ones, without mirrored ones.
        padded: volumes of which some axis was shorter than the patch.
    """

    run: Run
    window: Window
    repeated: int = 0
    runs: int = 0
    padded: int = 0
    _known: dict[Start, Array] = field(default_factory=dict)

    @property
    def said(self) -> str:
        """The window, and what it was padded with where a volume was smaller, in words."""
        if not self.padded:
            return self.window.said
        value = f" {self.window.pad_value:g}" if self.window.padding == "constant" else ""
        some = f"{self.padded} volume{'s' * (self.padded > 1)} smaller than that"
        return f"{self.window.said}; {some}, padded ({self.window.padding}{value}) on both sides"

    def parts(self, volume: Array, *, room: int | None = None) -> Iterator[Part]:
        """The mean output of a volume, part by part; together the parts are the whole volume, each voxel once.

        Args:
            volume: (c, i, j, k), any numbers; patches of it are made FP32.
            room: bytes for the slab; None takes half of the memory budget.

        Raises:
            InputError: values that are not finite go in or come out; outputs of another size than the patch.
        """
        if not np.isfinite(volume).all():
            wrong = int(volume.size - np.count_nonzero(np.isfinite(volume)))
            raise InputError(
                f"{wrong} of {volume.size} voxels are NaN or infinite, and a network's result for every patch that "
                "holds one would be too. Write the volume with a number in their place, such as the background's."
            )
        shape = volume.shape[1:]
        sizes = self.window.sizes(shape)
        inside = [(max(size - n, 0) // 2, n) for size, n in zip(sizes, shape, strict=True)]
        padded = self._padded(volume, sizes, inside)
        for part in self._final(padded, sizes, default_bytes() // 2 if room is None else room):
            cut = [
                slice(max(p.start, first), min(p.stop, first + n))
                for p, (first, n) in zip(part.place, inside, strict=True)
            ]
            if any(c.start >= c.stop for c in cut):
                continue
            within = tuple(slice(c.start - p.start, c.stop - p.start) for c, p in zip(cut, part.place, strict=True))
            i, j, k = (slice(c.start - first, c.stop - first) for c, (first, _) in zip(cut, inside, strict=True))
            yield Part(place=(i, j, k), values=part.values[(slice(None), *within)])

    def _padded(self, volume: Array, sizes: tuple[int, ...], inside: list[tuple[int, int]]) -> Array:
        """The volume in the middle of one that no axis of the patch exceeds."""
        widths = [(first, max(size - n, 0) - first) for size, (first, n) in zip(sizes, inside, strict=True)]
        if not any(map(any, widths)):
            return volume
        self.padded += 1
        mode = PADDINGS[self.window.padding]
        given: dict[str, Any] = {"constant_values": self.window.pad_value} if mode == "constant" else {}
        short = [n for (_, n), (_, after) in zip(inside, widths, strict=True) if after >= n]
        if short and mode == "reflect":
            raise InputError(
                f"An axis of {short[0]} voxels cannot be reflected to the patch, {' x '.join(map(str, sizes))}: "
                "reflection adds less than the axis has. Choose a smaller patch, or the padding constant or replicate."
            )
        kind = np.float32 if mode == "constant" else volume.dtype
        return np.pad(volume.astype(kind, copy=False), [(0, 0), *widths], mode=mode, **given)  # type: ignore[call-overload,no-any-return]

    def _final(self, volume: Array, sizes: Start, room: int) -> Iterator[Part]:
        """The parts of a volume that no axis of the patch exceeds."""
        shape = volume.shape[1:]
        axis = min(range(3), key=lambda a: sizes[a] / shape[a])  # the slab along it is the smallest
        order = [axis, *(a for a in range(3) if a != axis)]
        starts = [self.window.starts(shape[a], sizes[a]) for a in order]
        weight = self.window.map(sizes).transpose(order)
        first: Start = (starts[0][0], starts[1][0], starts[2][0])
        self._known = {first: self._outputs(volume, order, sizes, [first])[0]}
        channels = len(self._known[first])
        long, wide, deep = (shape[a] for a in order)
        size = [sizes[a] for a in order]
        per_row = 4 * (channels + 1) * size[0] * deep
        left = room - 8 * self.window.batch * channels * math.prod(size)  # the outputs of a batch, twice
        strips = min(-(-wide * per_row // max(left, 1)), -(-wide // size[1]) * 8)
        width = max(-(-wide // strips), 1)
        slab = np.empty((channels, size[0], width, deep), np.float32)  # once: two would be in memory at a seam
        weights = np.empty(slab.shape[1:], np.float32)
        seen: set[Start] = set()
        for low in range(0, wide, width):
            high = min(low + width, wide)
            across = [s for s in starts[1] if s < high and s + size[1] > low]
            sums, total = slab[:, :, : high - low], weights[:, : high - low]
            sums[...] = total[...] = 0
            for n, at in enumerate(starts[0]):
                every = [(at, b, c) for b, c in product(across, starts[2])]
                self.repeated += len(seen.intersection(every))
                self.runs += len(every)
                seen.update(every)
                for begin in range(0, len(every), self.window.batch):
                    some = every[begin : begin + self.window.batch]
                    for start, made in zip(some, self._outputs(volume, order, sizes, some), strict=True):
                        _, b, c = start
                        cut = slice(max(low - b, 0), min(high - b, size[1]))
                        to = (slice(None), slice(b + cut.start - low, b + cut.stop - low), slice(c, c + size[2]))
                        counted = made[:, :, cut]
                        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
                            counted *= weight[:, cut]
                            sums[(slice(None), *to)] += counted
                        total[to] += weight[:, cut]
                following = starts[0][n + 1] if n + 1 < len(starts[0]) else long
                done = following - at
                values = sums[:, :done]
                with np.errstate(invalid="ignore"):
                    values /= total[:done]
                place = [slice(0)] * 3
                for a, found in zip(order, (slice(at, following), slice(low, high), slice(0, deep)), strict=True):
                    place[a] = found
                if not all(np.isfinite(channel).all() for channel in values):
                    where = ", ".join(f"{p.start} to {p.stop - 1}" for p in place)
                    raise InputError(
                        f"The network gives values that are not finite, somewhere in voxels {where}, from finite ones."
                    )
                i, j, k = place
                yield Part(place=(i, j, k), values=np.moveaxis(values, 1, 1 + axis))
                for kept in (*sums, total):  # channel by channel: a move within itself makes a copy first
                    kept[: size[0] - done] = kept[done:].copy()
                    kept[size[0] - done :] = 0

    def _outputs(self, volume: Array, order: list[int], sizes: Start, starts: list[Start]) -> list[Array]:
        """The outputs of windows, axes in this order, each an array that may be changed."""
        known = [self._known.pop(s) if s in self._known else None for s in starts]
        missing = [s for s, found in zip(starts, known, strict=True) if found is None]
        made: Iterator[Array] = iter(())
        if missing:
            moved = np.moveaxis(volume, 1 + order[0], 1)
            size = [sizes[a] for a in order]
            patches = np.stack(
                [moved[(slice(None), *(slice(b, b + n) for b, n in zip(s, size, strict=True)))] for s in missing]
            )
            found = self._run(np.ascontiguousarray(np.moveaxis(patches, 2, 2 + order[0]), np.float32))
            made = iter(np.moveaxis(found, 2 + order[0], 2))
        return [next(made) if found is None else found for found in known]

    def _run(self, patches: Array) -> Array:
        """The outputs of patches: the mean over all flips that the window asks for."""
        plain = np.asarray(self.run(patches), np.float32)
        if plain.ndim != 5 or len(plain) != len(patches) or plain.shape[2:] != patches.shape[2:]:
            raise InputError(
                f"The network gives {list(plain.shape)} for {len(patches)} patches of {list(patches.shape[2:])}; "
                "(patches, channels, i, j, k) of the patch's own size is needed. Choose another output or patch."
            )
        flips = [f for n in range(1, len(self._mirrored) + 1) for f in combinations(self._mirrored, n)]
        for flip in flips:
            turned = tuple(2 + a for a in flip)
            plain += np.flip(np.asarray(self.run(np.ascontiguousarray(np.flip(patches, turned)))), turned)
        if flips:
            plain /= len(flips) + 1
        return plain

    @property
    def _mirrored(self) -> list[int]:
        """Axes of i, j, k; those of a window of slices begin at j."""
        return [a + 3 - len(self.window.patch) for a in self.window.mirror]


def output(sliding: Sliding, volume: Array, *, room: int | None = None, most: int | None = None) -> Array:
    """The mean output of a whole volume: (channels, i, j, k) FP32, which is all in memory.

    Args:
        sliding: the network.
        volume: as of `Sliding.parts`.
        room: as there.
        most: bytes of the output that may be used; None: any number.

    Raises:
        InputError: as `Sliding.parts`; or it needs more.
    """
    whole: Array = np.zeros(0)
    for part in sliding.parts(volume, room=room):
        if not whole.size:
            needed = 4 * len(part.values) * math.prod(volume.shape[1:])
            if most is not None and needed > most:
                raise InputError(
                    f"All {len(part.values)} channels of a volume take {said_bytes(needed)}, and {said_bytes(most)} "
                    "may be used. Raise --memory, or take resample: labels, which needs one slab."
                )
            whole = np.zeros((len(part.values), *volume.shape[1:]), np.float32)
        whole[(slice(None), *part.place)] = part.values
    return whole
