"""FP8 attention: all four operands or none, a scale of 1/448 for the Softmax, one fused kernel."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import Made, build, node, normal, quantized, run, samples
from transformer_graphs import attention

from engines.backends import rtx
from engines.core.documents import replace
from engines.verify.audit import audit
from qdq.assemble.finish import finish
from qdq.assemble.quantize import quantize
from qdq.build.engine import shape_ranges
from qdq.build.pricing.tensorrt_pricer import pricer_of
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings
from qdq.tune.find_plan import find_plan
from qdq.tune.variant_builder import VariantBuilder


def projected(length: int = 64, head: int = 32) -> Model:
    """x -> Q, K, V of two heads -> masked attention -> product."""
    wide = 2 * head
    tensors = {f"w{name}": normal(wide, wide, seed=i) / wide**0.5 for i, name in enumerate("qkvo")}
    tensors |= {"apart": np.array([1, length, 2, head]), "joined": np.array([1, length, wide])}
    tensors |= {"c": np.float32([head**-0.5])}
    nodes = []
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", f"x w{name}", f"{name}0", f"to_{name}"),
            node("Reshape", f"{name}0 apart", f"{name}1", f"apart_{name}"),
            node("Transpose", f"{name}1", name, f"turn_{name}", perm=perm),
        ]
    nodes += [
        node("MatMul", "q k", "s", "scores"),
        node("Mul", "s c", "sc", "scale"),
        node("Add", "sc mask", "t", "masked"),
        node("Softmax", "t", "p", "weights"),
        node("MatMul", "p v", "m", "mix"),
        node("Transpose", "m", "m1", "back", perm=[0, 2, 1, 3]),
        node("Reshape", "m1 joined", "m2", "join"),
        node("MatMul", "m2 wo", "y", "out"),
    ]
    return build(nodes, {"x": (1, length, wide), "mask": (1, 1, 1, length)}, tensors)


def points(plan: Plan) -> set[str]:
    return {c for p in plan.points if p.rule == "attention" for c in p.consumers}


ALL = {"scores:0", "scores:1", "mix:0", "mix:1"}


@pytest.mark.parametrize("scales", ["", "q", "s", "qk"])
@pytest.mark.parametrize("masked", [True, False])
def test_all_four_operands_are_wanted(scales: str, masked: bool) -> None:
    model = attention(scales=scales, masked=masked, length=40)
    assert points(placement.plan(model, Settings(attention="fp8"))) == ALL
    assert not placement.plan(model, Settings(scheme="fp8")).points


def test_all_or_none() -> None:
    assert not placement.plan(attention(softmax=False, length=40), Settings(attention="fp8")).points
    assert not placement.plan(attention(length=40), Settings(attention="fp8", exclude=("mix",))).points
    for kept in ("float", "fp32"):
        assert not placement.plan(attention(length=40), Settings(attention="fp8", overrides={"mix": kept})).points
    nodes = [
        node("MatMul", "q k", "s", "scores"),
        node("Softmax", "s", "p", "weights"),
        node("MatMul", "p v", "y", "mix"),
    ]
    sizes = {"q": (2, 40, 8), "k": (2, 8, 40), "v": (2, 40, 8)}
    shown = build(nodes, sizes, outputs=("y", "p"))  # the weights of attention are an output too
    assert not placement.plan(shown, Settings(attention="fp8")).points
    other = build([*nodes, node("Relu", "q", "r")], sizes, outputs=("y", "r"))
    assert not placement.plan(other, Settings(attention="fp8")).points


def test_few_tokens_are_not_fused_and_stay_float() -> None:
    plan = placement.plan(attention(length=31), Settings(attention="fp8"))
    assert not plan.points
    assert {s.reason for s in plan.skips if s.op_type == "MatMul"} == {
        "of 31 tokens FP8 attention is not fused: it wants 32"
    }


def test_the_softmax_has_the_scale_of_its_bound() -> None:
    model = attention(length=40)
    made: Made = quantized(model, samples(model), attention="fp8")
    assert float(made.solution.activations["p"].scale) == pytest.approx(1 / 448)
    assert float(made.solution.activations["q"].scale) != pytest.approx(1 / 448)
    data = samples(model, seed=4)
    wanted, found = (np.concatenate([o["y"].ravel() for o in run(m, data)]) for m in (model, made.model))
    assert 10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()) > 20


@pytest.mark.parametrize("target", ["sm89", "sm120"])
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_it_compiles_to_one_fused_kernel_of_fp8(target: str, scheme: str) -> None:
    model = projected()
    settings = Settings(scheme=scheme, attention="fp8", equalize="none", calibrator="max")
    made = quantize(model, samples(model), settings=settings)
    shipped = finish(made.model, made.plan, unquantized_type="fp16", table=made.table).model
    engine = rtx.build(shipped.proto, targets=(target,))
    found = {n.node: n for n in audit(shipped.proto, engine.table).nodes}
    for name in ("scores", "mix"):
        assert found[name].requested == "fp8" and found[name].consumed == "fp8"
        assert "_gemm_mha" in found[name].kernel
    assert found["to_q"].consumed == scheme


@pytest.mark.parametrize(("compiler", "gpu"), [("tensorrt", "l4"), ("rtx", "rtx4090")])
def test_a_search_leaves_it_where_anything_is_quantized(compiler: str, gpu: str) -> None:
    model = projected(256, 64)
    recipe = {"compiler": compiler, "gpu": gpu, "target": "sm89", "attention": "fp8", "unquantized_type": "fp16"}
    judge = pricer_of(Recipe.from_mapping(recipe | {"tune": "rewrites"}), shape_ranges(model, (), None) or {})
    assert judge is not None
    found = find_plan(model, judge, samples=None)
    assert len(found.plan.quantized_nodes) == 4 and points(found.plan) == ALL
    builder = VariantBuilder(model=model, settings=judge.recipe.settings, unquantized_types=("fp16",))
    one = replace(builder.usual, quantized=frozenset({"to_q"}))
    assert points(builder.plan_of(one, "")) == ALL and not points(builder.plan_of(builder.usual, ""))
    assert not ALL.intersection(builder.shortcuts(one))  # no step takes one of them away


def test_a_gpu_without_fp8_is_refused_before_anything_runs() -> None:
    assert "fp8" in Settings(attention="fp8").formats
    with pytest.raises(InputError, match="Unknown attention"):
        Settings(attention="int8")
    with pytest.raises(InputError, match="Unknown embeddings 'int5': it must be one of float, int8, int4"):
        Settings(embeddings="int5")
