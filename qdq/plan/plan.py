"""The plan: which tensors are quantized how, and why every other node stays in float. A file a person can edit.

placement.plan or tune -> Plan -> plan.json -> read back, checked against the model.
A plan names nodes and tensors of the prepared model. This module must not decide anything.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import Counter
from typing import Annotated, ClassVar, Literal

import msgspec

from engines.core.documents import Document, Part
from engines.core.operators import COMPOUNDS, CONTRACTIONS, WEIGHTED
from qdq.core.errors import InputError, StaleFileError
from qdq.core.files import read_document, write_text
from qdq.core.formats import FORMATS
from qdq.model.model import Held, Model
from qdq.model.nodes import controlled_nodes
from qdq.passes.rewrites import rewritten
from qdq.passes.rewrites.edit import Rewrite
from qdq.passes.steered import held
from qdq.plan.choice import FP32
from qdq.plan.settings import Settings
from qdq.plan.spec import Spec

Consumer = Annotated[str, msgspec.Meta(pattern=r"^.+:\d+$")]
Role = Literal["activation", "weight", "table"]
REASONS = 5  # that `Plan.why_nothing` names; the plan has all
_MULTIPLYING = CONTRACTIONS | COMPOUNDS


class Point(Part, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor that is quantized.

    Attributes:
        tensor: its name in the prepared model.
        role: "activation", "weight" or "table".
        spec: format and granularity.
        consumers: the operands that read the quantized tensor, each "node:input index".
        rule: the rule that wants it.
        trained: its scales, and of a weight its codes, are those that the model came with.
        tie: points with the same name here share scale and zero point as far as their ranges are alike; of a table, the
            quantized weight that has the same values, and shares its codes where it can.
        reason: why the spec is not the one that the settings ask for, or why a tensor is quantized that no weighted
            node reads; "" for all others.
    """

    tensor: str
    role: Role
    spec: Spec
    consumers: Annotated[tuple[Consumer, ...], msgspec.Meta(min_length=1)]
    rule: str
    tie: str | None = None
    reason: str = ""
    trained: bool = False

    @property
    def uses(self) -> tuple[tuple[str, int], ...]:
        """The consumers as (node name, input index)."""
        return tuple((name, int(index)) for name, _, index in (c.rpartition(":") for c in self.consumers))


class Skip(Part, frozen=True, kw_only=True):
    """One node that stays in float, the rule that says so and the reason for a person."""

    node: str
    op_type: str
    rule: str
    reason: str


