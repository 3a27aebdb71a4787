"""Every placement rule on a model it speaks for and one it is silent on; what a plan says about whole networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import graphs
import pytest
from graphs import build, node, normal
from onnx import ModelProto, TensorProto, helper
from transformer_graphs import attention

from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.model.nodes import all_nodes
from qdq.plan.placement import plan
from qdq.plan.plan import Plan
from qdq.plan.rules.common import RULES, Tie, Veto, Want, kept_float
from qdq.plan.settings import Settings
from qdq.plan.spec import Spec

Builder = Callable[[], Model]


def transposed() -> Model:
    return build([node("ConvTranspose", "x w", "y")], {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 2, 2)})


def relu() -> Model:
    return build([node("Relu", "x", "y")], {"x": (2, 3)})


def computed() -> Model:
    """The weight of a Conv, of a Gemm and both sides of a MatMul are inputs."""
    nodes = [node("Conv", "x k", "a"), node("Gemm", "m n", "b"), node("MatMul", "m n", "c")]
    inputs = {"x": (1, 4, 5, 5), "k": (4, 4, 1, 1), "m": (3, 4), "n": (4, 5)}
    return build(nodes, inputs, outputs=("a", "b", "c"))


def left_constant() -> Model:
    """A vector: of a matrix `prepare` makes a weight on the right."""
    return build([node("MatMul", "w x", "y")], {"x": (4, 5)}, {"w": normal(4)})


def vector() -> Model:
    return build([node("MatMul", "x w", "y")], {"x": (3, 4)}, {"w": normal(4)})


def added() -> Model:
    """An Add of two tensors of which no convolution reads either."""
    return build([node("Relu", "x", "a"), node("Add", "a x", "y")], {"x": (2, 3)})


def custom() -> Model:
    """A Conv by name only."""
    proto = ModelProto()
    proto.CopyFrom(graphs.conv().proto)
    for each in proto.graph.node:
        each.domain = "my.ops"
    return graphs.conv().replace(proto)


def transposed_inside() -> Model:
    """An If with a Gemm that reads its data transposed."""
    end = [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
    turned = helper.make_graph([node("Gemm", "x w", "r", transA=1)], "turned", [], end)
    other = helper.make_graph([node("Neg", "x", "r")], "other", [], end)
    nodes = [
        node("ReduceSum", "x", "total", keepdims=0),
        node("Cast", "total", "flag", to=TensorProto.BOOL),
        node("If", "flag", "y", then_branch=turned, else_branch=other),
    ]
    return build(nodes, {"x": (6, 6)}, {"w": normal(6, 6)})


CASES: dict[str, tuple[type, Builder, Builder]] = {
    "weighted": (Want, graphs.conv, relu),
    "attention": (Want, partial(attention, length=40), relu),
    "residual": (Want, graphs.residual, added),
    "concat": (Tie, graphs.branches, graphs.residual),
    "transposed": (Veto, transposed, graphs.conv),
    "operands": (Veto, computed, graphs.conv),
    "excluded": (Veto, graphs.conv, relu),
    "containers": (Veto, graphs.conditional, graphs.conv),
    "inner": (Veto, transposed_inside, graphs.conditional),
    "foreign": (Veto, custom, relu),
}


def test_every_rule_has_a_case() -> None:
    assert [rule.__name__ for rule in RULES] == [kept_float.__name__, *CASES]


def test_an_override_that_leaves_a_node_in_float_speaks_under_the_name_of_its_type() -> None:
    settings = Settings(overrides={"conv": "fp32", "other": "float"})
    (said,) = (d for n in all_nodes(graphs.conv().graph) for d in kept_float(graphs.conv(), n, settings))
    assert isinstance(said, Veto) and said.rule == "fp32" and "FP32" in said.reason


@pytest.mark.parametrize("rule", [r for r in RULES if r is not kept_float], ids=list(CASES))
def test_a_rule_speaks_on_one_model_and_is_silent_on_another(rule: Callable[..., list[Any]]) -> None:
    kind, positive, negative = CASES[rule.__name__]
    settings = Settings(exclude=("conv",), attention="fp8")
    said, unsaid = ([d for n in all_nodes(m.graph) for d in rule(m, n, settings)] for m in (positive(), negative()))
    assert said
    assert all(isinstance(d, kind) and d.rule == rule.__name__ for d in said)
    assert unsaid == []


def accounted(model: Model, made: Plan) -> None:
    """Each node is quantized or has one Skip with a reason, never both; outputs of the model and biases stay float."""
    skipped = [s.node for s in made.skips]
    names = [n.name for n in model.graph.node]
    assert sorted([*made.quantized_nodes, *skipped]) == sorted(names)
    assert all(s.rule and len(s.reason) > 10 for s in made.skips)
    for point in made.points:
        for name, index in point.uses:
            assert model.node(name).input[index] == point.tensor
            assert index < 2
        assert (point.role == "weight") == model.is_constant(point.tensor)
    made.check(model)
    for name in names:
        assert made.explain(name)


QUANTIZED: dict[str, tuple[Builder, int]] = {
    "Conv1d": (lambda: graphs.conv((8, 4, 3), (6,)), 0),
    "Conv2d": (graphs.conv, 0),
    "Conv3d": (lambda: graphs.conv((8, 4, 3, 3, 3), (5, 5, 5)), 0),
    "depthwise": (lambda: graphs.conv((8, 1, 3, 3), group=8), 0),
    "grouped": (lambda: graphs.conv((8, 4, 3, 3), group=2), 0),
    "Gemm": (lambda: graphs.product("Gemm", bias=(8,)), 1),
    "Gemm transB": (lambda: graphs.product("Gemm", (8, 6), transB=1), 0),
    "MatMul": (graphs.product, 1),
    "MatMul 3-D data": (lambda: graphs.product(data=(2, 5, 6)), 1),
    "MatMul batched": (lambda: graphs.product(weight=(3, 6, 8), data=(3, 5, 6)), 2),
    "dynamic": (lambda: graphs.conv(spatial=("h", "w"), batch="n"), 0),
    "float16": (lambda: graphs.conv(dtype="float16"), 0),
    "bfloat16": (lambda: graphs.conv(dtype="bfloat16"), 0),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_data_per_tensor_and_weight_along_its_output_channels(name: str) -> None:
    make, axis = QUANTIZED[name]
    model = make()
    made = plan(model)
    accounted(model, made)
    kernel = model.graph.node[0].name
    assert [(p.tensor, p.role, p.spec, p.consumers) for p in made.points] == [
        ("x", "activation", Spec(format="int8", shift=True), (f"{kernel}:0",)),
        ("w", "weight", Spec(format="int8", axis=axis), (f"{kernel}:1",)),
    ]
    assert [s.node for s in made.skips] == ["relu"]


FLOAT: dict[str, tuple[Builder, str]] = {
    "transposed": (transposed, "no INT8 kernel for ConvTranspose"),
    "computed": (computed, "weight is computed|two computed tensors"),
    "left constant": (left_constant, "left operand is the constant"),
    "vector": (vector, "vector"),
}


@pytest.mark.parametrize("name", FLOAT)
def test_what_no_integer_kernel_takes_is_skipped_with_the_reason(name: str) -> None:
    make, reason = FLOAT[name]
    model = make()
    made = plan(model)
    accounted(model, made)
    assert made.points == ()
    for skip in made.skips:
        assert re.search(reason, skip.reason)


def test_attention_quantizes_the_projections_and_leaves_both_products_float() -> None:
    model = graphs.attention()
    made = plan(model)
    accounted(model, made)
    assert made.quantized_nodes == ("project_q", "project_k", "project_v")
    assert len(made.activations) == 1  # one quantizer for the three readers of x
    reasons = {s.node: s.reason for s in made.skips}
    assert "attention" in reasons["scores"]
    assert "attention" in reasons["mix"]
    assert "softmax" in reasons["softmax"]


def test_nodes_in_the_bodies_of_an_if_are_planned_one_by_one() -> None:
    model = graphs.conditional()
    made = plan(model)
    assert made.quantized_nodes == ("outer", "conv_2", "conv")
    (skip,) = [s for s in made.skips if s.node == "if"]
    assert skip.rule == "containers"
    assert "an entry of its own" in skip.reason


def test_a_residual_add_reads_the_tensor_that_its_convolution_reads() -> None:
    model = graphs.residual()
    made = plan(model)
    accounted(model, made)
    (point,) = made.activations
    assert (point.tensor, point.consumers) == ("t", ("conv:0", "add:1"))


@pytest.mark.parametrize("pattern", ["conv", "add"])
def test_an_excluded_node_takes_no_part_in_a_residual(pattern: str) -> None:
    model = graphs.residual()
    made = plan(model, Settings(exclude=(pattern,)))
    accounted(model, made)
    consumers = [c for p in made.activations for c in p.consumers]
    assert consumers == ([] if pattern == "conv" else ["conv:0"])


def test_the_branches_of_a_concat_and_its_output_share_one_tie() -> None:
    model = graphs.branches()
    made = plan(model)
    accounted(model, made)
    assert {p.tensor: p.tie for p in made.points if p.role == "activation"} == dict.fromkeys(
        ["both", "left", "right"], "both"
    )
    assert {p.tie for p in made.weights} == {None}
    shared = [p for p in made.weights if p.tensor == "v"]
    assert [p.consumers for p in shared] == [("left_conv:1", "right_conv:1")]


def test_a_concat_with_one_quantized_tensor_ties_nothing() -> None:
    nodes = [node("Concat", "x z", "c", axis=1), node("Conv", "c w", "y")]
    model = build(nodes, {"x": (1, 2, 5, 5), "z": (1, 2, 5, 5)}, {"w": normal(4, 4, 1, 1)})
    assert [p.tie for p in plan(model).activations] == [None]


def test_a_weight_read_along_both_axes_gets_a_point_for_each() -> None:
    nodes = [node("MatMul", "x w", "a"), node("Gemm", "a w", "y", transB=1)]
    model = build(nodes, {"x": (3, 6)}, {"w": normal(6, 4)})
    made = plan(model)
    accounted(model, made)
    assert [(p.tensor, p.spec.axis, p.consumers) for p in made.weights] == [
        ("w", 1, ("matmul:1",)),
        ("w", 0, ("gemm:1",)),
    ]


def test_an_inner_tensor_that_is_also_an_output_is_quantized_for_its_reader_only() -> None:
    nodes = [node("Relu", "x", "a"), node("Conv", "a w", "y")]
    model = build(nodes, {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 1, 1)}, outputs=("y", "a"))
    made = plan(model)
    accounted(model, made)
    assert [p.consumers for p in made.activations] == [("conv:0",)]


@pytest.mark.parametrize("patterns", [("conv",), ("c*",), ("*nv", "re?u")])
def test_excluded_nodes_stay_float_and_the_skip_names_the_pattern(patterns: tuple[str, ...]) -> None:
    model = graphs.conv()
    made = plan(model, Settings(exclude=patterns))
    accounted(model, made)
    assert made.points == ()
    assert next(s for s in made.skips if s.node == "conv").reason == f"excluded by the pattern {patterns[0]!r}"


@pytest.mark.parametrize("pattern", ["convv", "Conv", "/conv/*"])
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(pattern: str) -> None:
    with pytest.raises(InputError, match=r"matches none of the model's 2 nodes"):
        plan(graphs.conv(), Settings(exclude=("*", pattern)))
    with pytest.raises(InputError, match="Near names: conv"):
        plan(graphs.conv(), Settings(exclude=("convv",)))


def test_a_model_with_nothing_to_quantize_has_a_plan_of_skips() -> None:
    model = relu()
    made = plan(model)
    accounted(model, made)
    assert made.points == ()


def test_without_shift_no_point_may_be_shifted() -> None:
    made = plan(graphs.residual(), Settings(shift=False))
    assert not any(p.spec.shift for p in made.points)
