"""Data in two pieces: the products' sum is the product of both, and only tensors that gain by it are split."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal, quantized
from onnx import numpy_helper

from qdq.core.qtensor import from_codes, to_codes
from qdq.measure.collect import collect
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve.equalize.pieces import Pieces
from qdq.solve.token_scales import can_have_tokens

PLAIN = {"rounding": "nearest", "equalize": "none", "shift": False, "calibrator": "max"}


def tailed(model: Model, seed: int) -> list[graphs.Sample]:
    """Normal values of which one in a hundred is fifty times as large, in any row and channel."""
    rng = np.random.default_rng(seed)
    return [
        {name: np.where(rng.random(x.shape) < 0.01, 50 * x, x).astype(x.dtype) for name, x in sample.items()}
        for sample in graphs.samples(model, 6, seed=seed)
    ]


def sqnr_db(made: graphs.Made, data: list[graphs.Sample]) -> float:
    pairs = zip(graphs.run(made.float_model, data), graphs.run(made.model, data), strict=True)
    wanted, found = (np.concatenate([each["y"].ravel() for each in side]) for side in zip(*pairs, strict=True))
    return float(10 * np.log10(np.square(wanted).sum() / np.square(found - wanted).sum()))


def model_of(form: str) -> Model:
    """x (3, 7, 64) or (21, 64) -> products of 40 outputs -> y."""
    w, b = {"w": normal(64, 40) / 8}, {"b": normal(40)}
    if form == "matmul":
        return build([node("MatMul", "x w", "t"), node("Add", "t b", "y")], {"x": (3, 7, 64)}, {**w, **b})
    if form == "gemm":
        return build([node("Gemm", "x w b", "y", transB=1)], {"x": (21, 64)}, {"w": normal(40, 64) / 8, **b})
    two = [node("MatMul", "x w", "s", "/one"), node("MatMul", "x v", "t", "/two"), node("Add", "s t", "y")]
    return build(two, {"x": (3, 7, 64)}, {**w, "v": normal(64, 40, seed=1) / 8})


@pytest.mark.parametrize("form", ["matmul", "gemm", "two"])
def test_two_pieces_are_two_products_of_one_weight(form: str) -> None:
    model = model_of(form)
    data, unseen = tailed(model, 1), tailed(model, 2)
    one, made = (quantized(model, data, piecewise=way, **PLAIN) for way in ("off", "on"))
    assert sqnr_db(made, unseen) > sqnr_db(one, unseen) + 8
    solution = made.solution
    assert set(solution.beyond) == {"x"} and "x" in solution.activations
    pieces = Pieces(inside=solution.activations["x"], beyond=solution.beyond["x"], gain_db=0)
    (got,) = graphs.run(made.model, unseen[:1])
    x, expected = pieces.values(unseen[0]["x"].astype(np.float64)), 0.0
    for name, weighted in solution.nodes.items():
        values = solution.weights[weighted.key].values()
        expected = expected + x @ (values if weighted.input_axis == 0 else values.T)
        assert sum(n.name.startswith(name) and n.op_type == weighted.op_type for n in made.model.graph.node) == 2
    expected = expected + (model.array("b") if form != "two" else 0)
    assert np.abs(got["y"] - expected).max() < 1e-4 * np.abs(expected).max()
    kinds = [n.op_type for n in made.model.graph.node]
    assert kinds.count("QuantizeLinear") == 2 and kinds.count("Clip") == 1
    codes = [t for t in made.model.graph.initializer if numpy_helper.to_array(t).size == 64 * 40]
    assert len(codes) == len(solution.nodes)


def test_blocks_that_do_not_divide_the_inputs_are_filled_up_once() -> None:
    model = build([node("MatMul", "x w", "y")], {"x": (5, 40)}, {"w": normal(40, 32) / 6})
    data = tailed(model, 1)
    one, made = (quantized(model, data, scheme="w4a8", block=32, piecewise=way, **PLAIN) for way in ("off", "on"))
    assert set(made.solution.beyond) == {"x"}
    assert sqnr_db(made, tailed(model, 2)) > sqnr_db(one, tailed(model, 2)) + 1


def test_only_what_is_felt_beside_the_weights_is_split_where_that_is_left_open() -> None:
    """Even data, data that equalization has made even, and heavy tails, each with 4-bit weights."""
    model, settings = model_of("matmul"), {**PLAIN, "scheme": "w4a8", "block": 16, "piecewise": "auto"}
    even = [{"x": np.random.default_rng(i).uniform(-1, 1, (3, 7, 64)).astype(np.float32)} for i in range(6)]
    assert not quantized(model, even, **settings).solution.beyond
    channels = np.geomspace(1, 100, 64).astype(np.float32)
    unlike = build([node("MatMul", "x w", "y")], {"x": (3, 7, 64)}, {"w": normal(64, 40) / channels[:, None]})
    divided = quantized(unlike, [{"x": s["x"] * channels} for s in even], **{**settings, "equalize": "smoothquant"})
    assert set(divided.solution.divisors) == {"x"} and not divided.solution.beyond
    split = quantized(model, tailed(model, 1), **settings).solution
    assert set(split.beyond) == {"x"}
    assert any(note.startswith("1 of 1 tensors are multiplied in two pieces") for note in split.notes)


def test_channels_are_divided_before_they_are_cut() -> None:
    channels = np.geomspace(1, 100, 64).astype(np.float32)
    model = build([node("MatMul", "x w", "y")], {"x": (3, 7, 64)}, {"w": normal(64, 40) / channels[:, None]})
    data = [{"x": sample["x"] * channels} for sample in tailed(model, 1)]
    unseen = [{"x": sample["x"] * channels} for sample in tailed(model, 2)]
    settings = {**PLAIN, "equalize": "smoothquant"}
    one, made = (quantized(model, data, piecewise=way, **settings) for way in ("off", "on"))
    solution = made.solution
    pieces = Pieces(inside=solution.activations["x"], beyond=solution.beyond["x"], gain_db=0)
    (weight,), (got,) = solution.weights.values(), graphs.run(made.model, unseen[:1])
    expected = pieces.values(unseen[0]["x"] / solution.divisors["x"].astype(np.float64)) @ weight.values()
    assert np.abs(got["y"] - expected).max() < 1e-4 * np.abs(expected).max()
    assert sqnr_db(made, unseen) > sqnr_db(one, unseen) + 2  # codes of so unlike rows of the weight lose the rest


def test_what_is_beyond_what_was_seen_loses_little() -> None:
    model = model_of("matmul")
    made = quantized(model, tailed(model, 1), piecewise="on", **PLAIN)
    pieces = Pieces(inside=made.solution.activations["x"], beyond=made.solution.beyond["x"], gain_db=0)
    most = max(float(np.abs(sample["x"]).max()) for sample in tailed(model, 1))
    assert abs(float(pieces.values(np.asarray([1.2 * most]))[0]) - 1.2 * most) < 0.01 * most


def test_convolutions_and_weight_only_products_are_not_split() -> None:
    model = graphs.conv()
    assert not quantized(model, graphs.samples(model), piecewise="on", **PLAIN).solution.beyond
    plan = placement.plan(model, Settings())
    assert not any(can_have_tokens(point, weighted_nodes(model, plan)) for point in plan.activations)
    said = Settings(scheme="int8-weight", piecewise="on").idle
    assert "piecewise on has no effect with scheme int8-weight" in said and not Settings(piecewise="on").idle


def test_without_samples_nothing_is_split_and_a_note_says_so() -> None:
    model = model_of("matmul")
    plan = placement.plan(model, Settings(piecewise="on", **PLAIN))
    solution = graphs.solve.solve(model, plan, collect(model, plan, tailed(model, 1)))
    assert not solution.beyond and "piecewise needs the samples, and only a table was given" in solution.notes


def test_values_are_those_of_both_codes() -> None:
    made = quantized(model_of("matmul"), tailed(model_of("matmul"), 1), piecewise="on", **PLAIN).solution
    x = np.asarray([-200.0, -3.0, 0.0, 0.01, 40.0])
    inside, beyond = made.activations["x"], made.beyond["x"]
    end = float(inside.scale) * 127
    middle = np.clip(x, -end, end)
    both = from_codes(to_codes(middle, inside), inside) + from_codes(to_codes(x - middle, beyond), beyond)
    assert np.allclose(Pieces(inside=inside, beyond=beyond, gain_db=0).values(x), both)
