"""The predicted time in TensorRT as a sum over units: nodes that share a kernel, so that they share a precision.

Engines + candidates -> units -> microseconds of each alone, of groups within the set, of groups that meet it -> `least`
The sum holds at one clock, that of a set that it is made for. It must not know accuracy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from qdq.build.pricing.tensorrt_pricer import Engines
from qdq.plan.groups import united
from qdq.tune.exact.cut import least

Groups = tuple[tuple[float, frozenset[str]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSum:
    """Microseconds of a set of units, beyond those with nothing quantized, as `cut.least` has it.

    Attributes:
        nodes: unit -> its nodes, in the order of their names.
        alone: unit -> what it costs.
        gains: saved by each group that is within the set.
        costs: paid by each group that has a member in it.
    """

    nodes: Mapping[str, tuple[str, ...]]
    alone: Mapping[str, float]
    gains: Groups
    costs: Groups

    @classmethod
    def of(
        cls, engines: Engines, candidates: Collection[str], *, at: Collection[str], shared: Collection[str]
    ) -> UnitSum:
        """The sum for sets of candidates.

        Args:
            candidates: nodes that may be quantized.
            at: the quantized nodes of the engine whose clock it has.
            shared: nodes without weights that read codes, as of `VariantBuilder.shared`.
        """
        units = _units(engines, candidates)
        alone = dict.fromkeys(units.values(), 0.0)
        gains, costs = [], []
        for gpu, engine in engines.pairs:
            kernels = {i: own for i, own in engines.kernels(engine).items() if own and own <= units.keys()}
            chosen = [i for i, own in kernels.items() if own <= set(at)]
            terms = engine.terms(gpu, kernels, at=chosen, apart=engines.apart(engine, shared))
            unit_of = {i: units[min(own)] for i, own in kernels.items()}
            share = 1 / len(engines.pairs)
            for i, us in terms.alone.items():
                alone[unit_of[i]] += us * share
            gains += [(us * share, frozenset(unit_of[i] for i in group)) for us, group in terms.gains if us]
            costs += [(us * share, frozenset(unit_of[i] for i in group)) for us, group in terms.costs if us]
        nodes: dict[str, list[str]] = {unit: [] for unit in alone}
        for node, unit in units.items():
            nodes[unit].append(node)
        own = {unit: tuple(some) for unit, some in nodes.items()}
        return cls(nodes=own, alone=alone, gains=tuple(gains), costs=tuple(costs))

    def least(self, weights: Mapping[str, float] | None = None) -> frozenset[str]:
        """The units with the least sum.

        Args:
            weights: microseconds that a unit costs beside its time.
        """
        alone = {unit: us + (weights or {}).get(unit, 0.0) for unit, us in self.alone.items()}
        return least(alone, self.gains, self.costs)

    def us(self, units: Collection[str]) -> float:
        """The sum of a set."""
        chosen = frozenset(units)
        saved = sum(us for us, group in self.gains if group <= chosen)
        paid = sum(us for us, group in self.costs if group & chosen)
        return sum(self.alone[unit] for unit in sorted(chosen)) - saved + paid

    def nodes_of(self, units: Collection[str]) -> frozenset[str]:
        """The nodes of a set."""
        return frozenset(chain.from_iterable(self.nodes[unit] for unit in units))


def _units(engines: Engines, candidates: Collection[str]) -> dict[str, str]:
    """Node -> a name for those that are chosen together, because they share a kernel; only of kernels that can be INT8.

    A node of no kernel, or of one with a product that is no candidate, has no unit.
    """
    kernels = [(sorted(own.intersection(candidates)), len(own)) for own in _groups(engines)]
    roots = united(sorted(candidates), (mine for mine, _ in kernels))
    hopeless = {roots[mine[0]] for mine, size in kernels if mine and len(mine) < size}
    seen = sorted({node for mine, _ in kernels for node in mine})
    return {node: roots[node] for node in seen if roots[node] not in hopeless}


def _groups(engines: Engines) -> Iterator[frozenset[str]]:
    return chain.from_iterable(engines.kernels(engine).values() for _, engine in engines.pairs)
