"""Where quantizers go: rules over a prepared float graph, united into a readable, editable plan.

Model + Settings -> rewrites that every plan has -> every rule says Want, Veto, Tie or nothing for every node -> Plan.
Rules are order-free: a veto beats a want, ties of the same point are united. No rule sees data, so the plan can be
made, read and edited before anything is measured. Nodes without weights read what the weighted ones read, or have a
tensor quantized for the sake of the kernel that makes it (`rules.tensorrt`). This module must not compute scales or
change the model.

Sources: NVIDIA's placement advice, what TensorRT-RTX 1.7.1 compiled from about 90 small graphs (SM89), and the facts of
the compiler's profile, each with its own source (`engines.backends.profile`).
"""

from __future__ import annotations

import fnmatch
import glob
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from onnx import NodeProto

from engines.core.documents import replace
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, controlled_nodes
from qdq.passes.rewrites import USUAL_REWRITES, applied, why_not_for
from qdq.plan import tables
from qdq.plan.choice import choice
from qdq.plan.groups import united
from qdq.plan.plan import Plan, Point, Role, Skip
from qdq.plan.rules import tensorrt
from qdq.plan.rules.common import RULES as COMMON, Tie, Veto, Want, check_patterns, why_float
from qdq.plan.settings import AUTO, Settings

RULES = (*COMMON, *tensorrt.RULES, tables.table)
BESIDE = ("operand", "shortcut")  # roles of what nodes without weights read
GAINLESS = frozenset(("narrow", "small", "eighths"))  # rules that veto what is not worth it: not what was trained so


def plan(model: Model, settings: Settings | None = None) -> Plan:
    """Decide for every node of a prepared float model whether and how its operands are quantized.

    Args:
        model: prepared (unique node names, shapes inferred, constants folded), without quantizers.
        settings: scheme and exclusions.

    Returns:
        The plan: points sorted by their first use in the graph, and one Skip with a reason for every other node. Its
        rewrites are `usual`; points and skips are of the rewritten model.

    Raises:
        InputError: an exclude or override pattern that matches nothing, an override that quantizes nothing, or nodes
            of different schemes that read one tensor in different formats. A model without anything to quantize gives
            a plan without points.
    """
    settings = asked = settings or Settings()
    check_patterns(model, settings)
    settings = _in_own_formats(model, settings)
    written, rewrites = applied(model, usual(model, settings))
    made = placed(written, carried(settings, model, written))
    check_overrides(model, written, asked, made)
    return replace(made, settings=settings, rewrites=rewrites)


def check_overrides(before: Model, after: Model, settings: Settings, made: Plan) -> None:
    """Refuse a scheme for nodes of which it quantizes none.

    Args:
        before: the model that the settings name nodes of.
        after: the same after rewrites.
        settings: with overrides.
        made: their plan, of `after`.

    Raises:
        InputError: names the pattern, a node, and why it is not quantized.
    """
    reasons = {skip.node: skip.reason for skip in made.skips}
    inside = {name for point in made.points for name, _ in point.uses}
    for pattern, text in settings.overrides.items():
        if not choice(text).quantizes:
            continue
        own = carried(replace(settings, exclude=(), overrides={pattern: text}), before, after).overrides
        names = [n for n in (*inside, *reasons) if any(fnmatch.fnmatchcase(n, some) for some in own)]
        if names and not inside.intersection(names):
            node = min(names)
            raise InputError(
                f"--override {pattern}={text} quantizes nothing: {node!r} stays in float, for {reasons[node]}. Name "
                "nodes that can be quantized, as `qdq plan` lists them, or leave it out."
            )


