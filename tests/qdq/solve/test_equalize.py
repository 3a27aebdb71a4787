"""Channel equalization: exact in float, used where it pays, and the formulas' contract."""

from __future__ import annotations

import importlib
import pkgutil
import tracemalloc

import graphs
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qdq.solve.equalize.formulas
from qdq.assemble.insert import insert
from qdq.measure.collect import collect
from qdq.model.storage import load, save
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.settings import Settings, choices
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve.activations import activation_params
from qdq.solve.equalize import channels, choose
from qdq.solve.equalize.formulas import smoothquant
from qdq.solve.solve import solve

FORMULAS = [m.name for m in pkgutil.iter_modules(qdq.solve.equalize.formulas.__path__)]


def build(tmp_path, spread: float, *, conv: bool = True):
    """An operator whose 16 input channels span a factor `spread`; weights make up for it, so each channel matters."""
    rng = np.random.default_rng(3)
    ranges = np.geomspace(1, 1 / spread, 16)
    shape = (8, 16, 3, 3) if conv else (16, 8)
    weight = rng.normal(size=shape) / ranges.reshape((1, 16, 1, 1) if conv else (16, 1))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="op", pads=[1] * 4)
        if conv
        else helper.make_node("MatMul", ["x", "w"], ["y"], name="op")
    ]
    dims = ["N", 16, 12, 12] if conv else ["N", 16]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    size = (2, 16, 12, 12) if conv else (64, 16)
    scale = ranges.reshape((1, 16, 1, 1) if conv else (1, 16))
    samples = [{"x": (rng.normal(size=size) * scale).astype(np.float32)} for _ in range(4)]
    return prepare(load(path)), samples


def test_the_order_of_the_samples_does_not_change_a_bit(tmp_path):
    model, samples = build(tmp_path, 300.0)
    plan = placement.plan(model)
    params = activation_params(model, plan, collect(model, plan, samples), {})
    nodes = weighted_nodes(model, plan)
    read = channels.candidates(plan, nodes)
    forth, back = (
        choose.equalized(
            model, plan, nodes, params, channels.look(model, read, order, None), formula=smoothquant.FORMULA
        )
        for order in (samples, samples[::-1])
    )
    assert forth["x"].gain_db == back["x"].gain_db and forth["x"].params == back["x"].params
    assert np.array_equal(forth["x"].scale, back["x"].scale)


def wide(width: int = 64, layers: int = 12, rows: int = 512):
    """Layers whose inputs are all looked at, and samples of many rows."""
    nodes = [graphs.node("MatMul", f"h{k} w{k}", f"h{k + 1}") for k in range(layers)]
    weights = {f"w{k}": graphs.normal(width, width, seed=k) / width**0.5 for k in range(layers)}
    model = graphs.build(nodes, {"h0": (rows, width)}, weights, outputs=(f"h{layers}",))
    return model, [{"h0": graphs.normal(rows, width, seed=k)} for k in range(4)]


def test_what_is_seen_of_many_tensors_is_not_kept_in_memory():
    model, samples = wide()
    plan = placement.plan(model)
    nodes = weighted_nodes(model, plan)
    read = channels.candidates(plan, nodes)
    params = activation_params(model, plan, collect(model, plan, samples), {})
    one = 4 * 512 * 64 * 4  # bytes of the vectors of a tensor, in float32
    assert len(read) == 12
    tracemalloc.start()
    try:
        seen = channels.look(model, read, samples, None)
        left = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        choose.equalized(model, plan, nodes, params, seen, formula=smoothquant.FORMULA)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(s.count for s in seen.values()) == 12 * 4 * 512
    assert left < one < 12 * one
    assert peak - left < 8 * 2 * one  # some copies in float64 of what one tensor shows, or less


@pytest.mark.parametrize("chunk", [64, 5 * 64, 1 << 18])
def test_rows_come_whole_whatever_their_pieces(chunk, monkeypatch):
    model, samples = wide(layers=1, rows=7)
    plan = placement.plan(model)
    seen = channels.look(model, channels.candidates(plan, weighted_nodes(model, plan)), samples, None)["h0"]
    monkeypatch.setattr(channels, "CHUNK", chunk)
    pieces = list(seen.rows())
    found = np.concatenate(pieces)
    wanted = np.concatenate([sample["h0"] for sample in samples])
    assert all(piece.size <= chunk for piece in pieces) and seen.count == 28
    assert sorted(map(bytes, found.astype(np.float32))) == sorted(map(bytes, wanted))
    assert np.array_equal(seen.limits.low, wanted.min(axis=0)) and np.array_equal(seen.limits.high, wanted.max(axis=0))


