"""Scales and codes chosen from a table: shared where tied, never NaN, and better at the output with GPTQ."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal, quantized

from engines.core.documents import replace
from qdq.assemble.quantize import quantize
from qdq.core.errors import InputError, StaleFileError
from qdq.core.qtensor import from_codes
from qdq.core.resources import within
from qdq.measure import collect
from qdq.measure.calibrators import CALIBRATORS
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.solve import solve
from qdq.solve.rounding import ROUNDINGS


def solved(model: Model, data: list[graphs.Sample], *, second_pass: bool = True, **settings: object) -> solve.Solution:
    plan = placement.plan(model, Settings(**settings))  # type: ignore[arg-type]
    table = collect.collect(model, plan, data)
    return solve.solve(model, plan, table, samples=data if second_pass else None)


def correlated(model: Model, count: int = 8) -> list[graphs.Sample]:
    """Samples whose channels (axis 1 of a Conv, else the last) carry three signals between them."""
    rng = np.random.default_rng(2)
    axis = 1 if model.graph.node[0].op_type == "Conv" else -1
    shape = [int(d) for d in model.inputs[0].shape or ()]
    channels = shape.pop(axis)
    mix = rng.normal(size=(3, channels))
    made = [np.moveaxis(rng.normal(size=(*shape, 3)) @ mix, -1, axis) for _ in range(count)]
    return [{"x": np.ascontiguousarray(x, dtype=np.float32)} for x in made]


@pytest.mark.parametrize("make", [graphs.conv, graphs.product, lambda: graphs.conv((8, 4, 3, 3), group=2)])
def test_every_weight_comes_back_within_half_a_step_when_rounded_to_nearest(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    (q,) = solved(model, graphs.samples(model), rounding="nearest").weights.values()
    assert q.params.axis is not None
    scale = q.params.scale.reshape([-1 if i == q.params.axis else 1 for i in range(q.codes.ndim)])
    error = np.abs(from_codes(q.codes, q.params) - model.array("w"))
    assert (error <= 0.5 * scale * (1 + 1e-5)).all()  # and the rounding of amax / 127 * 127
    assert np.abs(q.codes.astype(int)).max() == 127


@pytest.mark.parametrize(
    "make",
    [
        lambda: graphs.conv((16, 8, 3, 3), (8, 8), bias=False),
        lambda: graphs.conv((16, 4, 3), (20,), group=2, bias=False),
        lambda: graphs.product(weight=(32, 16), data=(40, 32)),
        lambda: graphs.product("Gemm", (16, 32), (40, 32), transB=1),
    ],
    ids=["conv", "grouped", "matmul", "gemm transB"],
)
def test_gptq_has_worse_weight_error_and_better_output_error_than_nearest(make: object) -> None:
    model: Model = make()  # type: ignore[operator]
    data = correlated(model)
    weight, output = {}, {}
    for rounding in ("gptq", "nearest"):
        made = quantized(model, data, rounding=rounding, equalize="none")
        (q,) = made.solution.weights.values()
        weight[rounding] = np.sum((from_codes(q.codes, q.params) - model.array("w")) ** 2)
        # both read quantized data; float weights under one of them leave the weights' own error
        rounded, reference = graphs.intended(made), graphs.intended(made)
        for tensor in reference.graph.initializer:
            if tensor.name.startswith("w@"):
                tensor.CopyFrom(graphs.numpy_helper.from_array(model.array("w"), tensor.name))
        pairs = zip(graphs.run(rounded, data), graphs.run(reference, data), strict=True)
        output[rounding] = sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs)
    assert weight["gptq"] > weight["nearest"]
    assert output["gptq"] < 0.5 * output["nearest"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_every_calibrator_with_every_rounding_solves_every_edge_case(calibrator: str, rounding: str) -> None:
    """A dead output channel, a dead input, an all-zero weight, a tensor always zero, one value, one sample."""
    weights = {"w": normal(6, 4, 3, 3), "v": normal(4, 6, 1, 1), "z": np.zeros((4, 6, 1, 1), np.float32)}
    weights["w"][2] = 0
    weights["w"][:, 1] = 0
    nodes = [
        node("Conv", "x w", "a", name="first"),
        node("Relu", "a", "b"),
        node("Conv", "b v", "y", name="second"),
        node("Conv", "b z", "u", name="third"),
    ]
    model = build(nodes, {"x": (1, 4, 5, 5)}, weights, outputs=("y", "u"))
    for value in (0, 3.5, -2):
        sample = {"x": np.full((1, 4, 5, 5), value, np.float32)}
        made = quantized(model, [sample], calibrator=calibrator, rounding=rounding)
        for params in (*made.solution.activations.values(), *(q.params for q in made.solution.weights.values())):
            assert np.isfinite(params.scale).all()
            assert (params.scale > 0).all()
        assert not made.solution.weights["z", 0].codes.any()
        assert not made.solution.weights["w", 0].codes[2].any()
        (float_out,), (int_out,) = graphs.run(model, [sample]), graphs.run(made.model, [sample])
        assert not int_out["u"].any()
        # one step of 1/127 on each of two layers' data and weights, of sums that cancel by up to ten times
        assert np.abs(int_out["y"] - float_out["y"]).max() <= 0.4 * max(np.abs(float_out["y"]).max(), 1e-9)


def test_the_same_arguments_in_any_order_give_the_same_solution() -> None:
    model = graphs.residual()
    data = graphs.samples(model, 6)
    first, other = solved(model, data), solved(model, data[::-1])
    assert {k: (v.scale.tobytes(), v.zero_point) for k, v in first.activations.items()} == {
        k: (v.scale.tobytes(), v.zero_point) for k, v in other.activations.items()
    }
    assert all(np.array_equal(first.weights[k].codes, other.weights[k].codes) for k in first.weights)


def test_without_samples_gptq_is_nearest_and_says_so() -> None:
    model = graphs.conv()
    data = graphs.samples(model)
    without, plain = solved(model, data, second_pass=False), solved(model, data, rounding="nearest")
    assert np.array_equal(without.weights["w", 0].codes, plain.weights["w", 0].codes)
    assert any("only a table was given" in n for n in without.notes)


@pytest.mark.parametrize(("limit", "count"), [(6, 1), (2, 2)])
def test_weights_beyond_the_limit_of_gptq_are_noted(limit: int, count: int) -> None:
    model = graphs.branches()
    found = solved(model, graphs.samples(model), moment_inputs=limit)
    assert any(n.startswith(f"{count} of 2 weights are rounded without their inputs") for n in found.notes)


def test_tied_tensors_share_scale_and_zero_point_while_their_ranges_are_alike() -> None:
    model = graphs.branches()
    data = graphs.samples(model)
    params = solved(model, data).activations
    assert len({(float(p.scale), p.zero_point) for p in params.values()}) == 1
    apart = [{"x": s["x"], "z": s["z"] * 10} for s in data]
    found = solved(model, apart)
    assert found.activations["right"].scale > 5 * found.activations["left"].scale
    assert any("keep scales of their own" in n for n in found.notes)


def test_a_weight_read_along_both_axes_is_solved_along_each() -> None:
    for inner in (4, 6):  # square and not
        nodes = [node("MatMul", "x w", "a"), node("Gemm", "a w", "y", transB=1)]
        model = build(nodes, {"x": (9, 6)}, {"w": normal(6, inner)})
        weights = solved(model, graphs.samples(model)).weights
        assert {key: q.params.scale.shape for key, q in weights.items()} == {("w", 1): (inner,), ("w", 0): (6,)}


@pytest.mark.parametrize("shift", [True, False])
def test_zero_points_appear_only_where_a_shift_is_allowed(shift: bool) -> None:
    model = graphs.product()
    params = solved(model, graphs.samples(model, low=0), shift=shift).activations["x"]
    assert (params.zero_point == -128) == shift


@pytest.mark.parametrize("equalize", ["none", "smoothquant"])
def test_automatic_padding_of_a_dynamic_size_is_never_shifted(equalize: str) -> None:
    """The border of zeros is made inside the Conv, behind the shift: it cannot be moved."""
    powers = np.float32([1, 1e-2, 1e-2, 1e-2]).reshape(1, 4, 1, 1)  # small channels that count: equalization pays
    model = graphs.conv(spatial=("h", "w"), values=normal(8, 4, 3, 3) / powers, auto_pad="SAME_UPPER", strides=[2, 2])
    data = [{"x": s["x"] * powers} for s in graphs.samples(model, low=0)]
    found = solved(model, data, equalize=equalize)
    assert found.activations["x"].zero_point == 0
    assert ("x" in found.divisors) == (equalize != "none")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float) -> None:
    weight = normal(8, 4, 3, 3)
    weight[0, 0, 0, 0] = value
    model = graphs.conv(values=weight)
    with pytest.raises(InputError, match="Weight 'w' of the float model holds NaN or infinity"):
        solved(model, graphs.samples(model))


def test_a_table_of_another_model_is_stale() -> None:
    model = graphs.conv()
    plan = placement.plan(model)
    table = collect.collect(model, plan, graphs.samples(model))
    with pytest.raises(StaleFileError, match="table was made from another model"):
        solve.solve(model, plan, replace(table, model_sha256="0"))


def test_progress_ends_at_all_weights() -> None:
    model = graphs.branches()
    data = graphs.samples(model)
    plan = placement.plan(model)
    seen: list[tuple[int, int | None, str]] = []
    table = collect.collect(model, plan, data)
    solve.solve(model, plan, table, samples=data, on_progress=lambda *a: seen.append(a))
    assert seen[-1] == (2, 2, "rounding weights")
    assert (4, 4, "second moments") in seen


def test_a_budget_that_rounding_exceeds_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.product(weight=(256, 64), data=(4, 256))
    data, said = graphs.samples(model), r"gives 2 MB, but rounding 'w', 256 inputs .* by gptq needs"
    with within(2_000_000):
        for settings in ({"rounding": "nearest"}, {"moment_inputs": 128}):
            assert quantize(model, data, settings=Settings(**settings)).solution.weights  # type: ignore[arg-type]
    monkeypatch.setattr("qdq.assemble.tables.collect", None)
    with within(2_000_000), pytest.raises(InputError, match=said):
        quantize(model, data, settings=Settings())
