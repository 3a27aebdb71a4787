"""Turn measured ranges and float weights into scales and codes.

Plan + CalibrationTable -> `DataScales` of every activation -> second moments of the weights' inputs -> channels
balanced for weight-only blocks -> carriers of the divisors -> QTensor per weight, each by itself. Every step returns a
value with its notes and changes nothing that it was given. This module must not change the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version

import numpy as np

from engines.core import documents
from qdq.core.arrays import Floats, Singles
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams, QTensor
from qdq.core.resources import MemoryBudget, cores, default_bytes, given_bytes, said_bytes
from qdq.measure import second_moments
from qdq.measure.inference.samples import Sample, overlapped
from qdq.measure.table import CalibrationTable
from qdq.model.external import is_large, release, tensor_bytes
from qdq.model.model import Model
from qdq.model.weight_store import WeightStore, key_of
from qdq.plan.plan import Plan
from qdq.plan.weighted_node import Weight, WeightedNode, by_weight, weighted_nodes
from qdq.solve.data_scales import DataScales, data_scales
from qdq.solve.equalize import weight_only
from qdq.solve.equalize.carriers import Carrier, carried, factors
from qdq.solve.equalize.channels import Channels
from qdq.solve.equalize.formulas import formula
from qdq.solve.equalize.gradients import tied
from qdq.solve.rounding import ROUNDINGS
from qdq.solve.spread import Spread, Task, rounded, workers
from qdq.solve.tables import Tables, coded
from qdq.solve.weights import rounding_bytes

ROUNDING_BYTES = 1 << 30  # for the weights that are rounded at a time, with their copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Everything `insert` needs.

    Attributes:
        nodes: the weighted nodes of the float model by name.
        activations: tensor -> parameters per tensor.
        divisors: tensor -> (channels,) what its channels are divided by before they are quantized; the codes of the
            weights that read it already hold the factor.
        carriers: of those, tensor -> the constants that divide it as it is made; no node has to do so.
        weights: (tensor, axis) -> codes and parameters.
        tokens: tensors that have one scale per token, computed as the engine runs; their parameters have scale 1.
        beyond: tensors in two pieces -> parameters of the outer one; `activations` has those of the inner one.
        tables: codes of constants that no product reads, and which weights share them.
        notes: what a person should know, one line each (ties given up, weights rounded to nearest for want of data).
        store: where the codes of a large model lie.
    """

    nodes: Mapping[str, WeightedNode]
    activations: Mapping[str, QParams]
    divisors: Mapping[str, Singles]
    weights: Mapping[Weight, QTensor]
    notes: tuple[str, ...]
    tokens: frozenset[str] = frozenset()
    beyond: Mapping[str, QParams] = field(default_factory=dict)
    store: WeightStore | None = None
    carriers: Mapping[str, Carrier] = field(default_factory=dict)
    tables: Tables = field(default_factory=Tables)

    @property
    def factors(self) -> dict[str, Floats]:
        """Weighted node -> (channels,) what its output is multiplied by in the Q/DQ model: it carries divisors."""
        return factors(self.carriers, self.divisors)


