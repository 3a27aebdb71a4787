"""Where quantizers go: rules over a prepared float graph, united into a readable, editable plan.

Model + Settings -> rewrites that every plan has -> every rule says Want, Veto, Tie or nothing for every node -> Plan.
Rules are order-free: a veto beats a want, ties of the same point are united. No rule sees data, so the plan can be
made, read and edited before anything is measured. This module must not compute scales or change the model.

Sources: NVIDIA's placement advice and what TensorRT-RTX 1.7.1 compiled from about 90 small graphs (SM89).
"""

from __future__ import annotations

import fnmatch
import glob
from collections import Counter

from engines.core.documents import replace
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, controlled_nodes
from qdq.passes.rewrites import USUAL_REWRITES, applied
from qdq.plan.plan import Plan, Point, Skip
from qdq.plan.rules import RULES, Tie, Veto, Want, check_patterns, why_float
from qdq.plan.settings import Settings


def plan(model: Model, settings: Settings | None = None) -> Plan:
    """Decide for every node of a prepared float model whether and how its operands are quantized.

    Args:
        model: prepared (unique node names, shapes inferred, constants folded), without quantizers.
        settings: scheme and exclusions.

    Returns:
        The plan: points sorted by their first use in the graph, and one Skip with a reason for every other node. Its
        rewrites are `usual`; points and skips are of the rewritten model.

    Raises:
        InputError: an exclude or override pattern that matches nothing, or nodes of different schemes that read one
            tensor in different formats. A model without anything to quantize gives a plan without points.
    """
    settings = settings or Settings()
    check_patterns(model, settings)
    written, rewrites = applied(model, usual(model, settings))
    return replace(placed(written, carried(settings, model, written)), settings=settings, rewrites=rewrites)


def usual(model: Model, settings: Settings) -> frozenset[tuple[str, str]]:
    """The (rewrite, node) pairs that every plan has where they fit: else the compiler has no integer kernel."""
    return frozenset(
        (name, node.name)
        for name, formats in USUAL_REWRITES.items()
        for node in (*model.graph.node, *controlled_nodes(model.graph))
        if node.op_type in WEIGHTED
        and settings.scheme_of(node.name).weight in formats
        and not any(fnmatch.fnmatchcase(node.name, pattern) for pattern in settings.exclude)
    )


def carried(settings: Settings, before: Model, after: Model) -> Settings:
    """The settings for a model after rewrites.

    A pattern for a node that is gone means what was made of it, which has the node's name and more. Patterns that match
    nothing any more are left out.
    """
    old, new = ({*(n.name for n in model.graph.node), *model.inner_nodes} for model in (before, after))
    made: dict[str, list[str]] = {gone: [] for gone in old - new}
    for name in sorted(new - old):
        if origin := max((gone for gone in made if name.startswith(gone)), key=len, default=""):
            made[origin].append(name)

    def names(pattern: str) -> list[str]:
        live = [pattern] if fnmatch.filter(new, pattern) else []
        return [*live, *(glob.escape(name) for gone in fnmatch.filter(made, pattern) for name in made[gone])]

    exclude = tuple(name for pattern in settings.exclude for name in names(pattern))
    overrides = {name: scheme for pattern, scheme in settings.overrides.items() for name in names(pattern)}
    return replace(settings, exclude=exclude, overrides=overrides)


def placed(model: Model, settings: Settings) -> Plan:
    """What the rules say of a model as it is; raises as `plan` does."""
    found: dict[tuple[str, str, int | None], Point] = {}
    shortcuts: list[tuple[str, str]] = []
    skips: list[Skip] = []
    ties: list[Tie] = []
    for node in (*model.graph.node, *controlled_nodes(model.graph)):
        decisions = [d for rule in RULES for d in rule(model, node, settings)]
        ties += [d for d in decisions if isinstance(d, Tie)]
        vetoes = [d for d in decisions if isinstance(d, Veto)]
        wants = [d for d in decisions if isinstance(d, Want)]
        if vetoes:
            reason = "; ".join(v.reason for v in vetoes)
            skips.append(Skip(node=node.name, op_type=node.op_type, rule=vetoes[0].rule, reason=reason))
            continue
        for want in wants:
            consumer = f"{node.name}:{want.index}"
            if want.role == "shortcut":
                shortcuts.append((want.tensor, consumer))
                continue
            key = (want.role, want.tensor, want.spec.axis)
            point = found.get(key) or Point(
                tensor=want.tensor, role=want.role, spec=want.spec, consumers=(), rule=want.rule, reason=want.reason
            )
            if point.spec.token != want.spec.token:  # a reader that can only have one scale decides for all
                want = replace(want, spec=replace(want.spec, token=None))
                point = replace(point, spec=replace(point.spec, token=None))
            if point.spec != want.spec:
                raise InputError(
                    f"{node.name!r} would read {want.tensor!r} in another form than {point.uses[0][0]!r}, and a tensor "
                    f"is quantized once: {want.spec.format} and {point.spec.format}. Give both nodes one scheme in "
                    "overrides, or exclude one."
                )
            found[key] = replace(point, consumers=(*point.consumers, consumer))
        if not any(w.role != "shortcut" for w in wants):
            rule, reason = why_float(node.op_type)
            skips.append(Skip(node=node.name, op_type=node.op_type, rule=rule, reason=reason))
    for tensor, consumer in shortcuts:
        key = ("activation", tensor, None)
        if key in found:
            found[key] = replace(found[key], consumers=(*found[key].consumers, consumer))
    points = tuple(_tied(list(found.values()), ties))
    return Plan(
        model_sha256=model.sha256,
        settings=settings,
        points=points,
        skips=tuple(skips),
        held_inputs=dict(model.held_inputs),
    )


def _tied(points: list[Point], ties: list[Tie]) -> list[Point]:
    """Give the activation points that some tie connects a common group name: the smallest tensor name among them."""
    group = {p.tensor: p.tensor for p in points if p.role == "activation"}

    def root(tensor: str) -> str:
        while group[tensor] != tensor:
            tensor = group[tensor]
        return tensor

    for tie in ties:
        roots = sorted({root(t) for t in tie.tensors if t in group})
        for other in roots[1:]:
            group[other] = roots[0]
    sizes = Counter(map(root, group))
    return [
        replace(p, tie=root(p.tensor)) if p.role == "activation" and sizes[root(p.tensor)] > 1 else p for p in points
    ]