def run(model, samples, tmp_path):
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    save(model, tmp_path / "run.onnx")
    session = ort.InferenceSession(str(tmp_path / "run.onnx"), options, providers=["CPUExecutionProvider"])
    return [session.run(None, s)[0] for s in samples]


def error(model, samples, tmp_path, equalize: str):
    """Mean squared output error of the quantized model and how many tensors were equalized."""
    plan = placement.plan(model, Settings(equalize=equalize, rounding="nearest"))
    solution = solve(model, plan, collect(model, plan, samples), samples=samples)
    wanted, got = run(model, samples, tmp_path), run(insert(model, plan, solution), samples, tmp_path)
    return float(np.mean([np.mean((a - b) ** 2) for a, b in zip(wanted, got, strict=True)])), len(solution.divisors)


@pytest.mark.parametrize("conv", [True, False])
def test_unequal_channels_are_equalized_and_the_output_error_falls(tmp_path, conv):
    model, samples = build(tmp_path, 300.0, conv=conv)
    plain, none = error(model, samples, tmp_path, "none")
    balanced, some = error(model, samples, tmp_path, "smoothquant")
    assert (none, some) == (0, 1)
    assert balanced < plain / 2  # the gate asks for a predicted 3 dB


def test_alike_channels_are_left_alone(tmp_path):
    model, samples = build(tmp_path, 1.0)
    assert error(model, samples, tmp_path, "smoothquant")[1] == 0


def test_dividing_channels_and_scaling_weights_is_exact(tmp_path):
    model, samples = build(tmp_path, 300.0)
    plan = placement.plan(model, Settings())
    params = solve(model, plan, collect(model, plan, samples)).activations
    nodes = weighted_nodes(model, plan)
    read = channels.candidates(plan, nodes)
    (found,) = choose.equalized(
        model, plan, nodes, params, channels.look(model, read, samples, None), formula=smoothquant.FORMULA
    ).values()
    weight = model.array("w") * found.scale.reshape(1, 16, 1, 1)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.initializer[:]
    proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    divided = [{"x": s["x"] / found.scale.reshape(1, 16, 1, 1)} for s in samples]
    for a, b in zip(run(model, samples, tmp_path), run(model.replace(proto), divided, tmp_path), strict=True):
        # 144 products, each with three float32 roundings of 6e-8 relative
        np.testing.assert_allclose(a, b, atol=144 * 3 * 6e-8 * np.abs(a).max())


def test_shared_weights_grouped_and_transposed_operands_are_no_candidates(tmp_path):
    model, _ = build(tmp_path, 300.0)
    plan = placement.plan(model, Settings())
    found = channels.candidates(plan, weighted_nodes(model, plan))
    assert {tensor: [node.weight for node in readers] for tensor, readers in found.items()} == {"x": ["w"]}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    relu = helper.make_node("Relu", ["x"], ["r"], name="relu")
    again = helper.make_node("Conv", ["r", "w"], ["z"], name="again", pads=[1] * 4)
    proto.graph.node.extend([relu, again])
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    shared = model.replace(proto)
    plan = placement.plan(shared, Settings())
    assert channels.candidates(plan, weighted_nodes(shared, plan)) == {}


def test_every_formula_is_an_option():
    assert set(choices("equalize")) == {*FORMULAS, "auto", "none"}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_give_positive_divisors_of_at_most_one_also_for_dead_channels(name):
    scales = importlib.import_module(f"qdq.solve.equalize.formulas.{name}").scales
    amax = np.array([0.0, 1e-30, 1.0, 50.0])
    for wmax in (np.array([1.0, 0.0, 2.0, 3.0]), np.zeros(4)):
        found = scales(amax, wmax)
        assert found.shape == (4,) and np.all(found > 0) and found.max() == 1.0
