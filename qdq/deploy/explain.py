"""Why one node is quantized or not, what it costs, and what the compiler made of it.

plan.json, or a model that is planned anew -> the plan's own words + which rewrites fit + multiply-adds and weight
bytes + the audit's row.
Must not decide anything: it reads what the stages decided.
"""

from __future__ import annotations

from pathlib import Path

from engines.backends.profile import Profile
from engines.core.macs import macs_in_all
from engines.core.quantizers import read_graph
from qdq.build.engine import audit_engine, shape_ranges
from qdq.build.recipe import Recipe
from qdq.deploy.report.report import count, size
from qdq.model.external import tensor_bytes
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.passes.rewrites import FLOAT_REWRITES, USUAL_REWRITES, why_not_for
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.tune.sensitivity.table import Sensitivity, require_same


def explain(
    source: Path, node: str, recipe: Recipe, *, engine: Path | None = None, sensitivity: Path | None = None
) -> list[str]:
    """A few lines about one node.

    Args:
        source: a float model, or a plan (.json), which knows neither rewrites nor costs.
        node: its name in the prepared model.
        recipe: settings to plan with, and shapes to count at.
        engine: of this model, to say which kernel runs the node.
        sensitivity: table of this model, for the node's row.

    Raises:
        InputError: no such node; names the nearest. Or a table of another model.
    """
    table = Sensitivity.load(sensitivity) if sensitivity else None
    if source.suffix == ".json":
        plan = Plan.load(source)
        lines, sha256 = plan.explain(node), plan.model_sha256
    else:
        model = load_float(source)
        sha256 = model.sha256
        lines = placement.plan(model, recipe.settings).explain(node)
        lines += _rewrites(model, node, recipe.profile) + _cost(model, node, recipe)
    if table is not None:
        require_same(table, sha256)
        lines += table.explain(node)
    if engine is not None:
        audited = audit_engine(engine)
        rows = [row for row in audited.nodes if row.node == node]
        held = [f"  compiled: its table lies in the engine as {t.stored}" for t in audited.tables if t.node == node]
        lines += (
            held
            or [
                f"  compiled: runs in {row.consumed}, kernel {row.kernel!r}" + (f": {row.cause}" if row.cause else "")
                for row in rows
            ]
            or ["  compiled: no product of its own; see the layer table for the kernel it is fused into"]
        )
    return lines


def _rewrites(model: Model, node: str, profile: Profile) -> list[str]:
    """What each exact rewrite that starts from the operator of a node says of the node."""
    lines = []
    for name, rewrite in FLOAT_REWRITES.items():
        done = rewrite(model, {node})
        if done.fired or node in done.unfit:
            usual = "every plan of INT8 weights has it" if name in USUAL_REWRITES else "`tune` says whether it pays"
            fits = f"fits; {why_not_for(name, profile) or usual}"
            said = f"does not fit: {done.unfit[node]}" if node in done.unfit else fits
            lines.append(f"  rewrite {name}: {said}")
    return lines


def _cost(model: Model, name: str, recipe: Recipe) -> list[str]:
    """Multiply-adds and weight bytes of a node, with its share of the whole model's."""
    usual = {n: s.opt for n, s in shape_ranges(model, recipe.shapes, None).items()}
    products = {p.node.name: macs_in_all(graph, p.node) for graph, p in read_graph(model.proto, usual).all_products()}
    constants = [model.initializers[t] for t in model.node(name).input if t in model.initializers]
    weights, total = sum(map(tensor_bytes, constants)), sum(filter(None, products.values()))
    lines = []
    if (own := products.get(name)) is not None:
        known = " that are known" if None in products.values() else ""
        lines.append(f"  cost: {count(own)} multiply-adds, {own / max(total, 1):.1%} of the model's{known}")
    elif name in products:
        lines.append("  cost: unknown, for its shape is dynamic: give --shape NAME:SHAPE")
    if weights:
        lines.append(f"  weights: {size(weights)} in float")
    return lines
