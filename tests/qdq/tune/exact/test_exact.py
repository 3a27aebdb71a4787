"""What TensorRT runs in INT8, chosen exactly: no set of nodes is faster, a bound is kept, nothing is guessed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from graphs import build, node, normal, samples
from tensorrt_networks import network, pricer

from engines.backends.compiler import ShapeRange
from engines.core.documents import replace
from engines.core.errors import BuildError
from qdq.assemble.finish import finish
from qdq.assemble.precision.convert import convert
from qdq.assemble.quantize import quantize
from qdq.build.pricing.float_form import float_form
from qdq.build.pricing.tensorrt_pricer import pricer_of, unpriced
from qdq.build.recipe import Recipe
from qdq.model.model import Model
from qdq.tune.exact.elsewhere import elsewhere
from qdq.tune.exact.node_prices import NodePrices
from qdq.tune.find_plan import find_plan
from qdq.tune.variant_builder import Variant, VariantBuilder


@pytest.fixture(autouse=True)
def _compiler() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")


@pytest.mark.parametrize("size", [8, 28])
def test_no_subset_of_the_nodes_is_predicted_faster(size: int) -> None:
    model = network(size=size)
    judge = pricer(model, unquantized_type="fp16")
    builder = VariantBuilder(model=model, settings=judge.recipe.settings, unquantized_types=("fp16",))
    prices = NodePrices(builder=builder, judge=judge, engines_of=judge.engines)
    nodes = builder.quantizable(builder.usual)
    every = itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(len(nodes) + 1))
    best = min((prices(replace(builder.usual, quantized=frozenset(some))) for some in every), key=lambda p: p.us)
    found = find_plan(model, judge, samples=None)
    assert len(nodes) == 7 and best.us <= found.price.us <= best.us + best.tie(found.price)
    assert found.price.us <= found.plain and found.fp32 == math.inf


def test_a_model_is_written_for_each_float_type_and_for_no_set_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, written, write = network(), [], VariantBuilder.model_of

    def counted(builder: VariantBuilder, variant: Variant) -> Model:
        written.append(variant)
        return write(builder, variant)

    monkeypatch.setattr(VariantBuilder, "model_of", counted)
    judge = pricer(model)
    monkeypatch.setattr(type(judge), "width", 2)  # of a machine with more than one core
    found = find_plan(model, judge, samples=None)
    assert found.tried > len(written) == 2  # FP16 and FP32
    assert not any(variant.quantized for variant in written)


def test_what_is_built_is_what_was_tuned() -> None:
    model = network()
    judge, data = pricer(model), samples(model, 2)
    found = find_plan(model, judge, samples=data)
    made = quantize(model, data, plan=found.plan, settings=judge.recipe.settings)
    done = finish(made.model, made.plan, unquantized_type="auto", table=made.table)
    form = float_form(done.model)
    assert form.int8 == set(found.plan.quantized_nodes) and not form.others
    assert not any("Linear" in n.op_type for n in form.model.graph.node)
    assert judge(done.model).us == pytest.approx(found.price.us, rel=1e-6)
    assert found.price.us < found.plain < found.fp32 and found.decision.chosen
    assert judge.told[0].notes == ("times of TensorRT 11 are derived from what TensorRT-RTX makes of the float model",)


def test_rewrites_alone_quantize_all_and_say_what_float_takes() -> None:
    model = network()
    free, forced = (find_plan(model, pricer(model, tune=tune), samples=None) for tune in ("placement", "rewrites"))
    assert len(forced.plan.quantized_nodes) == 7 and forced.price.us >= free.price.us
    assert (forced.plain, forced.fp32) == (free.plain, free.fp32) and math.isfinite(free.plain + free.fp32)


def test_a_bound_keeps_fewer_nodes() -> None:
    model = network(batch=16)
    data = samples(model, 2)
    free = find_plan(model, pricer(model), samples=data)
    builder = VariantBuilder(
        model=model, settings=pricer(model).recipe.settings, unquantized_types=("fp16", "fp32"), samples=data
    )
    noise = builder.noise(free.variant)
    assert noise
    bound = -10 * math.log10(noise) + 1.5
    kept = find_plan(model, pricer(model, min_sqnr_db=bound), samples=data)
    assert len(kept.plan.quantized_nodes) < len(free.plan.quantized_nodes) and kept.price.us > free.price.us
    assert any("measured" in step for step in kept.steps)
    assert not find_plan(model, pricer(model, min_sqnr_db=200), samples=data).plan.points


def test_the_finished_model_is_not_compiled_again() -> None:
    """Its float form has other names of weights, and the same nodes."""
    model = network(batch=4, size=8)
    judge = pricer(model, unquantized_type="fp16")
    data = [{name: array * np.float32(1e-5) for name, array in sample.items()} for sample in samples(model, 2)]
    found = find_plan(model, judge, samples=data)
    made = quantize(model, data, plan=found.plan, settings=judge.recipe.settings)
    done = finish(made.model, made.plan, unquantized_type="fp16", table=made.table)
    known = dict(judge._known)
    assert found.plan.points and judge(done.model).us == pytest.approx(found.price.us, rel=1e-6)
    assert judge._known == known
    assert judge(network(batch=4, size=8, replaced={"w6": np.ones((48, 128, 1, 1), np.float32)})).us > 0
    assert len(judge._known) == len(known) + 1


def test_several_gpus_of_targets_that_rtx_lacks() -> None:
    model = network()
    both = pricer(model, target=["sm80", "sm90"], gpu=["a100", "h100"])
    price = both(model)
    alone = [pricer(model, target=gpu.target, gpu=gpu.name)(model).us for gpu in both.gpus]
    assert price.us == pytest.approx(sum(alone) / 2) and price.each == pytest.approx(tuple(alone))
    assert "for sm80 in the place of sm90" in both.told[1].notes[0]


def test_what_rtx_refuses_for_turing_is_compiled_for_ampere() -> None:
    tensors = {"w": normal(256, 512, seed=0), "w2": normal(512, 256, seed=1)}
    nodes = [node("MatMul", "x w", "a", "first"), node("Relu", "a", "r"), node("MatMul", "r w2", "y", "second")]
    model = build(nodes, {"x": (64, 256)}, tensors)
    judges = {kind: pricer(model, target="sm75", gpu="t4", unquantized_type=kind) for kind in ("fp16", "fp32")}
    found = {kind: find_plan(model, judge, samples=None) for kind, judge in judges.items()}
    assert all(math.isfinite(f.price.us) for f in found.values()) and found["fp32"].plain > found["fp16"].plain
    said = {kind: judge.told[0].notes[0] for kind, judge in judges.items()}
    assert "sm80 in the place of sm75, where it refuses the model" in said["fp32"] and "sm75" not in said["fp16"]
    det = build([node("Det", "x", "y", "det")], {"x": (1, 4, 4)}, {})
    with pytest.raises(BuildError):
        find_plan(det, pricer(det, target="sm75", gpu="t4"), samples=None)


def depthwise() -> Model:
    """Between two 1x1 convolutions a depthwise one of 96 channels."""
    tensors = {"w0": normal(96, 32, 1, 1), "w1": normal(96, 1, 3, 3), "w2": normal(32, 96, 1, 1)}
    nodes = [
        node("Conv", "x w0", "a", "wide"),
        node("Conv", "a w1", "b", "apart", pads=[1] * 4, group=96),
        node("Conv", "b w2", "y", "narrow"),
    ]
    return build(nodes, {"x": (8, 32, 56, 56)}, tensors)


def test_a_depthwise_convolution_costs_turing_no_channels_of_zeros() -> None:
    """TensorRT-RTX makes eight channels of each one for sm75, and copies them first; TensorRT does not."""
    model = depthwise()
    t4 = pricer(model, target="sm75", gpu="t4", unquantized_type="fp16")
    half = convert(model, split_biases=False).model
    price = t4(half)
    assert "sm80 in the place of sm75" in t4.told[0].notes[0] and "convolutions" in t4.told[0].notes[0]
    (kernel,) = [k for k in price.kernels if "apart" in k.nodes]
    carried = 2 * 8 * 96 * 56 * 56 * 2  # read and written once, in float16
    assert kernel.bytes == pytest.approx(carried, rel=0.05)
    plain = convert(network(size=8), split_biases=False).model
    other = pricer(plain, target="sm75", gpu="t4", unquantized_type="fp16")
    assert math.isfinite(other(plain).us) and "sm75" not in other.told[0].notes[0]


def test_what_is_not_known_is_refused() -> None:
    model = network(size=8, batch=1)
    recipe = Recipe.from_mapping({"compiler": "tensorrt", "target": "sm89", "scheme": "fp8"})
    assert pricer_of(recipe, {}) is None and "not of the scheme fp8" in unpriced(recipe)
    made = quantize(model, samples(model, 2), settings=recipe.settings)
    refused = pricer(model)(finish(made.model, made.plan, unquantized_type="fp16", table=made.table).model)
    assert refused.us == math.inf and "INT8 products only" in refused.refusal
    det = build([node("Det", "x", "y", "det")], {"x": (1, 4, 4)}, {})
    with pytest.raises(BuildError):
        find_plan(det, pricer(det), samples=None)


def test_the_other_compiler_is_said() -> None:
    model = network()
    said = elsewhere(model, pricer(model))
    assert "with TensorRT-RTX: INT8 wherever it is possible is predicted" in said and said.endswith(": --compiler rtx")
    recipe = Recipe.from_mapping({"compiler": "rtx", "target": "sm80", "gpu": "a100"})
    shapes = {i.name: ShapeRange.fixed([int(d) for d in i.shape or ()]) for i in model.inputs}
    other = pricer_of(recipe, shapes)
    assert other is not None
    found = find_plan(model, pricer(model, unquantized_type="fp16"), samples=None)
    count, ratio = len(found.plan.quantized_nodes), found.price.us / found.plain
    wanted = f"with TensorRT 11: {count} nodes in INT8, predicted {ratio:.2f} of FP16: --compiler tensorrt"
    assert elsewhere(model, other) == wanted
    lacking = pricer(model, target="sm90", gpu="h100")
    assert elsewhere(model, lacking) == "with TensorRT-RTX: it has no such target as sm90"
