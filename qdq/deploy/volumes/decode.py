"""What channels mean: logits or probabilities -> labels, without a second array of their size.

`Classes`: the channel with the largest value is the label. `Regions`: channels overlap, each above its threshold;
painted one over the other as nnU-Net does it, or, without an order, kept apart as one bit for each channel. A
`Structure` is what is measured of such labels. Must not run a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qdq.core.errors import InputError

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
MOST_BITS = 64  # channels that overlap without an order


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What is measured together.

    Attributes:
        name: for people.
        values: of label files, and of labels that a decoder makes unless there is a bit.
        bit: of those labels.
    """

    name: str
    values: tuple[int, ...]
    bit: int | None = None

    def mask(self, labels: Array) -> Mask:
        """Where it is in what a decoder made."""
        if self.bit is None:
            return self.truth(labels)
        return np.asarray((labels >> labels.dtype.type(self.bit)) & labels.dtype.type(1), bool)

    def truth(self, labels: Array) -> Mask:
        """Where it is in a label file."""
        return np.asarray(labels == self.values[0]) if len(self.values) == 1 else np.isin(labels, self.values)


class Decoder(Protocol):
    """Values of channels -> labels."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the labels; the background is 0."""

    def labels(self, values: Array) -> Array:
        """(channels, i, j, k) -> (i, j, k)."""

    def channel(self, labels: Array, best: Array, values: Array, index: int) -> None:
        """Take the channels of `labels` one at a time, in order: `best` is kept between them, float32."""

    @property
    def structures(self) -> tuple[Structure, ...]:
        """What is measured."""

    @property
    def said(self) -> str:
        """In words, for reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Each voxel has one class, channel 0 the background; of equal values the first channel's.

    Attributes:
        channels: how many.
        names: of structures; empty: every channel but the background is one.
        parts: the channels of each that has a name.
    """

    channels: int
    names: tuple[str, ...] = ()
    parts: tuple[tuple[int, ...], ...] = ()

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `Decoder.dtype`."""
        return np.min_scalar_type(self.channels - 1)

    def labels(self, values: Array) -> Array:
        """See `Decoder.labels`. numpy's argmax would copy all channels."""
        return _in_turn(self, values)

    def channel(self, labels: Array, best: Array, values: Array, index: int) -> None:
        """See `Decoder.channel`."""
        if index == 0:
            best[...], labels[...] = values, 0
            return
        np.copyto(labels, labels.dtype.type(index), where=values > best)
        np.maximum(best, values, out=best)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """See `Decoder.structures`."""
        parts = self.parts or tuple((value,) for value in range(1, self.channels))
        names = self.names or tuple(f"class {value}" for value in range(1, self.channels))
        return tuple(Structure(name=name, values=values) for name, values in zip(names, parts, strict=True))

    @property
    def said(self) -> str:
        """See `Decoder.said`."""
        return f"{self.channels} classes, of which each voxel has one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """Channels that overlap.

    Attributes:
        channels: how many.
        threshold: above it a voxel belongs to a channel: 0 of logits, 0.5 of probabilities.
        order: the label that each channel paints, over what the channels before it painted (nnU-Net's
            `regions_class_order`); empty: each channel is a bit of the label, and none hides another.
        parts: the label values that make up each channel's region, by which it is measured; empty: the label that a
            channel paints, or without an order its number, from 1.
        names: of the channels.

    Raises:
        InputError: an order of another length, or too many channels for bits.
    """

    channels: int
    threshold: float
    order: tuple[int, ...] = ()
    parts: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        if self.order and len(self.order) != self.channels:
            raise InputError(
                f"regions_class_order has {len(self.order)} labels, but the network has {self.channels} channels: one "
                "for each is needed."
            )
        if not self.order and self.channels > MOST_BITS:
            raise InputError(
                f"{self.channels} channels overlap; without an order at most {MOST_BITS} can be told apart."
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `Decoder.dtype`."""
        if self.order:
            return np.min_scalar_type(max(self.order))
        return next(np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64) if bits >= self.channels)

    def labels(self, values: Array) -> Array:
        """See `Decoder.labels`."""
        return _in_turn(self, values)

    def channel(self, labels: Array, best: Array, values: Array, index: int) -> None:
        """See `Decoder.channel`."""
        if index == 0:
            labels[...] = 0
        there = values > self.threshold
        if self.order:
            np.copyto(labels, labels.dtype.type(self.order[index]), where=there)
        else:
            labels |= there.astype(labels.dtype) << labels.dtype.type(index)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """See `Decoder.structures`."""
        parts = self.parts or tuple((label,) for label in self.order or range(1, self.channels + 1))
        names = self.names or tuple(f"channel {n}" for n in range(self.channels))
        bits = [None if self.order else n for n in range(self.channels)]
        return tuple(
            Structure(name=name, values=values, bit=bit) for name, values, bit in zip(names, parts, bits, strict=True)
        )

    @property
    def said(self) -> str:
        """See `Decoder.said`."""
        painted = f", painted as {', '.join(map(str, self.order))}" if self.order else ""
        return f"{self.channels} channels that may overlap, each above {self.threshold:g}{painted}"


def _in_turn(decoder: Decoder, values: Array) -> Array:
    """Labels from all channels, one after the other."""
    labels = np.empty(values.shape[1:], decoder.dtype)
    best = np.empty(values.shape[1:], np.float32)
    for index, channel in enumerate(values):
        decoder.channel(labels, best, channel, index)
    return labels
