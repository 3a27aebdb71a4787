"""Bias correction brings the means back, and is taken only where held-out samples gain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models import assemble, constant, images, segmenter
from onnx import helper, numpy_helper

from engines.core.documents import replace
from qdq.assemble import bias
from qdq.assemble.bias import correct, corrected
from qdq.assemble.held_out import HeldOutScore, split
from qdq.assemble.quantize import Quantized, quantize
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan.settings import Settings

PLAIN = Settings(rounding="nearest", equalize="none", calibrator="max", bias_correction="off")


def made(proto: onnx.ModelProto, samples: list[dict[str, np.ndarray]], **changed: str) -> Quantized:
    settings = replace(PLAIN, **changed)
    return quantize(prepare(Model(proto=proto, directory=Path(), sha256="m")), samples, settings=settings)


def perceptron(*, bias: bool) -> onnx.ModelProto:
    """x (n, 16) -> MatMul -> Add -> Relu -> Gemm -> y (n, 4)."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("Add", ["a", "b0"], ["b"], name="add"),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
        helper.make_node("Gemm", ["c", "w1", *(["b1"] if bias else [])], ["y"], name="second"),
    ]
    shapes = {"w0": (16, 8), "b0": (8,), "w1": (8, 4), **({"b1": (4,)} if bias else {})}
    constants = [constant(n, rng.normal(0, 0.5, s).astype(np.float32)) for n, s in shapes.items()]
    return assemble(nodes, {"x": ("n", 16)}, {"y": ("n", 4)}, constants)


@pytest.mark.parametrize("with_bias", [True, False])
def test_means_of_every_layer_are_those_of_the_float_model(with_bias: bool) -> None:
    rng = np.random.default_rng(1)
    samples = [{"x": rng.normal(1, 3, (64, 16)).astype(np.float32)} for _ in range(4)]
    found = made(perceptron(bias=with_bias), samples)
    held = split(samples)
    changed = correct(found.prepared, found.model, found.solution.nodes.values(), held)
    error = {}
    for name, model in (("before", found.model), ("after", changed)):
        session, reference = Session(model, ["y"]), Session(found.prepared, ["y"])
        pairs = [(session(s)["y"], reference(s)["y"]) for s in held.fitting()]
        error[name] = np.abs(np.mean([a - b for a, b in pairs], axis=(0, 1))).max()
    # The last layer is corrected with all before it in place, so what is left of the mean is float32 rounding.
    assert error["after"] < 1e-5 < error["before"]
    assert {n.op_type for n in changed.graph.node} == {n.op_type for n in found.model.graph.node}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (8,), (1, 8), (1, 1, 8), (1, 1, 1)])
@pytest.mark.parametrize("scheme", ["int8", "int8-weight"])
def test_constant_behind_a_product_keeps_its_axes(shape: tuple[int, ...], scheme: str) -> None:
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Add", ["b", "a"], ["y"], name="add"),
    ]
    constants = [
        constant("w", rng.normal(0, 0.5, (16, 8)).astype(np.float32)),
        numpy_helper.from_array(np.ones(shape, "f4"), "b"),
    ]
    rank = max(len(shape), 2)
    proto = assemble(nodes, {"x": (4, 16)}, {"y": (1,) * (rank - 2) + (4, 8)}, constants)
    samples = [{"x": rng.normal(1, 3, (4, 16)).astype(np.float32)} for _ in range(4)]
    found = made(proto, samples, scheme=scheme)
    held = split(samples)
    changed = correct(found.prepared, found.model, found.solution.nodes.values(), held)
    (name,) = (name for name in changed.initializers if name.endswith("_corrected_bias"))
    assert changed.array(name).size == 8
    before, after, wanted = (Session(model, ["y"]) for model in (found.model, changed, found.prepared))
    error = {}
    for which, session in (("before", before), ("after", after)):
        pairs = [(session(s)["y"], wanted(s)["y"]) for s in held.fitting()]
        assert all(got.shape == float_y.shape for got, float_y in pairs)
        error[which] = np.abs(np.mean([(a - b).reshape(4, 8) for a, b in pairs], axis=(0, 1))).max()
    assert error["after"] < 1e-5 < error["before"]


def test_constants_along_other_axes_are_no_biases() -> None:
    rng = np.random.default_rng(1)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"], name="p"), helper.make_node("Add", ["a", "b"], ["y"])]
    constants = [constant("w", rng.normal(size=(16, 8)).astype(np.float32)), constant("b", np.ones((4, 1), "f4"))]
    model = Model(proto=assemble(nodes, {"x": (4, 16)}, {"y": (4, 8)}, constants), directory=Path(), sha256="m")
    assert bias._place(model, model.node("p")) is None


