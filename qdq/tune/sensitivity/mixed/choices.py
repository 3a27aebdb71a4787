"""What a choice of a candidate for each group is: an ordinary plan, and the model that would be compiled of it.

candidates + a choice -> `Plan`, with overrides for nodes that are not of the commonest scheme -> Q/DQ model, finished
Scales are quick ones: structure and size do not depend on them, and errors of choices are compared alike.
"""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engines.core.documents import replace
from qdq.assemble.finish import finish
from qdq.assemble.insert import insert
from qdq.core.formats import FORMATS
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.choice import FLOAT, choice
from qdq.plan.plan import Plan
from qdq.solve.solve import solve
from qdq.tune.sensitivity.candidates import Candidates, quick

FLOAT_BYTES = {"fp16": 2.0, "bf16": 2.0, "fp32": 4.0}
SCALE_BYTES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The choices of one model.

    Attributes:
        candidates: of the model; `float` is one, whether it is among them or not.
        unquantized_type: of what is not quantized.
    """

    candidates: Candidates
    unquantized_type: str

    @property
    def kind(self) -> str:
        """The float type of what is not quantized."""
        return self.unquantized_type if self.unquantized_type != "auto" else "fp16"

    def plan(self, chosen: Sequence[str]) -> Plan:
        """The plan of a choice."""
        every = self.candidates
        names = [(node, text) for group, text in zip(every.groups, chosen, strict=True) for node in group.nodes]
        plain = Counter(text for _, text in names if text in every.plans and text == choice(text).scheme)
        scheme = max(plain, key=lambda text: (plain[text], text), default=choice(next(iter(every.plans))).scheme)
        own = {glob.escape(node): text for node, text in names if text != scheme}
        settings = replace(every.carried, scheme=scheme, overrides={**every.carried.overrides, **own})
        made = placement.placed(every.model, settings)
        return replace(made, settings=settings, rewrites=every.rewrites, unquantized_type=self.kind)

    def model(self, chosen: Sequence[str], table: CalibrationTable) -> Model:
        """The model of a choice with quick scales, as it would be compiled."""
        plan, model = quick(self.plan(chosen)), self.candidates.model
        made = insert(model, plan, solve(model, plan, table)) if plan.points else model
        return finish(made, plan, unquantized_type=self.unquantized_type, table=table).model

    def everywhere(self, text: str) -> tuple[str, ...]:
        """A candidate in every group to which it does something, and float in the others."""
        every = self.candidates
        return tuple(text if text != FLOAT and every.affected(group, text) else FLOAT for group in every.groups)

    def weight_bytes(self, g: int, texts: Sequence[str]) -> dict[str, float]:
        """Bytes of the weights of a group in some candidates, by the formats alone."""
        every = self.candidates
        group = every.groups[g]
        names = {every.model.node(node).input[1] for node in group.nodes}
        counts = {name: math.prod(every.model.initializers[name].dims) for name in names}
        found = {}
        for text in texts:
            bytes_ = {name: count * FLOAT_BYTES[self.kind] for name, count in counts.items()}
            plan = every.plans.get(text)
            for point in plan.weights if plan else ():
                if point.tensor in counts and {n for n, _ in point.uses}.intersection(group.nodes):
                    count, fmt = counts[point.tensor], FORMATS[point.spec.format]
                    scales = count / point.spec.block if point.spec.block else 1.0
                    bytes_[point.tensor] = count * fmt.bits / 8 + SCALE_BYTES * scales
            found[text] = math.fsum(bytes_.values())
        return found

    def counts(self, chosen: Sequence[str]) -> dict[str, int]:
        """How many nodes have each candidate."""
        found = Counter[str]()
        for group, text in zip(self.candidates.groups, chosen, strict=True):
            found[text] += len(group.nodes)
        return {text: found[text] for text in dict.fromkeys((*self.candidates.texts, FLOAT)) if found[text]}