def solve(
    model: Model,
    plan: Plan,
    table: CalibrationTable,
    *,
    samples: Iterable[Sample] | None = None,
    params: Mapping[str, QParams] | None = None,
    seen: Mapping[str, Channels] | None = None,
    on_progress: Progress | None = None,
) -> Solution:
    """Choose every scale and round every weight.

    Args:
        table: histograms of the plan's activation tensors.
        samples: re-iterable calibration samples, for roundings that need the second moments of a layer's inputs;
            without them such weights are rounded to nearest, and a note says so.
        params: of every activation tensor, in place of the plan's calibrator.
        seen: what `channels.look` has of the samples, if it is known.

    Raises:
        StaleFileError: plan or table belong to another model.
        InputError: an edited plan has a weight that no integer kernel takes so, or a weight holds NaN or infinity.
    """
    plan.check(model)
    table.check(model, plan)
    plan = documents.replace(plan, settings=plan.settings.settled)
    nodes = weighted_nodes(model, plan)
    _check_values(model, nodes.values())
    some = None if samples is None else second_moments.few(samples)
    data = data_scales(model, plan, nodes, table, some, params=params, seen=seen, on_progress=on_progress)
    moments = _moments(model, plan, nodes.values(), data, some, on_progress)
    balanced, said = weight_only.balance(model, plan, nodes.values(), moments.grams, data.divisors)
    divisors = {**data.divisors, **balanced}
    carriers = carried(model, nodes, divisors)
    store = WeightStore() if is_large(model.graph.initializer) else None
    moments = replace(moments, divisors=balanced)
    multiplied = factors(carriers, divisors)
    weights = _weights(model, plan, nodes.values(), moments, divisors, multiplied, store, on_progress)
    if plan.settings.gradients == "tied":
        both = tied(model, plan, nodes, weights, table, some, on_progress)
        weights, divisors = {**weights, **both.weights}, {**divisors, **both.divisors}
        data = replace(data, params={**data.params, **both.params}, notes=(*data.notes, both.note))
    alone = ["the model is small, so this process rounds its weights alone"] if store is None and workers() else []
    rescaling = {*divisors, *multiplied}
    tables = coded(model, plan, nodes.values(), weights, rescaled=rescaling, store=store)
    rescaled = (
        f"{len(divisors)} tensors are rescaled per channel: {len(carriers)} inside the previous layer, "
        f"{len(divisors) - len(carriers)} by one extra Mul each"
    )
    return Solution(
        nodes=nodes,
        activations=data.params,
        divisors=divisors,
        weights=weights,
        notes=(*data.notes, *moments.notes, *said, *([rescaled] if divisors else []), *tables.notes, *alone),
        tokens=frozenset(data.tokens),
        beyond=data.beyond,
        store=store,
        carriers=carriers,
        tables=tables,
    )


def _weights(
    model: Model,
    plan: Plan,
    nodes: Iterable[WeightedNode],
    seen: _Moments,
    divisors: Mapping[str, Singles],
    outputs: Mapping[str, Floats],
    store: WeightStore | None,
    on_progress: Progress | None,
) -> dict[Weight, QTensor]:
    """Every weight rounded by itself; one per core at a time, as far as the memory of their copies allows.

    Those of a large model by workers elsewhere, where `spread` says so.
    """
    settings, readers = plan.settings, [reader for reader, *_ in by_weight(nodes).values()]
    how = (settings.rounding, settings.damping, settings.act_order)

    def task(reader: WeightedNode) -> Task:
        divisor, factor = divisors.get(reader.data), outputs.get(reader.name)
        return Task(reader=reader, divisor=divisor, factor=factor, moments=seen.of(reader))

    def key(of: Task) -> str:
        decides = (model.sha256, plan.rewrites, of.reader, how, version("qdq"), of.moments, of.divisor, of.factor)
        return key_of(*decides)

    def solved(reader: WeightedNode) -> QTensor:
        with room.taken(_bytes(model, reader, moments=reader.key in seen.grams)):
            mine = task(reader)

            def make() -> QTensor:
                made = rounded(model, settings, mine)
                if (read := seen.grams.get(reader.key)) is not None:
                    release(read)
                return made

            return make() if store is None else store.weight(key(mine), make)

    def elsewhere(away: Spread) -> Iterator[tuple[WeightedNode, QTensor]]:
        """As they come; those that an earlier run has finished first."""
        left = []
        for reader in readers:
            found = None if store is None else store.finished(key(task(reader)))
            if found is None:
                left.append(reader)
            else:
                yield reader, found
        for index, made in away.each(model, plan, [partial(task, reader) for reader in left]):
            reader = left[index]
            yield reader, made if store is None else store.weight(key(task(reader)), partial(lambda t: t, made))

    room = MemoryBudget(min(ROUNDING_BYTES, default_bytes()))
    away = None if store is None else workers()  # starting workers takes longer than the weights of a small model
    here = zip(readers, overlapped(solved, readers, cores()), strict=True) if away is None else elsewhere(away)
    weights: dict[Weight, QTensor] = {}
    for done, (reader, made) in enumerate(here, 1):
        weights[reader.key] = made
        if on_progress is not None:
            on_progress(done, len(readers), "rounding weights")
    return {reader.key: weights[reader.key] for reader in readers}


