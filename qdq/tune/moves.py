"""The steps of the tuner's search: what can be changed of a variant, on nodes that the compiler cannot tell apart.

Variant + Price -> moves, dearest nodes first; Move + Variant -> Variant. It must not decide which are made.

| move | on a class of nodes |
|---|---|
| int8, float | quantized, with and without the rewrites of the Q/DQ model; left in the type of the rest |
| a rewrite of `qdq.surgery` | done or not |
| common, channels | weights have one scale, or one per channel |
| centred, shifted | a lopsided input keeps its zero point 0, or is shifted so that it uses all codes |
| raw, shared | a shortcut reads the float tensor, or the quantized one |
| rest | what is not quantized has another float type |
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qdq.build.cost import Price
from qdq.model.model import Model
from qdq.passes.rewrites import FLOAT_REWRITES, QUANTIZED_REWRITES
from qdq.tune.equivalence import classes, grouped
from qdq.tune.variant import Variant
from qdq.tune.workshop import Workshop

SHORTCUTS = ("raw", "shared")
WORTH = 0.01  # of the time: a class of nodes whose kernels take less together is left as it starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A change of a variant; `kind` as in the table above, or a rewrite's name, with 'no ' for undone.

    Attributes:
        nodes: that it is about; for 'rest' a type, "" the usual one.
    """

    kind: str
    nodes: tuple[str, ...]

    @property
    def touched(self) -> tuple[str, ...]:
        """The nodes that it is about: shortcuts are named by operand; a type is of the whole model."""
        if self.kind == "rest":
            return ()
        return tuple(n.rpartition(":")[0] for n in self.nodes) if self.kind in SHORTCUTS else self.nodes

    def of(self, v: Variant) -> Variant:
        """The changed variant."""
        if self.kind in SHORTCUTS:
            return replace(v, raw=v.raw | set(self.nodes) if self.kind == "raw" else v.raw - set(self.nodes))
        if self.kind == "rest":
            return replace(v, rest=self.nodes[0])
        if self.kind == "common":
            return replace(v, common=v.common | set(self.nodes))
        if self.kind == "channels":
            return replace(v, common=v.common - set(self.nodes))
        if self.kind == "centred":
            return replace(v, centred=v.centred | set(self.nodes))
        if self.kind == "shifted":
            return replace(v, centred=v.centred - set(self.nodes))
        if self.kind in ("int8", "int8 rewritten"):
            for name in QUANTIZED_REWRITES if self.kind != "int8" else ():  # they fire where they fit
                v = v.with_rewrite(name, self.nodes)
            return replace(v, integer=v.integer | set(self.nodes))
        if self.kind == "float":
            return replace(v, integer=v.integer - set(self.nodes))
        if self.kind.startswith("no "):
            return v.without_rewrite(self.kind.removeprefix("no "), self.nodes)
        return v.with_rewrite(self.kind, self.nodes)

    def __str__(self) -> str:
        """Like 'int8 on /conv1 and 3 alike'."""
        if self.kind == "rest":
            return f"the rest in {self.nodes[0] or 'its usual type'}"
        more = f" and {len(self.nodes) - 1} alike" if len(self.nodes) > 1 else ""
        return f"{self.kind} on {self.nodes[0]}{more}"


def possible(shop: Workshop, variant: Variant, price: Price, *, placement: bool) -> list[Move]:
    """All moves from a variant of that price; without `placement` only those that keep what is quantized."""
    model = shop.base(variant).model
    alike = classes(model)
    found: list[Move] = []
    for nodes in grouped(shop.quantizable(variant), alike) if placement else ():
        inside = variant.integer.issuperset(nodes)
        found += [Move(kind=kind, nodes=nodes) for kind in (("float",) if inside else ("int8 rewritten", "int8"))]
        if not inside and variant.integer.intersection(nodes):
            found.append(Move(kind="float", nodes=nodes))
    for name in (*FLOAT_REWRITES, *(QUANTIZED_REWRITES if variant.integer else ())):
        done = {node for other, node in variant.rewrites if other == name}
        for nodes in grouped(shop.fits(name, variant), alike):
            found.append(Move(kind=f"no {name}" if done.issuperset(nodes) else name, nodes=nodes))
    if placement:  # these cost accuracy
        for nodes in grouped((n for n in shop.levelled(variant) if n in variant.integer), alike):
            found.append(Move(kind="channels" if variant.common.issuperset(nodes) else "common", nodes=nodes))
        for nodes in grouped((n for n in shop.lopsided(variant) if n in variant.integer), alike):
            found.append(Move(kind="shifted" if variant.centred.issuperset(nodes) else "centred", nodes=nodes))
    for operand in shop.shortcuts(variant):
        found.append(Move(kind="shared" if operand in variant.raw else "raw", nodes=(operand,)))
    times = times_of(found, model, price)
    worth = sorted((m for m in found if times[m] >= WORTH * price.us), key=lambda m: -times[m])
    types = [Move(kind="rest", nodes=(rest,)) for rest in ("", *shop.rests[1:]) if rest != variant.rest]
    return [*worth, *types]


def finer_codes(shop: Workshop, variant: Variant) -> list[Move]:
    """The moves from a variant to finer codes."""
    alike = classes(shop.base(variant).model)
    kinds = (("shifted", variant.centred), ("channels", variant.common))
    return [
        Move(kind=kind, nodes=group)
        for kind, nodes in kinds
        for group in grouped(sorted(nodes & variant.integer), alike)
    ]


def into_integer(shop: Workshop, variant: Variant) -> list[Move]:
    """The moves from a variant that quantize more, with the rewrites that fit."""
    alike = classes(shop.base(variant).model)
    return [Move(kind="int8 rewritten", nodes=group) for group in grouped(shop.quantizable(variant), alike)]


def into_float(shop: Workshop, variant: Variant) -> list[Move]:
    """The moves from a variant that quantize less."""
    alike = classes(shop.base(variant).model)
    return [Move(kind="float", nodes=group) for group in grouped(sorted(variant.integer), alike)]


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
