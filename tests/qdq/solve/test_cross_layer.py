"""Cross-layer equalization: balanced ranges, equal float outputs, and a gain where a weight has one scale."""

from __future__ import annotations

from dataclasses import replace

import graphs
import numpy as np
import pytest
from graphs import build, node, normal, quantized

from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.solve.equalize import cross_layer

UNEVEN = np.geomspace(1, 30, 8)[np.random.default_rng(5).permutation(8)].astype(np.float32)


def chain(*, activation: str = "Relu", grouped: bool = False, bias: bool = True) -> Model:
    """x -> Conv -> activation -> (depthwise) Conv -> Relu -> Conv -> y; channels of the first are of unlike range."""
    first, second = normal(8, 4, 3, 3, seed=1), normal(8, 1 if grouped else 8, 3, 3, seed=2)
    first *= UNEVEN.reshape(-1, 1, 1, 1)
    second /= UNEVEN.reshape(-1, 1, 1, 1) if grouped else UNEVEN.reshape(1, -1, 1, 1)
    tensors = {"w": first, "b": normal(8, seed=4) * UNEVEN, "v": second, "u": normal(6, 8, 1, 1, seed=3)}
    extra = {"Clip": "a low high", "Relu": "a", "LeakyRelu": "a"}[activation]
    if activation == "Clip":
        tensors |= {"low": np.asarray(0, np.float32), "high": np.asarray(6, np.float32)}
    if not bias:
        del tensors["b"]
    nodes = [
        node("Conv", "x w b" if bias else "x w", "a", "first", pads=[1] * 4),
        node(activation, extra, "t"),
        node("Conv", "t v", "c", "second", pads=[1] * 4, group=8 if grouped else 1),
        node("Relu", "c", "r", "relu_2"),
        node("Conv", "r u", "y", "third"),
    ]
    return build(nodes, {"x": (1, 4, 8, 8)}, tensors)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu"])
def test_both_layers_of_every_pair_end_with_alike_ranges(activation: str, grouped: bool) -> None:
    model = chain(activation=activation, grouped=grouped)
    found = cross_layer.divisors(model, placement.plan(model, Settings(equalize="cle")))
    assert found.keys() == {"t", "r"}
    w, v, u = (np.abs(model.array(name)).astype(np.float64) for name in "wvu")
    made = w.max(axis=(1, 2, 3)) / found["t"]
    between = v / found["r"].reshape(-1, 1, 1, 1)
    between = between * (found["t"].reshape(-1, 1, 1, 1) if grouped else found["t"].reshape(1, -1, 1, 1))
    read = between.max(axis=(1, 2, 3) if grouped else (0, 2, 3))
    last = (u * found["r"].reshape(1, -1, 1, 1)).max(axis=(0, 2, 3))
    for ranges in (made / read, between.max(axis=(1, 2, 3)) / last):
        assert ranges.max() <= 1.1 * ranges.min()


def test_clip_lets_no_factor_through() -> None:
    model = chain(activation="Clip")
    assert cross_layer.divisors(model, placement.plan(model)).keys() == {"r"}


def test_a_layer_that_is_not_quantized_takes_part_as_the_first_only() -> None:
    model = chain()
    plan = placement.plan(model, Settings(exclude=("second",)))
    assert cross_layer.divisors(model, plan).keys() == {"r"}
    data = graphs.samples(model, 4)
    made = quantized(model, data, equalize="cle", exclude=("second",))
    float_weight = made.model.array(made.model.node("second").input[1])
    assert not np.allclose(float_weight, model.array("v"))
    pairs = zip(graphs.run(made.model, data), graphs.run(model, data), strict=True)
    assert all(np.abs(a["y"] - b["y"]).max() <= 0.05 * np.abs(b["y"]).max() for a, b in pairs)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_weight_scale_gains_and_no_node_is_added(grouped: bool, bias: bool) -> None:
    model = chain(grouped=grouped, bias=bias)
    data = graphs.samples(model, 6)
    noise = {}
    for equalize in ("cle", "none"):
        settings = Settings(equalize=equalize, rounding="nearest")
        plan = placement.plan(model, settings)
        common = tuple(replace(p, spec=replace(p.spec, axis=None)) if p.role == "weight" else p for p in plan.points)
        plan = replace(plan, points=common)
        table = graphs.collect.collect(model, plan, data)
        solution = graphs.solve.solve(model, plan, table, samples=data)
        made = graphs.insert.insert(model, plan, solution)
        assert solution.carriers.keys() == ({"t", "r"} if equalize == "cle" else set())
        assert not any(n.op_type == "Mul" for n in made.graph.node)
        pairs = zip(graphs.run(made, data), graphs.run(model, data), strict=True)
        noise[equalize] = sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs)
    assert noise["cle"] < 0.5 * noise["none"]


def test_per_channel_scales_keep_their_accuracy_and_the_rewritten_graph_is_the_intended_one() -> None:
    model = chain(grouped=True)
    data = graphs.samples(model, 6)
    made = quantized(model, data, equalize="cle")
    assert any("equalized across layers" in note for note in made.solution.notes)
    # the oracle divides by a Mul: a value on the edge of two codes may fall to the other side
    moved = [graphs.off_ties(made, sample) for sample in data]
    for got, expected in zip(graphs.run(made.model, moved), graphs.run(model, moved), strict=True):
        signal = np.sum(expected["y"] ** 2)
        assert 10 * np.log10(signal / np.sum((got["y"] - expected["y"]) ** 2)) > 30


def test_the_order_of_the_samples_changes_nothing() -> None:
    model = chain()
    data = graphs.samples(model, 6)
    first, other = (quantized(model, d, equalize="cle") for d in (data, data[::-1]))
    assert first.model.proto == other.model.proto
