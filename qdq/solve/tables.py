"""Codes of the tables that a plan stores so, each row by itself; a product that has the same values shares them.

Plan + solved weights -> QTensor per table, and which weights read a table's codes. No sample decides anything here: a
row is read as it is, so the nearest codes are best, and for blocks the scales of least squared error.
It must not change a graph.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import numpy as np

from qdq.core.errors import InputError
from qdq.core.qtensor import QTensor
from qdq.model.external import release
from qdq.model.model import Model
from qdq.model.weight_store import WeightStore, key_of
from qdq.plan.plan import Plan, Point
from qdq.plan.tables import transposed
from qdq.plan.weighted_node import Weight, WeightedNode, by_weight
from qdq.solve.weights import quantize_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What a plan's tables become.

    Attributes:
        codes: tensor -> codes and parameters; scales run along the rows, or along blocks of each.
        shared: weight -> the table whose codes it reads: the same tensor, or its transpose.
        notes: what a person should know, one line each.
    """

    codes: Mapping[str, QTensor] = field(default_factory=dict)
    shared: Mapping[Weight, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def coded(
    model: Model,
    plan: Plan,
    nodes: Iterable[WeightedNode],
    weights: Mapping[Weight, QTensor],
    *,
    rescaled: Container[str],
    store: WeightStore | None,
) -> Tables:
    """The codes of every table of a plan.

    Args:
        model: the prepared float model.
        plan: its points name the weights that have a table's values (`Point.tie`).
        nodes: the weighted nodes.
        weights: their solved weights.
        rescaled: names of data tensors and of nodes whose weights hold factors besides: those share nothing.
        store: where the codes of a large model lie.

    Raises:
        InputError: a table holds NaN or infinity, or an edited tie names a weight of other values.
    """
    codes: dict[str, QTensor] = {}
    shared: dict[Weight, str] = {}
    notes = []
    readers = by_weight(nodes)
    for point in plan.tables:
        key = next((k for k, found in readers.items() if k[0] == point.tie and _alike(point, found, rescaled)), None)
        if key is not None:
            held = weights[key]
            turned = key[0] != point.tensor
            if turned and not transposed(model, point.tensor, key[0]):
                raise InputError(
                    f"The plan ties the table {point.tensor!r} to {key[0]!r}, which has other values: one would read "
                    "the other's codes. Remove the tie."
                )
            codes[point.tensor] = QTensor(
                codes=held.codes.T if turned else held.codes, params=replace(held.params, axis=point.spec.axis)
            )
            shared[key] = point.tensor
            notes.append(f"table {point.tensor!r} and the product {readers[key][0].name!r} read the same codes")
            continue
        codes[point.tensor] = _own(model, plan, point, store)
        if point.tie is not None:
            notes.append(f"table {point.tensor!r} has codes of its own beside those of {point.tie!r}, of another form")
    return Tables(codes=codes, shared=shared, notes=tuple(notes))


def _alike(point: Point, readers: list[WeightedNode], rescaled: Container[str]) -> bool:
    """Whether the codes of a weight are codes of the table: one scale for each row, and no factors in them."""
    spec, first = readers[0].spec, readers[0]
    plain = spec.format == point.spec.format and spec.block is None and point.spec.block is None
    per_row = spec.axis is not None and spec.axis == first.output_axis == (0 if first.weight == point.tensor else 1)
    return plain and per_row and not any(n.data in rescaled or n.name in rescaled for n in readers)


def _own(model: Model, plan: Plan, point: Point, store: WeightStore | None) -> QTensor:
    def make() -> QTensor:
        values = model.array(point.tensor)
        if not np.isfinite(np.asarray((values.max(), values.min()), dtype=np.float32)).all():
            raise InputError(
                f"Table {point.tensor!r} of the float model holds NaN or infinity: no scale fits it. Mend the model, "
                f"or exclude {point.uses[0][0]!r}."
            )
        rounding = "clip" if point.spec.block else "nearest"
        made = quantize_weight(values, point.spec, outputs=0, rounding=rounding)
        release(values)
        return made

    if store is None:
        return make()
    return store.weight(key_of(model.sha256, plan.rewrites, point, version("qdq")), make)
