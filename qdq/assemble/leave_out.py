"""Weighted nodes whose codes destroy the model's outputs, left in float, and said.

Q/DQ model + a few calibration samples -> outputs with hardly any signal -> the first nodes on the way there whose own
outputs have none -> the plan without them -> built again, in turns, of which the best is kept.
A weight whose scale is decided by values that a mask hides is the usual cause: nothing is left of the others. Samples
that the codes were fitted on are enough to see that much. This module must not change weights or scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable

import numpy as np

from engines.core.documents import replace
from qdq.assemble.held_out import HeldOutScore, Split, comparable, decibels, energies, ranked
from qdq.measure.inference.memory import groups_of
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable
from qdq.model.external import is_large
from qdq.model.model import Model
from qdq.plan import tables
from qdq.plan.placement import remaining
from qdq.plan.plan import Plan, Skip
from qdq.solve.solve import Solution

JUDGED = 4  # samples looked at, at most
LEAST_DB = 6.0  # a quarter of the energy of the outputs, or more, is error: nobody wants such a model
TURNS = 4  # a node that is left out may have hidden one behind it, without which the outputs gain nothing
DESTROYED, UNREACHED = "destroyed", "unreached"  # rules

Build = Callable[[Plan], tuple[Solution, Model]]


def spared(
    model: Model, plan: Plan, made: tuple[Solution, Model], samples: Iterable[Sample], build: Build
) -> tuple[Plan, tuple[Solution, Model]]:
    """The plan, and what was made by it, without the nodes that destroy the outputs; a note says which.

    Args:
        model: the prepared float model.
        plan: by which `made` was built.
        samples: re-iterable calibration samples.
        build: makes the Q/DQ model of another plan.
    """
    floats = any("float" in model.dtype(name) for name in comparable(model))  # ratios of labels say nothing
    if is_large(model.graph.initializer) or not plan.quantized_nodes or not floats:
        return plan, made
    held = Split(samples=samples, fit=(), held=frozenset(ranked(samples)[:JUDGED]))
    score = HeldOutScore(model, held)
    first = best = score.sqnr_db(made[1])
    lost, tried, kept = list[str](), (plan, made), (plan, made)
    left: tuple[str, ...] = ()
    for _ in range(TURNS):
        if best >= LEAST_DB or not (found := _destroyed(model, tried[1], held)):
            break
        lost += found
        why = f"its codes leave its output less than {LEAST_DB:g} dB of signal to noise"
        less = without(tried[0], model, found, DESTROYED, why)
        tried = less, build(less)
        after = score.sqnr_db(tried[1][1])
        if after > best:
            best, kept, left = after, tried, tuple(lost)
    plan, made = kept
    notes = []
    if left:
        notes.append(
            f"{len(left)} nodes are left in float, their codes destroy the outputs: {', '.join(left[:3])}: output SQNR "
            f"in dB on {len(held.held)} calibration samples {first:.1f} with, {best:.1f} without"
        )
    if best < LEAST_DB:
        notes.append(
            f"the output SQNR on {len(held.held)} calibration samples is {best:.1f} dB: the model is of no use so. "
            "Exclude nodes, or choose another scheme"
        )
    return plan, (dataclasses.replace(made[0], notes=(*made[0].notes, *notes)), made[1])


def reached(model: Model, plan: Plan, table: CalibrationTable) -> Plan:
    """The plan without the nodes in bodies that no calibration sample reached: nobody knows their ranges."""
    unseen = {p.tensor for p in plan.activations if not table.tensors[p.tensor].samples}
    if not unseen:
        return plan
    nodes = tuple(dict.fromkeys(name for p in plan.activations if p.tensor in unseen for name, _ in p.uses))
    return without(plan, model, nodes, UNREACHED, "no calibration sample runs the body that it is in")


def without(plan: Plan, model: Model, nodes: Collection[str], rule: str, why: str) -> Plan:
    """The plan with some of its weighted nodes in float, each with a Skip that gives the reason."""
    weighted = set(plan.quantized_nodes) - set(nodes)
    beside = remaining(model, plan, weighted)
    points = []
    for point in plan.points:
        if kept := tuple(c for c in point.consumers if c.rpartition(":")[0] in weighted or c in beside):
            points.append(replace(point, consumers=kept))
    skips = [Skip(node=n, op_type=model.node(n).op_type, rule=rule, reason=why) for n in nodes]
    ties = [p.tie for p in points]
    points = [replace(p, tie=None) if ties.count(p.tie) == 1 else p for p in points]
    return tables.kept(model, replace(plan, points=tuple(points), skips=(*plan.skips, *skips)))


def _destroyed(model: Model, made: tuple[Solution, Model], held: Split) -> tuple[str, ...]:
    """The nodes with an output of less than LEAST_DB whose inputs no other such node has spoiled."""
    solution, quantized = made
    nodes = {node.output: node for node in solution.nodes.values() if node.name not in model.inner_nodes}
    signals: dict[str, list[float]] = {tensor: [] for tensor in nodes}
    noises: dict[str, list[float]] = {tensor: [] for tensor in nodes}
    for group in groups_of(model, nodes, held.holding()):
        exact, coded = (Session(each, group, threads=1, in_order=True) for each in (model, quantized))
        for sample in held.holding():
            wanted, found = exact(sample), coded(sample)
            for tensor in group:
                factor = solution.factors.get(nodes[tensor].name)
                if factor is not None:  # the Q/DQ model's output is multiplied by it
                    shape = (-1, *(1,) * nodes[tensor].spatial)
                    wanted[tensor] = np.asarray(wanted[tensor] * factor.reshape(shape))
                signal, noise = energies({tensor: wanted[tensor]}, found)
                signals[tensor].append(signal)
                noises[tensor].append(noise)
    spoiled: set[str] = set()
    first = []
    for node in model.graph.node:
        before = not spoiled.isdisjoint(node.input)
        for tensor in node.output:
            weak = tensor in nodes and math.fsum(signals[tensor]) > 0
            bad = weak and decibels(signals[tensor], noises[tensor]) < LEAST_DB
            if bad and not before:
                first.append(nodes[tensor].name)
            if bad or before:
                spoiled.add(tensor)
    return tuple(first)
