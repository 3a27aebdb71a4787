"""Statistics that are updated, merged and exact: what a pass over samples may collect of a tensor."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from qdq.core.arrays import Floats


class Statistic(Protocol):
    """What is known of some values: made from each batch of them, then merged. Immutable.

    merge is exact, commutative and associative, so the result belongs to the multiset of all values.
    """

    def merge(self, other: Self) -> Self:
        """The statistic of both sets of values."""


K = TypeVar("K", bound=Hashable)
S = TypeVar("S", bound=Statistic)


def union(parts: Iterable[Mapping[K, S]]) -> dict[K, S]:
    """Merge what several batches of values gave, key by key, one batch at a time; a key may be missing in some."""
    found: dict[K, S] = {}
    for part in parts:
        for key, statistic in part.items():
            found[key] = found[key].merge(statistic) if key in found else statistic
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRange:
    """The smallest and the largest value of each channel.

    Attributes:
        low: (channels,) float64.
        high: (channels,) float64.
    """

    low: Floats
    high: Floats

    @classmethod
    def of(cls, values: npt.NDArray[np.floating], *, axis: int) -> ChannelRange:
        """The range of one array's channels, which lie on `axis`."""
        others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        return cls(low=values.min(axis=others).astype(np.float64), high=values.max(axis=others).astype(np.float64))

    def merge(self, other: ChannelRange) -> ChannelRange:
        """The range of both."""
        return ChannelRange(low=np.minimum(self.low, other.low), high=np.maximum(self.high, other.high))
