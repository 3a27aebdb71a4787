"""Tables that a Gather reads rows of, as of words or positions: which are stored as codes, and which product has the
same values.

Model + Settings -> a `Want` of role "table" per Gather, or a `Veto` with the reason. Codes stand behind a
DequantizeLinear in front of the Gather, whose indices stay as they are: TensorRT-RTX 1.7.1 refuses codes that anything
but a DequantizeLinear reads, and makes one kernel of it, Gather and all, that reads 8 or 4 bits (measured on SM86, SM89
and SM120: one scale for each row, and blocks of 16 to 128 of a row).
"""

from __future__ import annotations

import math

import numpy as np
from onnx import NodeProto

from engines.core.documents import replace
from qdq.core.formats import FORMATS
from qdq.model.external import release
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, attribute
from qdq.plan.block_length import best
from qdq.plan.choice import FLOAT
from qdq.plan.plan import Plan, Point, Skip
from qdq.plan.rules.common import FLOATS, Decision, Veto, Want
from qdq.plan.settings import Settings
from qdq.plan.spec import Spec

RULE = "embeddings"
LEAST = 1 << 16  # elements: a smaller table saves less than 64 KB


def table(model: Model, node: NodeProto, settings: Settings) -> list[Decision]:
    """Want the table that a Gather reads stored as the settings say; a reason where it stays float."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
        return []
    tensor = node.input[0]
    info = model.info(tensor) if model.is_constant(tensor) else None
    if info is None or info.dtype not in FLOATS:
        return []
    shape = tuple(model.initializers[tensor].dims)
    sizes, small = " x ".join(map(str, shape)), math.prod(shape) < LEAST
    if small and (settings.embeddings == FLOAT or len(shape) != 2):
        return []
    if small:
        return [Veto(rule=RULE, reason=f"the table of {sizes} stays float: codes would save less than 64 KB")]
    if settings.embeddings == FLOAT:
        return [Veto(rule=RULE, reason=f"a table of {sizes}, in float: embeddings int8 or int4 stores it smaller")]
    if reason := _unfit(model, node, shape):
        return [Veto(rule=RULE, reason=f"the table of {sizes} stays float: {reason}")]
    spec, reason = _spec(model, tensor, shape, settings)
    return [Want(tensor=tensor, index=0, role="table", spec=spec, rule=RULE, reason=reason)]


def _unfit(model: Model, node: NodeProto, shape: tuple[int, ...]) -> str:
    """Why a table cannot be codes, "" where it can."""
    if len(shape) != 2:
        return f"it has {len(shape)} axes, and rows of a matrix are what has a scale each"
    if attribute(node, "axis", 0) not in (0, -2):
        return "its columns are read, and a scale belongs to a row"
    if node.name in model.inner_nodes:
        return "a body of an If, Loop or Scan reads it"
    if model.is_constant(node.input[1]):
        return "its indices are constant"
    if model.is_output(node.input[0]):
        return "it is an output of the model"
    for use in model.consumers(node.input[0]):
        other = use.node
        if use.index < 0:
            return f"the body of {other.name!r} reads it too"
        if (other.op_type, use.index) == ("Gather", 0) and attribute(other, "axis", 0) in (0, -2):
            continue
        if other.op_type in WEIGHTED and use.index == 1:
            continue
        return f"{other.name!r} ({other.op_type}) reads it too"
    return ""


def _spec(model: Model, tensor: str, shape: tuple[int, ...], settings: Settings) -> tuple[Spec, str]:
    """Format and granularity of a table, and why they are not what was asked for."""
    rows, fmt = Spec(format="int8", axis=0, weight_only=True), settings.embeddings
    if not FORMATS[fmt].blocks:
        return replace(rows, format=fmt), ""
    fitting = [block for block in settings.lengths(fmt) if shape[1] % block == 0]
    if not fitting:
        return rows, f"int8: blocks of {fmt} do not divide its {shape[1]} columns"
    if settings.block in fitting:
        return replace(rows, format=fmt, axis=1, block=int(settings.block)), ""
    block = best(model.array(tensor), 1, fitting, FORMATS[fmt])
    misfit = (
        f"blocks of {settings.block} do not divide its {shape[1]} columns"
        if settings.block in FORMATS[fmt].blocks
        else ""
    )
    return replace(rows, format=fmt, axis=1, block=block), misfit


def offered(model: Model, plan: Plan) -> dict[str, int]:
    """Float tables that could be codes, tensor -> elements; none where codes were asked for, or may not be kept."""
    if plan.settings.embeddings != FLOAT or not plan.settings.profile.tables:
        return {}
    asked = replace(plan.settings, embeddings="int8")
    quantized, found = set(plan.quantized_nodes), dict[str, int]()
    for node in model.graph.node:
        for want in (d for d in table(model, node, asked) if isinstance(d, Want)):
            readers = [use.node for use in model.consumers(want.tensor)]
            if all(n.op_type == "Gather" or n.name in quantized for n in readers):
                found[want.tensor] = math.prod(model.initializers[want.tensor].dims)
    return found


def twins(model: Model, plan: Plan) -> Plan:
    """The plan whose tables name under `tie` the quantized weight that has the same values, turned or not.

    Source: what models call tied embeddings: the last product multiplies by the table of words.
    """
    weights = list(dict.fromkeys(p.tensor for p in plan.weights))
    tied = []
    for point in plan.tables:
        turned = (weight for weight in weights if transposed(model, point.tensor, weight))
        twin = point.tensor if point.tensor in weights else next(turned, None)
        tied.append(replace(point, tie=twin))
    return replace(plan, tables=tuple(tied))


def transposed(model: Model, tensor: str, other: str) -> bool:
    """Whether a matrix is another one's transpose; the first row is looked at first."""
    ours, theirs = (model.initializers[name] for name in (tensor, other))
    if ours.data_type != theirs.data_type or tuple(ours.dims) != tuple(theirs.dims)[::-1]:
        return False
    rows, columns = model.array(tensor), model.array(other)
    same = np.array_equal(rows[0], columns[:, 0]) and np.array_equal(rows, columns.T)
    for read in (rows, columns):
        release(read)
    return same


def kept(model: Model, plan: Plan) -> Plan:
    """The plan without tables that a node reads in float all the same: codes would only come on top of the floats."""
    quantized = {name for p in plan.weights for name, _ in p.uses}
    tables: list[Point] = []
    skips = []
    for point in plan.tables:
        read = quantized | {name for name, _ in point.uses}
        if others := [use.node.name for use in model.consumers(point.tensor) if use.node.name not in read]:
            why = f"the table stays float: {others[0]!r} reads it in float, and codes would come on top"
            skips += [Skip(node=name, op_type="Gather", rule=RULE, reason=why) for name, _ in point.uses]
        else:
            tables.append(replace(point, tie=point.tie if point.tie in {p.tensor for p in plan.weights} else None))
    return replace(plan, tables=tuple(tables), skips=(*plan.skips, *skips))
