"""The steps of the tuner's search: what can be changed of a variant, on nodes that the compiler cannot tell apart.

Variant + Price -> moves, dearest nodes first; Move + Variant -> Variant. It must not decide which are made.

A move is a row of KINDS, a rewrite of `qdq.passes.rewrites` (done, or undone by 'no <rewrite>'), 'int8 rewritten'
(quantized, with the rewrites of the Q/DQ model that fit), or 'unquantized type' (the float type of all other nodes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engines.core.documents import replace
from qdq.build.cost import Price
from qdq.model.model import Model
from qdq.passes.rewrites import FLOAT_REWRITES, QUANTIZED_REWRITES
from qdq.tune.equivalence import classes, grouped
from qdq.tune.variant_builder import Variant, VariantBuilder

WORTH = 0.01  # of the time: a class of nodes whose kernels take less together is left as it starts
COARSER_GAIN = 0.004  # of the time: less is no reason for coarser codes
REWRITTEN, TYPE = "int8 rewritten", "unquantized type"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a move does to a variant.

    Attributes:
        field: the set of nodes of `Variant` that it changes.
        adds: its nodes become members of that set, else they leave it.
        exact: the outputs come closer to the float model's: whatever time that gains is welcome. Other moves must gain
            more than a tie.
        least_gain: the share of the time that it must gain to be kept.
    """

    field: str
    adds: bool
    exact: bool = False
    least_gain: float = 0.0


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "int8": Kind(field="quantized", adds=True),
        "float": Kind(field="quantized", adds=False, exact=True),
        "one weight scale": Kind(field="per_tensor", adds=True, least_gain=COARSER_GAIN),
        "a weight scale per channel": Kind(field="per_tensor", adds=False, exact=True),
        "zero point 0": Kind(field="unshifted", adds=True, least_gain=COARSER_GAIN),  # though the range is asymmetric
        "shifted input": Kind(field="unshifted", adds=False, exact=True),  # so that it uses all codes
        "float shortcut": Kind(field="float_shortcuts", adds=True, exact=True),
        "quantized shortcut": Kind(field="float_shortcuts", adds=False),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A change of a variant; `kind` as the module says.

    Attributes:
        nodes: that it is about: of a shortcut "node:index", of 'unquantized type' the type, "" for the usual one.
    """

    kind: str
    nodes: tuple[str, ...]

    @property
    def touched(self) -> tuple[str, ...]:
        """The nodes that it is about; a type is of the whole model."""
        if self.kind == TYPE:
            return ()
        shortcut = self.kind in KINDS and KINDS[self.kind].field == "float_shortcuts"
        return tuple(n.rpartition(":")[0] for n in self.nodes) if shortcut else self.nodes

    def pays(self, after: Price, before: Price) -> bool:
        """Whether it gains enough time to be kept; what makes the model plainer or more exact may gain anything."""
        kind = KINDS.get(self.kind)
        if self.kind.startswith("no ") or (kind and kind.exact):
            return after.us < before.us
        return after.gains_on(before) and after.us < before.us * (1 - (kind.least_gain if kind else 0.0))

    def of(self, v: Variant) -> Variant:
        """The changed variant."""
        if self.kind == TYPE:
            return replace(v, unquantized_type=self.nodes[0])
        if self.kind == REWRITTEN:
            for name in QUANTIZED_REWRITES:  # they fire where they fit
                v = v.with_rewrite(name, self.nodes)
        if kind := KINDS.get("int8" if self.kind == REWRITTEN else self.kind):
            held: frozenset[str] = getattr(v, kind.field)
            changed: dict[str, Any] = {kind.field: held.union(self.nodes) if kind.adds else held.difference(self.nodes)}
            return replace(v, **changed)
        if self.kind.startswith("no "):
            return v.without_rewrite(self.kind.removeprefix("no "), self.nodes)
        return v.with_rewrite(self.kind, self.nodes)

    def __str__(self) -> str:
        """Like 'int8 on /conv1 and 3 alike'."""
        if self.kind == TYPE:
            return f"what is not quantized in {self.nodes[0] or 'its usual type'}"
        more = f" and {len(self.nodes) - 1} alike" if len(self.nodes) > 1 else ""
        return f"{self.kind} on {self.nodes[0]}{more}"


def possible(builder: VariantBuilder, variant: Variant, price: Price, *, placement: bool) -> list[Move]:
    """All moves from a variant of that price; without `placement` only those that keep what is quantized."""
    model = builder.base(variant).model
    alike = classes(model)
    found: list[Move] = []
    for nodes in grouped(builder.quantizable(variant), alike) if placement else ():
        inside = variant.quantized.issuperset(nodes)
        found += [Move(kind=kind, nodes=nodes) for kind in (("float",) if inside else (REWRITTEN, "int8"))]
        if not inside and variant.quantized.intersection(nodes):
            found.append(Move(kind="float", nodes=nodes))
    for name in (*FLOAT_REWRITES, *(QUANTIZED_REWRITES if variant.quantized else ())):
        done = {node for other, node in variant.rewrites if other == name}
        for nodes in grouped(builder.fits(name, variant), alike):
            found.append(Move(kind=f"no {name}" if done.issuperset(nodes) else name, nodes=nodes))
    if placement:  # these cost accuracy
        for nodes in grouped((n for n in builder.fit_for_one_scale(variant) if n in variant.quantized), alike):
            whole = variant.per_tensor.issuperset(nodes)
            found.append(Move(kind="a weight scale per channel" if whole else "one weight scale", nodes=nodes))
        for nodes in grouped((n for n in builder.asymmetric(variant) if n in variant.quantized), alike):
            unshifted = variant.unshifted.issuperset(nodes)
            found.append(Move(kind="shifted input" if unshifted else "zero point 0", nodes=nodes))
    for operand in builder.shortcuts(variant):
        shared = operand in variant.float_shortcuts
        found.append(Move(kind="quantized shortcut" if shared else "float shortcut", nodes=(operand,)))
    times = times_of(found, model, price)
    worth = sorted((m for m in found if times[m] >= WORTH * price.us), key=lambda m: -times[m])
    types = (name for name in ("", *builder.unquantized_types[1:]) if name != variant.unquantized_type)
    return [*worth, *(Move(kind=TYPE, nodes=(name,)) for name in types)]


def finer_codes(builder: VariantBuilder, variant: Variant) -> list[Move]:
    """The moves from a variant to finer codes."""
    alike = classes(builder.base(variant).model)
    kinds = (("shifted input", variant.unshifted), ("a weight scale per channel", variant.per_tensor))
    return [
        Move(kind=kind, nodes=group)
        for kind, nodes in kinds
        for group in grouped(sorted(nodes & variant.quantized), alike)
    ]


def into_quantized(builder: VariantBuilder, variant: Variant) -> list[Move]:
    """The moves from a variant that quantize more, with the rewrites that fit."""
    alike = classes(builder.base(variant).model)
    return [Move(kind=REWRITTEN, nodes=group) for group in grouped(builder.quantizable(variant), alike)]


def into_float(builder: VariantBuilder, variant: Variant) -> list[Move]:
    """The moves from a variant that quantize less."""
    alike = classes(builder.base(variant).model)
    return [Move(kind="float", nodes=group) for group in grouped(sorted(variant.quantized), alike)]


def into_exact(builder: VariantBuilder, variant: Variant) -> list[Move]:
    """The moves from a variant that make it more exact."""
    shortcuts = [
        Move(kind="float shortcut", nodes=(operand,))
        for operand in builder.shortcuts(variant)
        if operand not in variant.float_shortcuts
    ]
    return [*into_float(builder, variant), *finer_codes(builder, variant), *shortcuts]


def times_of(moves: Iterable[Move], model: Model, price: Price) -> dict[Move, float]:
    """Microseconds of the kernels that the nodes of each move, or nodes next to them, are in."""
    kernels: dict[str, dict[int, float]] = {}
    for index, kernel in enumerate(price.kernels):
        for node in kernel.nodes:
            kernels.setdefault(node, {})[index] = kernel.us
    times = {}
    for node in model.graph.node:
        before = [p.name for t in node.input if (p := model.producer(t))]
        after = [use.node.name for t in node.output for use in model.consumers(t)]
        mine: dict[int, float] = {}
        for name in (node.name, *before, *after):
            mine |= kernels.get(name, {})
        times[node.name] = math.fsum(mine.values())
    return {move: sum(times.get(node, 0.0) for node in move.touched) for move in moves}