def usual(model: Model, settings: Settings) -> frozenset[tuple[str, str]]:
    """The (rewrite, node) pairs that every plan has where they fit: else the compiler has no integer kernel."""
    return frozenset(
        (name, node.name)
        for name, formats in USUAL_REWRITES.items()
        if not why_not_for(name, settings.profile)
        for node in (*model.graph.node, *controlled_nodes(model.graph))
        if node.op_type in WEIGHTED
        and (model.trained is None or node.name not in model.trained.weights)
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
    stored: dict[str, Point] = {}
    others: list[tuple[str, Want]] = []  # consumer and what it asks for, of nodes without weights
    skips: list[Skip] = []
    ties: list[Tie] = []
    for node in (*model.graph.node, *controlled_nodes(model.graph)):
        wants, vetoes, tied_here = _decided(model, node, settings)
        ties += tied_here
        if vetoes:
            reason = "; ".join(v.reason for v in vetoes)
            skips.append(Skip(node=node.name, op_type=node.op_type, rule=vetoes[0].rule, reason=reason))
            continue
        for want in (want for want in wants if want.role == "table"):
            held = stored.get(want.tensor) or _point(want)
            stored[want.tensor] = replace(held, consumers=(*held.consumers, f"{node.name}:{want.index}"))
        if wants and all(want.role == "table" for want in wants):
            continue
        asked = [want for want in wants if want.role not in BESIDE]
        beside = [want for want in wants if want.role in BESIDE]
        others += [(f"{node.name}:{want.index}", want) for want in beside]
        for want in asked:
            consumer = f"{node.name}:{want.index}"
            key = (want.role, want.tensor, want.spec.axis)
            point = found.get(key) or _point(want)
            if point.spec.token != want.spec.token:  # a reader that can only have one scale decides for all
                want = replace(want, spec=replace(want.spec, token=None))
                point = replace(point, spec=replace(point.spec, token=None))
            if point.spec.residual != want.spec.residual:
                plain = want.spec if point.spec.residual else point.spec
                want, point = replace(want, spec=plain), replace(point, spec=plain)
            if point.spec != want.spec:
                raise InputError(
                    f"{node.name!r} would read {want.tensor!r} in another form than {point.uses[0][0]!r}, and a tensor "
                    f"is quantized once: {want.spec.format} and {point.spec.format}. Give both nodes one scheme in "
                    "overrides, or exclude one."
                )
            found[key] = replace(point, consumers=(*point.consumers, consumer))
        if not asked:
            why = next(((want.rule, want.reason) for want in beside if want.reason), None)
            rule, reason = why or why_float(node.op_type, settings.profile)
            skips.append(Skip(node=node.name, op_type=node.op_type, rule=rule, reason=reason))
    order = {node.name: i for i, node in enumerate((*model.graph.node, *controlled_nodes(model.graph)))}
    read = [_as_trained(model, point, settings) for point in _read_too(found, others)]
    points = sorted(read, key=lambda point: order[point.uses[0][0]])
    tied = tuple(_tied(points, ties))
    found_all = Plan(
        model_sha256=model.sha256,
        settings=settings,
        points=tied,
        skips=tuple(skips),
        tables=tuple(stored.values()),
        held_inputs=dict(model.held_inputs),
    )
    return tables.kept(model, tables.twins(model, found_all))


def remaining(model: Model, plan: Plan, kept: Collection[str]) -> frozenset[str]:
    """Which operands, "node:index", of nodes without weights stay quantized where of the weighted nodes only some do.

    As the rules say of the model without the other nodes: most read what a weighted node reads, and stay with it;
    `rules.tensorrt` may quantize a tensor for the sake of the convolution that makes it, too; attention in FP8 stays
    with any.
    """
    if not kept:
        return frozenset()
    weighted = set(plan.quantized_nodes)
    beside = {c for p in plan.activations for c in p.consumers if c.rpartition(":")[0] not in weighted}
    names = {c.rpartition(":")[0] for c in beside}
    nodes = (*model.graph.node, *controlled_nodes(model.graph)) if beside else ()
    gone = sorted(n.name for n in nodes if n.op_type in WEIGHTED and n.name not in names.union(kept))
    settings = replace(plan.settings, exclude=(*plan.settings.exclude, *map(glob.escape, gone)))
    others = []
    for node in (n for n in nodes if n.name in names):
        wants, vetoes, _ = _decided(model, node, settings)
        others += [(f"{node.name}:{w.index}", w) for w in wants if w.role in BESIDE and not vetoes]
    left = [p for p in (_less(p, kept) for p in plan.activations) if p.consumers]
    read = _read_too({(p.role, p.tensor, None): p for p in left}, others)
    return frozenset(c for p in read for c in p.consumers if c in beside)


def _decided(model: Model, node: NodeProto, settings: Settings) -> tuple[list[Want], list[Veto], list[Tie]]:
    """What the rules say of a node; what is not worth it is no reason against a quantizer that was trained."""
    decisions = [d for rule in RULES for d in rule(model, node, settings)]
    own = model.trained is not None and node.name in model.trained.weights
    vetoes = [d for d in decisions if isinstance(d, Veto) and not (own and d.rule in GAINLESS)]
    return [d for d in decisions if isinstance(d, Want)], vetoes, [d for d in decisions if isinstance(d, Tie)]


def _less(point: Point, kept: Collection[str]) -> Point:
    """The point as some of its weighted readers alone have it."""
    return replace(point, consumers=tuple(c for c in point.consumers if c.rpartition(":")[0] in kept))


def _in_own_formats(model: Model, settings: Settings) -> Settings:
    """The settings with schemes for products that came in FP8 or INT4, unless overrides say otherwise."""
    own = {}
    for name, grid in (model.trained.weights if model.trained else {}).items():
        scheme, asked = settings.scheme_of(name), any(fnmatch.fnmatchcase(name, p) for p in settings.overrides)
        other = scheme.weight != grid.format or (grid.block and settings.block == AUTO and not scheme.compute_format)
        known = grid.block in (settings.lengths(grid.format) or (None,)) and grid.format in settings.profile.formats
        if known and other and not asked and grid.format != "int8":
            own[glob.escape(name)] = f"{grid.format}:block={grid.block}" if grid.block else grid.format
    return replace(settings, overrides={**settings.overrides, **own}) if own else settings


def _as_trained(model: Model, point: Point, settings: Settings) -> Point:
    """The point with the granularity of the model's own quantizer, where it came with one of that format."""
    if model.trained is None:
        return point
    if point.role == "activation":
        grid = model.trained.of(point.tensor, point.consumers)
        if grid is None or grid.format != point.spec.format:
            return point
        shift = bool(grid.zero_point) and bool(settings.profile.shift)
        return replace(point, spec=replace(point.spec, shift=shift, token=None), trained=True)
    grids = [model.trained.weights.get(name) for name, _ in point.uses]
    spec = point.spec
    fit = all(g is not None and g.format == spec.format and g.block == spec.block for g in grids)
    if not grids or not fit or spec.compute_format is not None:
        return point
    whole = all(g is not None and g.scale.size == 1 for g in grids)
    return replace(point, spec=replace(point.spec, axis=None) if whole else point.spec, trained=True)


def _point(want: Want) -> Point:
    """What a want asks for, without consumers."""
    roles: dict[str, Role] = {"weight": "weight", "table": "table"}
    return Point(
        tensor=want.tensor,
        role=roles.get(want.role, "activation"),
        spec=want.spec,
        consumers=(),
        rule=want.rule,
        reason=want.reason,
    )


def _read_too(found: Mapping[tuple[str, str, int | None], Point], others: Sequence[tuple[str, Want]]) -> list[Point]:
    """The points of the weighted nodes, with what other nodes read of them, and those that only others want."""
    points = dict(found)
    for consumer, want in sorted(others, key=lambda pair: pair[1].role):  # operands before shortcuts
        key = ("activation", want.tensor, None)
        if want.role == "operand":
            points.setdefault(key, _point(want))
        if key in points and consumer not in points[key].consumers:
            points[key] = replace(points[key], consumers=(*points[key].consumers, consumer))
    return list(points.values())


def _tied(points: list[Point], ties: list[Tie]) -> list[Point]:
    """Give the activation points that some tie connects a common group name: the smallest tensor name among them."""
    names = sorted(p.tensor for p in points if p.role == "activation")
    roots = united(names, [tie.tensors for tie in ties])
    sizes = Counter(roots.values())
    return [
        replace(p, tie=roots[p.tensor]) if p.role == "activation" and sizes[roots[p.tensor]] > 1 else p for p in points
    ]