def require_room(model: Model, plan: Plan) -> None:
    """Refuse a budget that was given and that the rounding of one weight by its second moments exceeds.

    Raises:
        InputError: says which weight, and what it needs.
    """
    budget, settings = given_bytes(), plan.settings.settled
    if budget is None or not ROUNDINGS[settings.rounding].needs_moments:
        return
    weights = by_weight(weighted_nodes(model, plan).values()).values()
    measured = [nodes[0] for nodes in weights if second_moments.has_matrix(nodes, settings.moment_inputs)]
    most = max(measured, key=lambda node: _bytes(model, node, moments=True), default=None)
    if most is not None and (needs := _bytes(model, most, moments=True)) > budget:
        raise InputError(
            f"--memory gives {said_bytes(budget)}, but rounding {most.weight!r}, {most.columns} inputs per output, by "
            f"{settings.rounding} needs {said_bytes(needs)}. Give more, set moment_inputs below {most.columns}, or "
            "take a rounding that needs no data: nearest."
        )


def _bytes(model: Model, reader: WeightedNode, *, moments: bool) -> int:
    """Bytes that rounding the weight of a node takes, by second moments of its inputs or without."""
    tensor = model.initializers[reader.weight]
    itemsize = tensor_bytes(tensor) // max(1, math.prod(tensor.dims))
    return rounding_bytes(tuple(tensor.dims), itemsize, columns=reader.columns if moments else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moments:
    """Second moments of the weights that want them.

    Attributes:
        grams: as they were measured.
        divisors: tensor -> (channels,) what its channels are divided by besides.
        notes: what a person should know, one line each.
    """

    grams: second_moments.Grams = field(default_factory=dict)
    divisors: Mapping[str, Singles] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, reader: WeightedNode) -> Floats | None:
        """(groups, columns, columns) of the weight that a node reads; None if it has none."""
        gram, divisor = self.grams.get(reader.key), self.divisors.get(reader.data)
        return gram if gram is None or divisor is None else gram / np.outer(divisor, divisor)


def _moments(
    model: Model,
    plan: Plan,
    nodes: Iterable[WeightedNode],
    data: DataScales,
    samples: second_moments.SampleSubset | None,
    on_progress: Progress | None,
) -> _Moments:
    """Second moments for the weights whose rounding or balancing wants them."""
    settings, free = plan.settings, not ROUNDINGS[plan.settings.rounding].needs_moments
    method = formula(settings.equalize)
    balance = method is not None and method.by_weights is None
    wanted = [n for n in nodes if not free or (balance and n.spec.weight_only and n.spec.block)]
    if not wanted:
        return _Moments()
    if samples is None:
        note = f"weights are rounded to nearest: {settings.rounding} needs the samples, and only a table was given"
        return _Moments(notes=(note,))
    most, divisors = settings.moment_inputs, data.divisors
    grams = second_moments.collect(
        model,
        wanted,
        data.constant,
        samples,
        most_columns=most,
        divisors=divisors,
        shrink=True,
        on_progress=on_progress,
    )
    plain = {n.key for n in wanted} - grams.keys()
    if not plain or free:
        return _Moments(grams=grams)
    note = (
        f"{len(plain)} of {len(plan.weights)} weights are rounded without their inputs: {settings.rounding} takes up "
        f"to {settings.moment_inputs} inputs per output (moment_inputs), and no "
        "batched weights or transposed convolutions"
    )
    return _Moments(grams=grams, notes=(note,))


def _check_values(model: Model, nodes: Iterable[WeightedNode]) -> None:
    """Refuse weights that no scale fits: all values must be finite as float32. Makes no copy as large as a weight."""
    for reader, *_ in by_weight(nodes).values():
        values = model.array(reader.weight)
        if values.size and not np.isfinite(np.asarray((values.max(), values.min()), dtype=np.float32)).all():
            raise InputError(
                f"Weight {reader.weight!r} of the float model holds NaN or infinity: no scale fits it. "
                f"Mend the model, or exclude {reader.name!r}."
            )
