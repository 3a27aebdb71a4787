"""From a float model to its Q/DQ model: what is calibrated once for several plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import build, node, normal, samples

from qdq.assemble import tables as tables_module
from qdq.measure import collect as collect_module
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.measured.accuracy import Accuracy
from qdq.tune.variant_builder import Variant, VariantBuilder


@pytest.fixture
def model() -> Model:
    """x -> ConvTranspose -> Relu -> Conv -> Relu -> Conv -> y."""
    nodes = [
        node("ConvTranspose", "x u", "a", "up", strides=[2, 2]),
        node("Relu", "a", "b"),
        node("Conv", "b v", "c", "first", pads=[1] * 4),
        node("Relu", "c", "d", "relu_2"),
        node("Conv", "d w", "y", "second", pads=[1] * 4),
    ]
    tensors = {"u": normal(8, 8, 2, 2), "v": normal(8, 8, 3, 3), "w": normal(4, 8, 3, 3)}
    return build(nodes, {"x": (1, 8, 5, 5)}, tensors)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The tensors of each calibration."""
    found: list[list[str]] = []
    collect = collect_module.collect

    def counted(model: Model, plan: Plan, *args: Any, **options: Any) -> Any:
        found.append([p.tensor for p in plan.activations])
        return collect(model, plan, *args, **options)

    monkeypatch.setattr(tables_module, "collect", counted)
    return found


def test_a_plan_is_measured_by_the_table_of_one_that_has_its_tensors(model: Model, measured: list[list[str]]) -> None:
    data = samples(model, 4)
    full, fewer = (placement.plan(model, Settings(exclude=names)) for names in ((), ("second",)))
    assert {p.tensor for p in fewer.activations} < {p.tensor for p in full.activations}
    measure = Accuracy(model, data, Settings(calibrator="mse"))
    after = [measure(full), measure(fewer), measure(full)]
    assert measured == [["b", "d"]] and after[0] == after[2] != after[1]
    measure = Accuracy(model, data, Settings(calibrator="mse"))
    assert [measure(fewer), measure(full)] == [after[1], after[0]]
    assert measured[1:] == [["b"], ["b", "d"]]  # what was measured before is not enough


def test_tables_of_other_float_rewrites_are_apart(model: Model, measured: list[list[str]]) -> None:
    data = samples(model, 4)
    work = VariantBuilder(model=model, settings=Settings(), unquantized_types=("fp32",), samples=data[:2])
    tables = tables_module.Tables(model=model, samples=data)
    both = frozenset({"first", "second"})
    plain = tables.of(work.plan_of(Variant(quantized=both), ""))
    hoisted = tables.of(work.plan_of(Variant(quantized=both).with_rewrite("hoist", both), ""))
    assert len(measured) == 1 and hoisted.tensors.keys() == plain.tensors.keys()  # hoisting is done to the Q/DQ model
    variant = Variant().with_rewrite("conv_transpose", ["up"])
    plan = work.plan_of(Variant(rewrites=variant.rewrites, quantized=both), "")
    assert {p.tensor for p in plan.activations} <= plain.tensors.keys() and plan.rewrites
    rewritten = tables.of(plan)
    again = tables.of(plan)
    assert len(measured) == 2 and all(again.tensors[name] is h for name, h in rewritten.tensors.items())
    fewer = tables.of(work.plan_of(Variant(quantized=frozenset({"first"})), ""))
    assert len(measured) == 2 and fewer.tensors.keys() < plain.tensors.keys()
    for name, histogram in rewritten.tensors.items():
        np.testing.assert_allclose(histogram.amax, plain.tensors[name].amax, rtol=1e-5)
