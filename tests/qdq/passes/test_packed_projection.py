"""A packed projection of attention becomes one product for each part: which forms, with what result, and what for."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Made, build, node, normal, quantized, run, written
from onnx import NodeProto
from transformer_graphs import PACKED, packed, packed_inside

from engines.backends import rtx
from engines.backends.compiler import ShapeRange
from engines.core.operators import WEIGHTED
from engines.verify.audit import Audit, audit
from qdq.assemble.precision.convert import convert
from qdq.assemble.quantize import quantize
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import prepare
from qdq.passes.rewrites import FLOAT_REWRITES
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.tune.variant_builder import Variant, VariantBuilder

REWRITE = FLOAT_REWRITES["packed_projection"]


def fed(model: Model, count: int = 3) -> list[dict[str, np.ndarray]]:
    """Two sequences of five tokens each."""
    rng = np.random.default_rng(5)
    shape = model.inputs[0].shape or ()
    return [{"x": rng.normal(size=(2, 5, shape[-1])).astype(np.float32)} for _ in range(count)]


def same(model: Model, changed: Model) -> bool:
    data = fed(model)
    return all(np.array_equal(a["y"], b["y"]) for a, b in zip(run(model, data), run(changed, data), strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", PACKED)
def test_every_part_has_its_product_and_every_number_is_the_same(form: str, dynamic: bool) -> None:
    model = packed(form, dynamic=dynamic)
    done = REWRITE(model)
    assert done.fired == ("qkv",) and same(model, done.model)
    products = [n.name for n in done.model.graph.node if n.op_type in WEIGHTED and n.name.startswith("qkv")]
    assert len(products) == 3 and not REWRITE(done.model).fired
    assert REWRITE(model, {"proj"}).model is model


def test_unequal_parts_of_grouped_queries() -> None:
    model = packed("split", heads=4, groups=2)
    done = REWRITE(model)
    assert done.fired and same(model, done.model)
    sizes = [done.model.initializers[n.input[1]].dims[1] for n in done.model.graph.node if n.name.startswith("qkv")]
    assert sizes == [64, 32, 32]


def test_a_part_that_is_cut_again() -> None:
    """Queries, and keys with values, which are then cut."""
    tensors = {"w": normal(8, 24), "one": np.array([8, 16]), "two": np.array([8, 8])}
    nodes = [
        node("MatMul", "x w", "z", "qkv"),
        node("Split", "z one", "q kv", "first", axis=-1),
        node("Split", "kv two", "k v", "second", axis=-1),
        node("Transpose", "k", "kt", "turn", perm=[0, 2, 1]),
        node("MatMul", "q kt", "s", "scores"),
        node("MatMul", "s v", "y", "mix"),
    ]
    model = build(nodes, {"x": (2, 5, 8)}, tensors)
    done = REWRITE(model)
    assert done.fired == ("qkv",) and same(model, done.model)
    assert not any(n.op_type == "Split" for n in done.model.graph.node)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("gate", "no part of its result comes to a product of two computed tensors"),
        ("whole", "but also read whole: by Relu 'relu'"),
        ("output", "is an output of the model"),
        ("rows", "is cut out of rows"),
        ("twice", "its parts overlap"),
        ("rotary", "come together again in one operand"),
    ],
)
def test_what_stays_whole_and_why(change: str, reason: str) -> None:
    sizes = {"rows": np.array([2, 3]), "one": np.array([8, 8]), "zero": np.array([0]), "end": np.array([16])}
    tensors = {"w": normal(8, 16), "v": normal(8, 8), **sizes, "axis": np.array([-1]), "from": np.array([4])}
    nodes = [node("MatMul", "x w", "z", "qkv")]
    if change == "rows":
        nodes += [node("Split", "z rows", "a b", "split", axis=1), node("Transpose", "b", "bt", "t", perm=[0, 2, 1])]
    elif change == "twice":
        nodes += [node("Slice", "z zero end axis", "a", "first"), node("Slice", "z from end axis", "b", "second")]
        nodes.append(node("Transpose", "b", "bt", "t", perm=[0, 2, 1]))
    else:
        nodes += [node("Split", "z one", "a b", "split", axis=-1), node("Transpose", "b", "bt", "t", perm=[0, 2, 1])]
    if change == "gate":
        nodes += [node("Sigmoid", "b", "s"), node("Mul", "a s", "g", "gate"), node("MatMul", "g v", "y", "down")]
    elif change == "rotary":
        nodes += [node("Neg", "b", "m"), node("Concat", "m a", "r", axis=-1), node("MatMul", "r r", "y", "mix")]
    elif change == "twice":
        nodes += [
            node("ReduceMax", "bt axis", "m"),
            node("ReduceMax", "a axis", "n"),
            node("MatMul", "m n", "y", "mix"),
        ]
    else:
        nodes.append(node("MatMul", "a bt", "y", "mix"))
    if change == "whole":
        nodes.append(node("Relu", "z", "r"))
    outputs = {"whole": ("y", "r"), "output": ("y", "z")}.get(change, ("y",))
    model = build(nodes, {"x": (1, 5 if change != "rotary" else 16, 8)}, tensors, outputs=outputs)
    done = REWRITE(model, {"qkv"})
    assert not done.fired and done.model is model and reason in done.unfit["qkv"]


def test_every_plan_has_it_but_for_excluded_nodes() -> None:
    model = packed("gather")
    plan = placement.plan(model)
    assert [r.nodes for r in plan.rewrites] == [("qkv",)]
    assert plan.quantized_nodes == ("qkv_0", "qkv_1", "qkv_2", "proj")
    assert plan.explain("qkv")[:2] == [
        "qkv: the plan's rewrite 'packed_projection' makes other nodes of it: qkv_0, qkv_1, qkv_2",
        "qkv_0: quantized",
    ]
    left = placement.plan(model, Settings(exclude=("qkv",)))
    assert left.quantized_nodes == ("proj",) and not left.rewrites
    assert not placement.plan(model, Settings(scheme="fp8")).rewrites
    over = placement.plan(model, Settings(overrides={"qkv": "int8-weight"}))
    assert {p.spec.weight_only for p in over.weights if p.uses[0][0] != "proj"} == {True}
    assert over.settings.overrides == {"qkv": "int8-weight"}
    with pytest.raises(InputError, match="matches none"):
        placement.plan(model, Settings(exclude=("qkv_0",)))


def test_the_tuner_starts_from_it_and_carries_what_was_said_of_the_whole() -> None:
    model = packed("slice")
    builder = VariantBuilder(model=model, settings=Settings(), unquantized_types=("fp16",))
    assert builder.usual.rewrites == {("packed_projection", "qkv")}
    assert builder.quantizable(builder.usual) == placement.plan(model).quantized_nodes
    assert builder.quantizable(Variant()) == ("qkv", "proj")
    excluding = VariantBuilder(model=model, settings=Settings(exclude=("qkv",)), unquantized_types=("fp16",))
    assert not excluding.usual.rewrites
    assert excluding.quantizable(builder.usual) == ("proj",)
    assert excluding.base(builder.usual).plan.settings.exclude == ("qkv",)


def test_a_quantized_model_has_the_parts() -> None:
    model = packed("split")
    made = quantize(model, fed(model))
    assert made.plan.rewrites and made.prepared is not model
    assert sum(n.op_type == "DequantizeLinear" for n in made.model.graph.node) == 6  # four weights, two tensors


def compiled(made: Made, shapes: dict[str, ShapeRange], target: str) -> Audit:
    proto = convert(made.model).model.proto
    return audit(proto, rtx.build(proto, shapes=shapes, targets=(target,)).table, shapes=shapes)


@pytest.mark.parametrize("target", ["sm86", "sm89"])
@pytest.mark.parametrize("form", ["split", "gather"])
def test_the_compiler_multiplies_in_int8_by_this_form_alone(form: str, target: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = packed(form, heads=4, size=16, dynamic=True)
    shape = ShapeRange(min=(1, 2, 64), opt=(2, 32, 64), max=(4, 64, 64))
    whole = written(model, placement.placed(model, Settings(shift=False)), fed(model))
    assert compiled(whole, {"x": shape}, target).missed_names == ("qkv",)
    found = compiled(quantized(model, fed(model), shift=False), {"x": shape}, target)
    asked = [row for row in found.nodes if row.requested]
    assert len(asked) == 4 and {row.consumed for row in asked} == {"int8"}


@pytest.mark.parametrize("outer", ["Loop", "If"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", PACKED)
def test_every_part_has_its_product_in_a_body_too(form: str, dynamic: bool, outer: str) -> None:
    model = packed_inside(form, outer, dynamic=dynamic)
    done = REWRITE(model)
    data = [{"start": sample["x"]} for sample in fed(packed(form), 2)]
    got, want = run(done.model, data), run(model, data)
    assert done.fired == ("qkv",) and all(np.array_equal(a["z"], b["z"]) for a, b in zip(got, want, strict=True))
    inner = [n for n in done.model.inner_nodes if n.startswith("qkv")]
    assert sorted(inner) == ["qkv_0", "qkv_1", "qkv_2"] and not REWRITE(done.model).fired
    lost = [t for name in done.model.inner_nodes for t in done.model.node(name).output if done.model.rank(t) is None]
    assert not lost  # the shapes of what is new in a body are known


def test_a_cut_in_a_body_of_a_product_around_it_is_left_alone() -> None:
    """Its parts would be multiplied once a turn."""
    proto = packed_inside("split", "If").proto
    choice = next(n for n in proto.graph.node if n.op_type == "If")
    then = next(a.g for a in choice.attribute if a.name == "then_branch")
    product = next(n for n in then.node if n.name == "qkv")
    around = NodeProto.FromString(product.SerializeToString())
    around.input[0] = "start"
    then.node.remove(product)
    proto.graph.node.insert([n.name for n in proto.graph.node].index("choice"), around)
    model = prepare(load(proto))
    assert "split" in model.inner_nodes and "qkv" not in model.inner_nodes and not REWRITE(model).fired


@pytest.mark.parametrize("outer", ["Loop", "If"])
def test_the_compiler_multiplies_in_int8_in_a_body(outer: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = packed_inside("split", outer, heads=4, size=16, dynamic=True)
    data = [{"start": sample["x"] + np.float32(0.2)} for sample in fed(packed("split", heads=4, size=16))]
    made = quantize(model, data, settings=Settings(shift=False, equalize="none", rounding="nearest"))
    shape = ShapeRange(min=(1, 2, 64), opt=(2, 32, 64), max=(4, 64, 64))
    proto = convert(made.model).model.proto
    found = audit(proto, rtx.build(proto, shapes={"start": shape}).table, shapes={"start": shape})
    asked = [row for row in found.nodes if row.requested]
    turns = 3 if outer == "Loop" else 1
    assert [row.consumed for row in asked] == ["int8"] * 4 and not found.missed
    assert {(row.turns, row.macs) for row in asked} == {(turns, turns * 2 * 32 * 64 * 64)}
    assert found.int8_share == pytest.approx(4 * 64 / (4 * 64 + 2 * 32))