def residual() -> onnx.ModelProto:
    """image (1, 3, 16, 16) -> stem -> Relu -> two convolutions with a shortcut around them -> mean -> Gemm -> y."""
    rng = np.random.default_rng(2)
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["a"], name="stem", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu0"),
        helper.make_node("Conv", ["b", "w1", "b1"], ["c"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"], name="relu1"),
        helper.make_node("Conv", ["d", "w2", "b2"], ["e"], name="second", pads=[1] * 4),
        helper.make_node("Add", ["e", "b"], ["f"], name="shortcut"),
        helper.make_node("GlobalAveragePool", ["f"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["h"], name="flat"),
        helper.make_node("Gemm", ["h", "w3"], ["y"], name="head"),
    ]
    shapes = {"w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,), "w3": (8, 4)}
    constants = [constant(n, rng.normal(0, 0.2, s).astype(np.float32)) for n, s in shapes.items()]
    return assemble(nodes, {"image": (1, 3, 16, 16)}, {"y": (1, 4)}, constants)


@pytest.mark.parametrize("which", ["residual", "matmul", "segmenter"])
def test_stages_correct_as_whole_passes_do(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    if which == "matmul":
        proto, samples = perceptron(bias=True), [{"x": rng.normal(1, 3, (64, 16)).astype(np.float32)} for _ in range(4)]
    elif which == "residual":
        proto, samples = residual(), images(4, (1, 3, 16, 16))
    else:
        proto, samples = segmenter(), images(4)
    found = made(proto, samples)
    held = split(samples)
    staged = correct(found.prepared, found.model, found.solution.nodes.values(), held)
    monkeypatch.setattr(bias, "can_stage", lambda _: False)
    whole = correct(found.prepared, found.model, found.solution.nodes.values(), held)
    changed = [name for name in whole.initializers if name.endswith("_corrected_bias")]
    assert changed and staged.initializers.keys() == whole.initializers.keys()
    for name in changed:
        np.testing.assert_allclose(staged.array(name), whole.array(name), rtol=0, atol=2e-6)


def test_values_that_relu_cuts_off_do_not_count() -> None:
    wanted = bias._Mean(value=np.float64([0.5]), active=np.float64([0.5]))
    found = bias._Mean(value=np.float64([0.4]), active=np.float64([0.25]))
    assert bias._shift(wanted, found).tolist() == pytest.approx([0.4])  # a quarter of the values must make up for 0.1


def test_large_outputs_need_fewer_samples() -> None:
    small, large = made(segmenter(), images(1)), made(segmenter(spatial=(64, 64)), images(1, (1, 1, 64, 64)))
    assert bias._enough(small.prepared, [small.solution.nodes["/head/Conv"]]) == 8192 // 64
    assert bias._enough(large.prepared, [large.solution.nodes["/head/Conv"]]) == bias.MINIMUM_SAMPLES


def test_correction_is_dropped_where_it_does_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = images(8)
    found = made(segmenter(), samples)
    same, said = corrected(found.prepared, found.model, found.solution.nodes.values(), samples)
    assert "held-out" in said
    monkeypatch.setattr(bias, "_shift", lambda wanted, found: wanted.value + 10)
    same, said = corrected(found.prepared, found.model, found.solution.nodes.values(), samples)
    assert same is found.model and said.startswith("bias correction not applied: output SQNR on 2 held-out")
    forced, said = corrected(found.prepared, found.model, found.solution.nodes.values(), samples, always=True)
    assert forced is not found.model and "as asked for" in said


def test_auto_never_lowers_the_held_out_sqnr() -> None:
    samples = images(8)
    found = made(segmenter(), samples)
    changed, _ = corrected(found.prepared, found.model, found.solution.nodes.values(), samples)
    judge = HeldOutScore(found.prepared, split(samples))
    assert judge.sqnr_db(changed) >= judge.sqnr_db(found.model)


def test_split_does_not_depend_on_order_and_is_disjoint() -> None:
    samples = images(12)
    there, back = split(samples), split(samples[::-1])
    assert [11 - i for i in back.fit] == list(there.fit)
    assert len(there.held) == 3 and len(there.fit) == 8 and not there.held & set(there.fit)
    assert {11 - i for i in back.held} == there.held
    alone = split(samples[:1])
    assert alone.fit == (0,) and alone.held == {0}


@pytest.mark.parametrize("both", [np.inf, -np.inf])
def test_two_infinities_are_no_gain(both: float, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [{"x": s} for s in np.random.default_rng(1).normal(size=(4, 8, 16)).astype(np.float32)]
    found = made(perceptron(bias=True), samples)
    monkeypatch.setattr(HeldOutScore, "sqnrs_db", lambda self, candidates: [both] * len(candidates))
    model, note = corrected(found.prepared, found.model, found.solution.nodes.values(), samples, always=False)
    assert model is found.model and "not applied" in note
