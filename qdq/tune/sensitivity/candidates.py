"""What a group of nodes may become, and the model in which it alone has become that.

model + settings + candidates -> rewrites of all of them -> a plan each -> groups -> `Candidates.model`: Q/DQ or rounded
Weights are rounded without data and nothing is equalized: a float neighbour must find its tensors as they were, and a
trial must not depend on other groups. It must not run a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from onnx import ModelProto, NodeProto, TensorProto, helper

from engines.core.documents import replace
from qdq.assemble.insert import insert
from qdq.assemble.precision.convert import FLOAT_TYPES
from qdq.assemble.precision.types import ELEM
from qdq.core.errors import InputError
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.model.nodes import Names, bodies
from qdq.passes.draft import assign
from qdq.passes.rewrites import applied
from qdq.passes.rewrites.edit import Rewrite
from qdq.plan import placement
from qdq.plan.choice import FLOAT, FP32, choice
from qdq.plan.groups import Group, groups, together
from qdq.plan.plan import Plan, Point
from qdq.plan.rules.common import check_patterns
from qdq.plan.settings import Settings
from qdq.solve.solve import solve

ROUNDING = "clip"  # of weights: block scales of least error; one scale per channel is rounded to nearest


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The candidates of one model.

    Attributes:
        model: prepared, with the rewrites that any of the candidates needs.
        rewrites: those.
        texts: the candidates, as asked for.
        plans: candidate -> everything in it; not of `float`.
        settings: what they share.
        carried: the same for the nodes of `model`.
        unquantized_type: that `float` has: 'fp16' or 'bf16'.
    """

    model: Model
    rewrites: tuple[Rewrite, ...]
    texts: tuple[str, ...]
    plans: dict[str, Plan]
    settings: Settings
    carried: Settings
    unquantized_type: str

    @classmethod
    def of(
        cls, prepared: Model, settings: Settings, texts: Sequence[str], unquantized_type: str = "fp16"
    ) -> Candidates:
        """Plan each candidate.

        Args:
            prepared: the float model.
            settings: what candidates share; nodes that it excludes, or has an override for, have no row.
            texts: as `qdq.plan.choice` reads them.
            unquantized_type: of `float`; 'auto' is 'fp16'.

        Raises:
            InputError: an unknown candidate, one twice, none that quantizes, or one that the compiler has no kernels
                for.
        """
        kind = "fp16" if unquantized_type == "auto" else unquantized_type
        if len(set(texts)) < len(texts):
            raise InputError(f"--candidates has one twice: {', '.join(texts)}.")
        if FP32 in texts or (FLOAT in texts and kind == "fp32"):
            raise InputError("A candidate of FP32 is the float model itself, without any error: leave it out.")
        check_patterns(prepared, settings)
        fixed = replace(settings, exclude=(*settings.exclude, *settings.overrides), overrides={})
        schemes = {text: fixed.alone(choice(text)) for text in texts if choice(text).quantizes}
        if not schemes:
            raise InputError(
                "No candidate quantizes anything: give --candidates a scheme, as in int8,fp8,int4:block=32."
            )
        usual = frozenset[tuple[str, str]]().union(*(placement.usual(prepared, own) for own in schemes.values()))
        model, rewrites = applied(prepared, usual)
        carried = placement.carried(settings, prepared, model)
        plans = {}
        for text, own in schemes.items():
            made = placement.placed(model, placement.carried(own, prepared, model))
            plans[text] = replace(made, settings=own, rewrites=rewrites)
        return cls(
            model=model,
            rewrites=rewrites,
            texts=tuple(texts),
            plans=plans,
            settings=settings,
            carried=carried,
            unquantized_type=kind,
        )

    @cached_property
    def measuring(self) -> Plan:
        """A plan whose table serves every candidate, and the nodes that overrides of the settings decide."""
        plans = list(self.plans.values())
        if self.carried.overrides:
            plans.append(placement.placed(self.model, self._with_overrides(self.carried, {"*": FLOAT})))
        return together(plans)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The nodes that some candidate quantizes, by what must be one choice."""
        return groups(self.model, together(list(self.plans.values())))

    def check_overrides(self) -> None:
        """Refuse overrides that no choice can be made beside.

        Raises:
            InputError: a node of theirs and one that a candidate is for read one tensor in two forms.
        """
        for text in self.plans if self.carried.overrides else ():
            placement.placed(self.model, self._with_overrides(self.carried.alone(choice(text)), {}))

    def _with_overrides(self, settings: Settings, last: Mapping[str, str]) -> Settings:
        return replace(settings, overrides={**self.carried.overrides, **last})

    def affected(self, group: Group, text: str) -> tuple[str, ...]:
        """The nodes of a group to which a candidate does something."""
        plan = self.plans.get(text)
        return group.nodes if plan is None else tuple(n for n in group.nodes if n in plan.quantized_nodes)

    def like(self, group: Group, text: str) -> str:
        """The first candidate that does the same to a group: w4a8 to a convolution is what int8 is."""
        if text not in self.plans:
            return text
        mine = _part(self.plans[text], self.affected(group, text))
        others = (other for other in self.plans if self.affected(group, other) == self.affected(group, text))
        return next(o for o in others if _part(self.plans[o], self.affected(group, o)) == mine)

    def why_not(self, group: Group, text: str) -> str:
        """Why a candidate does nothing to a group, "" where it does something."""
        if self.affected(group, text):
            return ""
        reasons = {skip.node: skip.reason for skip in self.plans[text].skips}
        return reasons.get(group.name, "no rule wants it")

    def trial(self, group: Group, text: str, table: CalibrationTable) -> Model:
        """The model with a group in a candidate, and everything else in float32."""
        plan, nodes = self.plans.get(text), self.affected(group, text)
        if plan is None:
            return rounded(self.model, nodes, FLOAT_TYPES[self.unquantized_type])
        own = quick(replace(plan, points=_part(plan, nodes)))
        return insert(self.model, own, solve(self.model, own, table))


def _part(plan: Plan, nodes: Collection[str]) -> tuple[Point, ...]:
    """What of a plan is about some weighted nodes."""
    points = []
    for point in plan.points:
        if kept := tuple(c for c in point.consumers if c.rpartition(":")[0] in nodes):
            points.append(replace(point, consumers=kept, tie=None, reason=""))
    return tuple(points)


def quick(plan: Plan) -> Plan:
    """The plan by settings that need no samples."""
    return replace(plan, settings=replace(plan.settings.quick, rounding=ROUNDING, equalize="none").settled)


def rounded(model: Model, nodes: Collection[str], low: str) -> Model:
    """A model whose nodes of these names read and write what the low float type holds.

    Sums are in float32, as ONNX Runtime and the compilers' kernels have them.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    fresh = Names(model.names()).fresh

    def through(name: str, made: list[NodeProto], output: str) -> None:
        inner = fresh(f"{name}_{low}")
        made.append(helper.make_node("Cast", [name], [inner], inner, to=ELEM[low]))
        made.append(helper.make_node("Cast", [inner], [output], fresh(f"{output}_Cast"), to=TensorProto.FLOAT))

    def rewritten(old: list[NodeProto]) -> list[NodeProto]:
        made = list[NodeProto]()
        for node in old:
            for body in bodies(node):
                assign(body.node, rewritten(list(body.node)))
            if node.name not in nodes:
                made.append(node)
                continue
            for index, name in enumerate(node.input):
                if name and model.dtype(name) == "float32":
                    output = fresh(f"{name}_rounded")
                    through(name, made, output)
                    node.input[index] = output
            output, node.output[0] = node.output[0], fresh(f"{node.output[0]}_exact")
            made.append(node)
            through(node.output[0], made, output)
        return made

    assign(proto.graph.node, rewritten(list(proto.graph.node)))
    return model.replace(proto)


def outer_nodes(model: Model, nodes: Collection[str]) -> frozenset[str]:
    """Of some nodes those of the main graph, and for one in a body the node of the main graph that runs it."""
    found = set[str]()

    def holds(node: NodeProto) -> bool:
        return node.name in nodes or any(holds(inner) for body in bodies(node) for inner in body.node)

    for node in model.graph.node:
        if holds(node):
            found.add(node.name)
    return frozenset(found)
