"""The set with the least sum of costs, of members and of groups, by a minimum cut.

    f(S) = sum alone[u], u in S  -  sum gain of groups within S  +  sum cost of groups that meet S

f is submodular, f(A) + f(B) >= f(A and B) + f(A or B): the first sum is modular. A group within A or within B is within
the union, and one within both is within what they share, so `-gain` is submodular; by complements a group that meets a
set gives the same for `+cost`. So the least f is a minimum cut between a source (in S) and a sink (not in S):

    alone > 0: u -> sink     alone < 0: source -> u     gain: source -> g -> each u     cost: each u -> c -> sink

where edges into and out of members are never cut. Of equal sets the smallest is found: what the source still reaches.
Source: Picard and Ratliff, Minimum cuts and related problems (1975); the flow, Dinic (1970).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T", bound=Hashable)
Groups = Iterable[tuple[float, Iterable[T]]]
STEPS = 1 << 24  # whole numbers in the largest cost: the flow is computed in these, so that it ends


def least(alone: Mapping[T, float], gains: Groups[T], costs: Groups[T]) -> frozenset[T]:
    """The smallest of the sets with the least sum.

    Args:
        alone: every possible member, and its own cost, which may be below 0.
        gains: not below 0, each with its group.
        costs: not below 0, each with its group.

    >>> sorted(least({"a": 2.0, "b": 2.0, "c": 1.0}, [(5.0, "ab")], [(0.5, "bc")]))
    ['a', 'b']
    """
    won, paid = [(g, list(group)) for g, group in gains], [(c, list(group)) for c, group in costs]
    most = max((abs(v) for v in (*alone.values(), *(g for g, _ in won), *(c for c, _ in paid))), default=0.0)
    if most == 0:
        return frozenset()
    whole = STEPS / most
    place = {member: index + 2 for index, member in enumerate(alone)}
    flow = _Flow(2 + len(alone) + len(won) + len(paid))
    never = round(whole * (sum(map(abs, alone.values())) + sum(g for g, _ in won) + sum(c for c, _ in paid))) + 1
    for member, cost in alone.items():
        if cost > 0:
            flow.edge(place[member], _SINK, round(cost * whole))
        else:
            flow.edge(_SOURCE, place[member], round(-cost * whole))
    for node, (gain, group) in enumerate(won, 2 + len(alone)):
        flow.edge(_SOURCE, node, round(gain * whole))
        for member in group:
            flow.edge(node, place[member], never)
    for node, (cost, group) in enumerate(paid, 2 + len(alone) + len(won)):
        flow.edge(node, _SINK, round(cost * whole))
        for member in group:
            flow.edge(place[member], node, never)
    flow.fill()
    reached = flow.levels()
    return frozenset(member for member, node in place.items() if reached[node] >= 0)


_SOURCE, _SINK = 0, 1


@dataclass(slots=True)
class _Flow:
    """A network with whole capacities; edge 2 i + 1 is the way back of edge 2 i."""

    count: int
    _to: list[int] = field(default_factory=list)
    _left: list[int] = field(default_factory=list)
    _edges: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._edges = [[] for _ in range(self.count)]

    def edge(self, a: int, b: int, capacity: int) -> None:
        """An edge from a to b."""
        for start, end, left in ((a, b, capacity), (b, a, 0)):
            self._edges[start].append(len(self._to))
            self._to.append(end)
            self._left.append(left)

    def levels(self) -> list[int]:
        """How many edges each node is from the source, -1 where nothing more can flow."""
        found = [-1] * self.count
        found[_SOURCE] = 0
        queue = deque([_SOURCE])
        while queue:
            node = queue.popleft()
            for e in self._edges[node]:
                if self._left[e] and found[self._to[e]] < 0:
                    found[self._to[e]] = found[node] + 1
                    queue.append(self._to[e])
        return found

    def fill(self) -> None:
        """Let as much flow as can."""
        while (levels := self.levels())[_SINK] >= 0:
            following = [0] * self.count
            while path := self._path(levels, following):
                least_left = min(self._left[e] for e in path)
                for e in path:
                    self._left[e] -= least_left
                    self._left[e ^ 1] += least_left

    def _path(self, levels: Sequence[int], following: list[int]) -> list[int]:
        """Edges with something left from the source to the sink, each one level further; [] where there are none."""
        path: list[int] = []
        node = _SOURCE
        while node != _SINK:
            edges = self._edges[node]
            while following[node] < len(edges):
                e = edges[following[node]]
                if self._left[e] and levels[self._to[e]] == levels[node] + 1:
                    break
                following[node] += 1
            if following[node] < len(edges):
                path.append(e)
                node = self._to[e]
            elif not path:
                return []
            else:
                node = self._to[path.pop() ^ 1]
                following[node] += 1
        return path