class Plan(Document, frozen=True, kw_only=True):
    """What is to be quantized in one model.

    Invariants: every node of the model is the consumer of a weight point or of a table, or has a Skip.

    Attributes:
        model_sha256: of the user's model file, as `storage.load` computes it.
        settings: what the plan was made with.
        points: quantized operands.
        tables: constants that nothing multiplies by, stored as codes.
        skips: nodes left in float.
        rewrites: done to the prepared model before points and skips are looked up in it, or to the Q/DQ model.
        unquantized_type: float type of what is not quantized, as tuned; None leaves it to who writes the model.
        held_inputs: input -> the value that the model computes with in its place, also before anything is looked up.
    """

    FORMAT: ClassVar[str] = "qdq.plan/2"
    MAKE: ClassVar[str] = "qdq plan MODEL -o plan.json"

    model_sha256: str
    settings: Settings
    points: tuple[Point, ...]
    skips: tuple[Skip, ...]
    tables: tuple[Point, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    unquantized_type: str | None = None
    held_inputs: dict[str, Held] = msgspec.field(default_factory=dict)

    @property
    def activations(self) -> tuple[Point, ...]:
        """The points whose range must be measured."""
        return tuple(p for p in self.points if p.role == "activation")

    @property
    def weights(self) -> tuple[Point, ...]:
        """The points whose values are constant."""
        return tuple(p for p in self.points if p.role == "weight")

    @property
    def quantizes(self) -> bool:
        """Whether anything is."""
        return bool(self.points or self.tables)

    @property
    def quantized_nodes(self) -> tuple[str, ...]:
        """Names of the nodes whose weight is quantized, in the order of the points."""
        return tuple(dict.fromkeys(name for p in self.weights for name, _ in p.uses))

    @property
    def in_fp32(self) -> frozenset[str]:
        """Names of the nodes that compute in FP32, whatever the other unquantized nodes compute in."""
        return frozenset(skip.node for skip in self.skips if skip.rule == FP32)

    @property
    def operands(self) -> str:
        """What the quantized nodes hold and read, as in 'INT8', 'INT4 weights' or 'INT4 weights, INT8 data'."""
        weights, data = (
            " and ".join(sorted({p.spec.format.upper() for p in points})) for points in (self.weights, self.activations)
        )
        if not weights or weights == data:
            return weights or "low precision"
        return f"{weights} weights" + (f", {data} data" if data else "")

    @property
    def why_nothing(self) -> str:
        """Why no node is quantized, counted by reason: what to tell who expected some; "" where some are.

        Of each node with weights, or that may hold such nodes; the most frequent reasons first.
        """
        if self.quantized_nodes:
            return ""
        told = [s for s in self.skips if s.op_type in _MULTIPLYING or s.rule in ("containers", "foreign", "excluded")]
        counts = Counter((skip.op_type, skip.reason) for skip in told).most_common()
        parts = [f"{count} {op_type}: {reason}" for (op_type, reason), count in counts[:REASONS]]
        more = sum(count for _, count in counts[REASONS:])
        nothing = "Nothing but tables" if self.tables else "Nothing"
        if not parts:
            return f"{nothing} is quantized: none of the {len(self.skips)} nodes is a {', '.join(WEIGHTED)}."
        return f"{nothing} is quantized. {'; '.join(parts)}{f'; {more} more' if more else ''}."

    @property
    def sha256(self) -> str:
        """Of the plan's JSON text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write plan.json; it appears whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
            InputError: missing, not JSON, another format version, or an entry that makes no sense.
        """
        return read_document(path, cls, "plan")

    def form(self, prepared: Model) -> Model:
        """The model that the plan names nodes and tensors of: with inputs held, and with the rewrites.

        Raises:
            InputError: an edited plan names an input, a node or a rewrite that does not exist, or does not fit.
        """
        return rewritten(held(prepared, self.held_inputs), self.rewrites)

    def check(self, model: Model) -> None:
        """Refuse a plan that does not fit a prepared model.

        Raises:
            StaleFileError: it was made from another model.
            InputError: an edited entry names what the model lacks, or quantizes one operand of a node only.
        """
        if self.model_sha256 != model.sha256:
            raise StaleFileError(
                f"The plan was made from another model: it says sha256 {self.model_sha256[:12]}…, this model has "
                f"{model.sha256[:12]}…. Make a plan for this model with `qdq plan`."
            )
        operands = {n.name: n.input for n in (*model.graph.node, *controlled_nodes(model.graph))}
        for point in (*self.points, *self.tables):
            for node, index in point.uses:
                if point.tensor not in operands.get(node, ())[index : index + 1]:
                    near = difflib.get_close_matches(node, operands, n=1)
                    hint = f" Did you mean node {near[0]!r}?" if near and near[0] != node else ""
                    raise InputError(
                        f"The plan quantizes {point.tensor!r} for operand {index} of node {node!r}, but the model "
                        f"has no such operand.{hint}"
                    )
            if (point.role != "activation") != model.is_constant(point.tensor):
                raise InputError(
                    f"The plan calls {point.tensor!r} {point.role}, but in the model it is "
                    f"{'constant' if model.is_constant(point.tensor) else 'computed'}."
                )
            if point.role == "activation" and point.spec.axis is not None:
                raise InputError(
                    f"The plan quantizes the activation {point.tensor!r} along axis {point.spec.axis}: activations "
                    "have one scale. Remove the axis."
                )
        for point in self.tables:
            if other := next((n for n, i in point.uses if (model.node(n).op_type, i) != ("Gather", 0)), ""):
                raise InputError(
                    f"The plan stores {point.tensor!r} as a table for {other!r}, which is no Gather of its rows. "
                    "Remove the consumer."
                )
            shape, block = tuple(model.initializers[point.tensor].dims), point.spec.block
            if len(shape) != 2 or point.spec.axis != (1 if block else 0) or (block and shape[1] % block):
                raise InputError(
                    f"The plan stores the table {point.tensor!r} of {' x '.join(map(str, shape))} with scales along "
                    f"axis {point.spec.axis}{f' in blocks of {block}' if block else ''}: rows have a scale each (axis "
                    "0), or blocks that divide a row (axis 1). Mend its spec, or remove the entry."
                )
        data = {name for p in self.activations for name, index in p.uses if index == 0}
        float_data = {name for p in self.weights if p.spec.weight_only for name, _ in p.uses}
        if alone := set(self.quantized_nodes) - data - float_data:
            raise InputError(
                f"The plan quantizes the weight but not the data of {', '.join(sorted(alone)[:3])}; an integer "
                "kernel needs both. Remove the weight's point, restore the data's, or set weight_only."
            )
        if both := sorted(float_data & data):
            raise InputError(
                f"The plan quantizes the data of {', '.join(both[:3])}, whose weight is weight_only: its product is in "
                "float. Remove the data's consumer, or weight_only."
            )

    def explain(self, node: str) -> list[str]:
        """Say in a few lines what happens to a node and why.

        Raises:
            InputError: no such node; names the nearest.
        """
        mine = [p for p in (*self.points, *self.tables) if any(name == node for name, _ in p.uses)]
        skip = next((s for s in self.skips if s.node == node), None)
        stored = [name for p in self.tables for name, _ in p.uses]
        names = [*self.quantized_nodes, *stored, *(s.node for s in self.skips)]
        if rewrite := next((r.name for r in self.rewrites if node in r.nodes and node not in names), ""):
            parts = [name for name in names if re.fullmatch(rf"{re.escape(node)}(_\d+)+", name)]
            first = f"{node}: the plan's rewrite {rewrite!r} makes other nodes of it: {', '.join(parts)}"
            return [first, *(line for part in parts for line in self.explain(part))]
        if not mine and skip is None:
            near = difflib.get_close_matches(node, names, n=3, cutoff=0.3)
            raise InputError(f"The plan has no node {node!r}." + (f" Near names: {', '.join(near)}." if near else ""))
        lines = []
        if node in self.quantized_nodes:
            lines.append(f"{node}: quantized")
        elif node in stored:
            lines.append(f"{node}: reads a table of codes")
        for p in mine:
            per = grain(p.spec)
            shared = f", shared with {len(p.consumers) - 1} other operands" if len(p.consumers) > 1 else ""
            tied = f", tied with the group {p.tie!r}" if p.tie else ""
            why = f": {p.reason}" if p.reason else ""
            why += ", as the model came with" if p.trained else ""
            lines.append(f"  {p.role} {p.tensor!r}: {p.spec.format} {per}, rule {p.rule!r}{shared}{tied}{why}")
        if skip is not None:
            lines.append(f"{node} ({skip.op_type}): float, rule {skip.rule!r}: {skip.reason}")
        return lines


def grain(spec: Spec) -> str:
    """The granularity of a spec in words."""
    if spec.token:
        return "per token" if spec.token == "always" else "per tensor or per token, as its range says"
    if spec.residual:
        return "per tensor, in two codes"
    if spec.axis is None:
        blocks = FORMATS[spec.format].blocks if FORMATS[spec.format].scale_format else ()
        return f"in blocks of {blocks[0]}, scaled as the engine runs" if blocks else "per tensor"
    alone = ", weight only" if spec.weight_only else ""
    if spec.block is None:
        return f"per channel on axis {spec.axis}{alone}"
    read = f", read as {spec.compute_format} per channel" if spec.compute_format else alone
    return f"in blocks of {spec.block} along axis {spec.axis}{read}"
