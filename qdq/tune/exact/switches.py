"""The noise of any set of quantized operands, with one model: each operand reads the quantized or the float tensor.

Plan of all + scales -> `insert` -> a Where in front of each quantized operand, by a boolean input -> `Switches`
consumers that are quantized -> noise over signal of the outputs, on samples that had no part in the scales
Weights are rounded to nearest and nothing is equalized, as a float operand must find its tensor as it was. What is not
quantized is float32. It must not choose.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, TensorProto, helper

from engines.core.documents import replace
from qdq.assemble.held_out import comparable, energies
from qdq.assemble.insert import insert
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.model.nodes import Names
from qdq.passes.draft import assign
from qdq.plan.plan import Plan
from qdq.solve.solve import solve

HELD_BYTES = 1 << 28  # of the samples and their float outputs, which stay in memory
FLOAT_NOISE = 1e-7  # over signal, with all in float: more, and float operands do not find what they should


@dataclass(slots=True)
class Switches:
    """A model with switches.

    Attributes:
        session: of it.
        inputs: operand, "node:index" -> the boolean input that has it quantized.
        samples: each with the outputs of the float model.
    """

    session: Session
    inputs: Mapping[str, str]
    samples: list[tuple[Sample, Mapping[str, np.ndarray]]]
    _known: dict[tuple[frozenset[str], int], tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Model, plan: Plan, table: CalibrationTable, samples: Iterable[Sample], *, most: int
    ) -> Switches | None:
        """The switches of a plan, on the first samples; None where they do not give the float model, all off.

        Args:
            model: the float model that the plan is for.
            most: samples, at most.
        """
        outputs = comparable(model)
        plan = replace(plan, settings=replace(plan.settings.quick, equalize="none"))
        quantized = insert(model, plan, solve(model, plan, table))
        proto, inputs = _switched(model, quantized, plan)
        if not outputs or inputs is None:
            return None
        whole, found = Session(model, outputs, threads=1), list[tuple[Sample, Mapping[str, np.ndarray]]]()
        left = HELD_BYTES
        for sample in samples:
            expected = whole(sample)
            left -= sum(array.nbytes for array in (*sample.values(), *expected.values()))
            if found and (left < 0 or len(found) == most):
                break
            found.append((sample, expected))
        made = cls(session=Session(quantized.replace(proto), outputs, threads=1), inputs=inputs, samples=found)
        return made if made.noise((), count=1) <= FLOAT_NOISE else None

    def noise(self, consumers: Collection[str], *, count: int) -> float:
        """Noise over signal of all outputs, sum (y - float y)^2 / sum (float y)^2; infinite if not finite.

        Args:
            consumers: operands that are quantized.
            count: samples to take, of those that there are.
        """
        on = frozenset(consumers).intersection(self.inputs)
        fed = {name: np.asarray(operand in on) for operand, name in self.inputs.items()}
        for index, (sample, expected) in enumerate(self.samples[:count]):
            if (on, index) not in self._known:
                self._known[on, index] = energies(expected, self.session({**sample, **fed}))
        pairs = [self._known[on, index] for index in range(min(count, len(self.samples)))]
        signal, noise = (math.fsum(values) for values in zip(*pairs, strict=True))
        return noise / max(signal, 1e-300) if math.isfinite(noise) else math.inf


def _switched(model: Model, quantized: Model, plan: Plan) -> tuple[ModelProto, dict[str, str] | None]:
    """The Q/DQ model with switches; None for them where an operand is in a body, or no longer there."""
    proto = ModelProto()
    proto.CopyFrom(quantized.proto)
    names, found = Names({*quantized.names(), *model.names()}), dict[str, str]()
    operands = {consumer for point in plan.points for consumer in point.consumers}
    nodes, lacking = [], dict[str, None]()
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if (operand := f"{node.name}:{index}") not in operands:
                continue
            plain = model.node(node.name).input[index]
            switch, chosen = names.fresh(f"{operand}_quantized"), names.fresh(f"{operand}_chosen")
            proto.graph.input.append(helper.make_tensor_value_info(switch, TensorProto.BOOL, []))
            nodes.append(helper.make_node("Where", [switch, name, plain], [chosen], names.fresh(f"{operand}_Where")))
            node.input[index] = chosen
            found[operand] = switch
            if plain in model.initializers and plain not in quantized.initializers:
                lacking[plain] = None
        nodes.append(node)
    assign(proto.graph.node, nodes)
    proto.graph.initializer.extend(model.initializers[name] for name in lacking)
    return proto, found if found.keys() == operands else None
