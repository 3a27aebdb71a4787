"""Nodes whose codes destroy the outputs stay in float, and it is said; others keep their codes."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal

from qdq.assemble.quantize import quantize
from qdq.model.model import Model
from qdq.plan.settings import Settings


def masked(rows: int = 2) -> Model:
    """x -> MatMul -> Softmax with a mask -> MatMul with a weight whose hidden rows are large."""
    values, mask = normal(6, 8, seed=1) * 0.3, np.zeros(6, np.float32)
    values[6 - rows :], mask[6 - rows :] = 1000, -np.inf
    nodes = [
        node("MatMul", "x k", "s", name="scores"),
        node("Add", "s mask", "a"),
        node("Softmax", "a", "p"),
        node("MatMul", "p v", "y", name="values"),
    ]
    return build(nodes, {"x": (4, 8)}, {"k": normal(8, 6), "v": values, "mask": mask})


def sqnr_db(model: Model, candidate: Model) -> float:
    data = graphs.samples(model, 6, seed=11)
    pairs = [(a["y"], b["y"]) for a, b in zip(graphs.run(model, data), graphs.run(candidate, data), strict=True)]
    error = sum(((a - b) ** 2).sum() for a, b in pairs)
    return float(10 * np.log10(sum((a**2).sum() for a, _ in pairs) / max(error, 1e-30)))


@pytest.mark.parametrize("count", [1, 4])
def test_hidden_rows_of_a_weight_do_not_destroy_what_is_seen(count: int) -> None:
    """With quantized data, balanced channels may save the weight too."""
    model = masked()
    assert sqnr_db(model, quantize(model, graphs.samples(model, count)).model) > 20


@pytest.mark.parametrize("count", [1, 4])
def test_a_weight_whose_hidden_rows_decide_its_scale_stays_float(count: int) -> None:
    model = masked()
    made = quantize(model, graphs.samples(model, count), settings=Settings(scheme="int8-weight"))
    assert sqnr_db(model, made.model) > 30
    assert made.plan.quantized_nodes == ("scores",)
    (skip,) = [s for s in made.plan.skips if s.node == "values"]
    assert skip.rule == "destroyed"
    (said,) = [n for n in made.solution.notes if "destroy" in n]
    assert "values" in said and "dB" in said
    again = quantize(model, graphs.samples(model, count), plan=made.plan)
    assert again.model.proto == made.model.proto


def test_nothing_is_left_out_of_a_model_that_is_well() -> None:
    model = masked(0)
    made = quantize(model, graphs.samples(model, 4))
    assert set(made.plan.quantized_nodes) == {"scores", "values"}
    assert not any("destroy" in n for n in made.solution.notes)


def test_a_model_that_cannot_be_saved_is_warned_of() -> None:
    """A difference of products that are nearly equal: no node's own output is bad, what is left of them is."""
    weight = normal(16, 8)
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "x v", "b"), node("Sub", "a b", "y")]
    model = build(nodes, {"x": (4, 16)}, {"w": weight, "v": weight + 1e-5 * normal(16, 8, seed=2)})
    made = quantize(model, graphs.samples(model, 4), settings=Settings(scheme="int8-weight"))
    assert "of no use" in made.solution.notes[-1]


def test_two_nodes_of_which_each_alone_destroys_the_outputs_stay_float() -> None:
    """Scales of 4-bit weights end at the smallest normal float16: all codes of both weights are 0."""
    nodes = [node("MatMul", "x w", "a", "first"), node("Mul", "a k", "b"), node("MatMul", "b v", "y", "second")]
    tensors = {"w": normal(16, 16) * 1e-8, "v": normal(16, 8) * 1e-7, "k": np.full(1, 1e10)}
    model = build(nodes, {"x": (4, 16)}, tensors)
    made = quantize(model, graphs.samples(model, 4), settings=Settings(scheme="w4a8"))
    assert made.plan.quantized_nodes == () and sqnr_db(model, made.model) > 100
    (said,) = [n for n in made.solution.notes if "destroy" in n]
    assert "first, second" in said
