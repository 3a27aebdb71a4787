"""A tie is no reason to quantize: what gains nothing is given back, and how sure a choice is, is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import yaml
from graphs import build, node, normal, samples
from onnx import TensorProto

from engines.cost.gpus import gpu_named
from qdq.build.cost import TIE, TIE_US, Kernel, Price
from qdq.build.pricing.pricer import gpus_of
from qdq.build.recipe import Recipe
from qdq.model.model import Model
from qdq.plan.settings import Settings
from qdq.tune.decision import decided
from qdq.tune.search import tune
from qdq.tune.tuned import Tuned, TuningOutcome
from qdq.tune.variant_builder import Variant, VariantBuilder

Microseconds = Callable[[str, bool, bool], float]  # of a node: its name, quantized, in a model with FP16 weights


class Judge:
    """Prices products by a function; Q, DQ and all others are free."""

    width = 1

    def __init__(self, us: Microseconds, *, other: Microseconds | None = None, error: float | None = None) -> None:
        self.us, self.other, self.error = us, other, error

    def many(self, models: Sequence[Model]) -> list[Price]:
        return [self.price(model) for model in models]

    def price(self, model: Model) -> Price:
        other = self._price(model, self.other) if self.other else None
        price = self._price(model, self.us)
        return Price(us=price.us, kernels=price.kernels, error=0.5, ratio_error=self.error, other=other)

    def _price(self, model: Model, us: Microseconds) -> Price:
        kernels, half = [], any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)
        for each in model.graph.node:
            if each.op_type in ("Conv", "MatMul", "Gemm"):
                source = model.producer(each.input[0])
                quantized = source is not None and source.op_type == "DequantizeLinear"
                kind = f"{each.name} {'int8' if quantized else half}"
                cost = us(each.name, quantized, half)
                kernels.append(Kernel(us=cost, macs=100, bytes=10, nodes=(each.name,), signature=kind))
        return Price(us=math.fsum(k.us for k in kernels), kernels=tuple(kernels))


def detector() -> Model:
    """x -> two convolutions -> a head of two."""
    tensors = {name: normal(8, 8, 3, 3, seed=i) for i, name in enumerate(("v", "w", "h"))}
    tensors["g"] = normal(4, 8, 1, 1, seed=7)
    nodes = [
        node("Conv", "x v", "a", "body_0", pads=[1] * 4),
        node("Relu", "a", "b"),
        node("Conv", "b w", "c", "body_1", pads=[1] * 4, strides=[2, 2]),
        node("Relu", "c", "d"),
        node("Conv", "d h", "e", "head_0", pads=[1] * 4),
        node("Sigmoid", "e", "f"),
        node("Conv", "f g", "y", "head_1"),
    ]
    return build(nodes, {"x": (1, 8, 8, 8)}, tensors)


def found(us: Microseconds, *, model: Model | None = None, types: str = "fp32", gpu: str = "", **more: object) -> Tuned:
    """What the search makes of a network whose products take so long."""
    model = model or detector()
    work = VariantBuilder(
        model=model, settings=Settings(), unquantized_types=tuple(types.split()), samples=samples(model, 2)
    )
    placement = bool(more.pop("placement", True))
    return tune(work, Judge(us, **more), placement=placement)  # type: ignore[arg-type]


def price(*us: float, same: int = 0) -> Price:
    """Of kernels that take so long; the first `same` are those of every such price."""
    kernels = [
        Kernel(us=u, macs=1, bytes=1, nodes=(), signature=str(i) if i < same else f"{i} {us}") for i, u in enumerate(us)
    ]
    return Price(us=math.fsum(us), kernels=tuple(kernels))


@pytest.mark.parametrize(
    ("before", "after", "ties"),
    [
        (price(1000), price(1000 - 1000 * TIE), True),
        (price(1000), price(985), False),
        (price(5), price(5 - TIE_US), True),  # both are the start of a kernel
        (price(5), price(3.5), False),
        (price(1000, 100, same=1), price(1000, 98.5, same=1), False),  # what both have does not count
        (price(1000, 100, same=1), price(1000, 99.5, same=1), True),
        (price(5), Price(us=math.inf), False),
    ],
)
def test_what_a_tie_is(before: Price, after: Price, ties: bool) -> None:
    assert before.ties(after) == after.ties(before) == ties
    assert after.gains_on(before) == (not ties and after.us < before.us)
    assert not before.gains_on(after) or after.us > before.us


def test_a_network_that_gains_nothing_stays_in_float() -> None:
    tuned = found(lambda name, quantized, _: 9.8 if quantized else 10.0)  # 0.8 of 40 us: under a tie
    assert not tuned.plan.points and tuned.price.us == 40
    assert tuned.decision.verdict == "tie" and not tuned.decision.chosen
    (said,) = tuned.said([gpu_named("l4")])
    assert "INT8 is predicted to gain nothing" in said and "left in float, which is more exact" in said


def test_a_head_that_gains_nothing_is_given_back() -> None:
    tuned = found(lambda name, quantized, _: 4.0 if quantized and "body" in name else 10.0)
    assert tuned.variant.quantized == {"body_0", "body_1"} and tuned.price.us == 28
    pays = found(lambda name, quantized, _: 4.0 if quantized else 10.0)
    assert pays.variant.quantized == {"body_0", "body_1", "head_0", "head_1"}


def test_what_starts_quantized_is_given_back_though_too_small_to_be_searched() -> None:
    cheap = {"head_0": 2.0, "head_1": 2.0}  # together under 1 % of the time
    tuned = found(lambda name, quantized, _: cheap.get(name, 200.0 if quantized else 500.0))
    assert tuned.variant.quantized == {"body_0", "body_1"} and tuned.price.us == 404
    assert any("gains nothing" in step for step in tuned.steps)


def test_each_gain_below_a_tie_is_no_tie_if_there_are_many() -> None:
    tensors = {f"w{i}": normal(8, 8, 3, 3, seed=i) for i in range(6)}
    ends = ["x", *(f"a{i}" for i in range(5)), "y"]
    nodes = [node("Conv", f"{ends[i]} w{i}", ends[i + 1], f"c{i}", pads=[1] * 4) for i in range(6)]
    model = build(nodes, {"x": (1, 8, 8, 8)}, tensors)
    tuned = found(lambda name, quantized, _: 9.1 if quantized else 10.0, model=model)  # 0.9 us each: a tie alone
    assert tuned.price.us <= 54.6 + TIE_US and len(tuned.variant.quantized) >= 5


@pytest.mark.parametrize("us", [9.6, 9.65, 9.7])  # each less than a tie, all together more than one
def test_what_gains_on_float_is_not_given_back_in_parts(us: float) -> None:
    tuned = found(lambda name, quantized, _: us if quantized else 10.0)
    assert tuned.price.us < 40 - TIE_US and tuned.price.us <= 4 * us + TIE_US
    assert tuned.decision.chosen and tuned.decision.verdict != "tie"


def test_coarser_codes_that_gain_nothing_are_given_back() -> None:
    tuned = found(lambda name, quantized, _: 4.0 if quantized else 10.0)
    assert not tuned.variant.per_tensor and not tuned.variant.unshifted and not tuned.variant.float_shortcuts


def test_between_float_types_of_equal_time_the_smaller_is_taken() -> None:
    tuned = found(lambda name, quantized, half: 12.0 if quantized else 10.1 if half else 10.0, types="fp16 fp32")
    assert tuned.plan.unquantized_type == "fp16" and not tuned.plan.points
    faster = found(lambda name, quantized, half: 12.0 if quantized else 10.5 if half else 10.0, types="fp16 fp32")
    assert faster.plan.unquantized_type == "fp32"


def test_between_float_types_of_equal_time_one_that_is_poor_is_not_taken() -> None:
    nodes = [
        node("Conv", "x w", "a", "conv", pads=[1] * 4),
        node("Sub", "a big", "b"),
        node("Add", "b big", "c"),
        node("Conv", "c v", "y", "conv_1"),
    ]  # in FP16 a + big loses what a is
    tensors = {
        "w": normal(8, 8, 3, 3),
        "v": normal(8, 8, 1, 1),
        "big": np.full((1, 8, 1, 1), 4096, dtype=np.float32),
    }
    model = build(nodes, {"x": (1, 8, 8, 8)}, tensors)
    assert found(lambda name, quantized, _: 12.0, model=model, types="fp16").plan.unquantized_type == "fp16"
    tuned = found(lambda name, quantized, _: 12.0, model=model, types="fp16 fp32")
    assert tuned.plan.unquantized_type == "fp32" and any("are poor" in step for step in tuned.steps)


@pytest.mark.parametrize("fp32", [10.0, 20.0])  # as fast as FP16, or slower
def test_a_float_type_below_the_bound_is_not_taken(fp32: float) -> None:
    work = VariantBuilder(
        model=detector(), settings=Settings(), unquantized_types=("fp16", "fp32"), samples=samples(detector(), 2)
    )
    rounding = work.rounding_db(Variant()) or 0.0
    for bound, kind in ((rounding - 3, "fp16"), (rounding + 3, "fp32")):
        judge = Judge(us := lambda name, quantized, half: 30.0 if quantized else 10.0 if half else fp32, other=us)
        tuned = tune(work, judge, min_sqnr_db=bound, measure=lambda plan: 0.0)
        assert tuned.plan.unquantized_type == kind == tuned.unquantized.unquantized_type and not tuned.plan.points
        assert tuned.decision.other is not None and not tuned.decision.other.changes


def test_without_placement_nothing_is_given_back_and_that_is_said() -> None:
    tuned = found(lambda name, quantized, _: 10.0, placement=False)
    assert len(tuned.plan.quantized_nodes) == 4 and tuned.decision.verdict == "tie"
    assert "quantized all the same, as was asked" in tuned.said([gpu_named("l4")])[0]
    slower = found(lambda name, quantized, _: 15.0 if quantized else 10.0, placement=False, error=0.1)
    assert "INT8 is predicted 50% slower than float" in slower.said([gpu_named("l4")])[0]


@pytest.mark.parametrize(
    ("int8", "error", "verdict", "words"),
    [
        (
            8.0,
            0.3,
            "within the error",
            "whether INT8 is faster than float (32.0 us, 40.0 in float) only a measurement can tell: the difference is "
            "within the error, for two of three published ratios are predicted within 30%",
        ),
        (7.0, 0.2, "beyond the error", "30% faster than float (28.0 us, 40.0 in float), which is more than the error"),
        (7.0, None, "within the error", "two of three published ratios are predicted within 50%"),
        (
            12.0,
            0.3,
            "within the error",
            "whether the fastest form with INT8 is faster than float (42.0 us, 40.0 in float) only a measurement",
        ),
    ],
)
def test_a_decision_says_how_sure_it_is(int8: float, error: float | None, verdict: str, words: str) -> None:
    tuned = found(lambda name, quantized, _: int8 if quantized else 10.0, error=error)
    assert tuned.decision.verdict == verdict and tuned.decision.error == (error or 0.5)
    assert tuned.decision.time_error == 0.5
    assert words in tuned.said([gpu_named("l4")])[0]
    assert tuned.outcome([]).times.endswith("; within 50%")
    assert ("0.70 of the fastest" in (gain := tuned.outcome([]).gain)) == (verdict == "beyond the error")
    assert ("equal within the error to the fastest float form (40.0)" in gain) == (
        int8 < 10 and "within the" in verdict
    )
    outcome = tuned.outcome([gpu_named("l4")])
    assert outcome.label == "predicted on l4"
    two = [gpu_named("l4"), gpu_named("t4")]
    assert tuned.outcome(two).label == "predicted on l4, t4, the mean" and not tuned.outcome(two).gains
    priced = replace(tuned, price=replace(tuned.price, each=(20.0, 36.0)))
    floating = replace(tuned.unquantized_price, each=(30.0, 50.0))
    on_each = replace(priced, unquantized_price=floating).outcome(two)
    quantized = ["20.0 us on l4, 0.67 of the float form (30.0)", "36.0 us on t4, 0.72 of the float form (50.0)"]
    assert on_each.gains == (quantized if on_each.quantized_nodes else ["20.0 us on l4", "36.0 us on t4"])
    assert TuningOutcome.from_json(on_each.to_json()) == on_each and not outcome.gains
    assert TuningOutcome.from_json(outcome.to_json()) == outcome
    assert outcome.decision == tuned.decision and outcome.said == tuple(tuned.said([gpu_named("l4")]))


def test_an_error_that_is_not_known_is_said() -> None:
    prices = {Variant(): Price(us=100), Variant(quantized=frozenset("a")): Price(us=70)}
    done = decided(prices, Variant(quantized=frozenset("a")), Variant(), accurate=lambda _: True, placement=True)
    assert done.verdict == "error unknown" and done.error is done.time_error is None
    assert "30% faster than float (70.0 us, 100.0 in float); how far off" in done.sentences("INT8", [])[0]


def test_a_float_target_is_called_so() -> None:
    tuned = found(lambda name, quantized, _: 10.0)
    assert any("sm75 is a float target" in said for said in tuned.said([gpu_named("t4")]))


def test_both_answers_where_the_accumulation_decides() -> None:
    geforce = [gpu_named("rtx4090")]
    tuned = found(
        lambda name, quantized, _: 9.9 if quantized else 10.0, other=lambda name, quantized, _: 9.9 if quantized else 20
    )
    other = tuned.decision.other
    assert not tuned.plan.points and other is not None and other.changes
    assert other.quantized_nodes == 4 and (other.best_us, other.unquantized_us) == (39.6, 80)
    said = tuned.said(geforce)[1]
    assert "assumed to accumulate in FP16 on rtx4090; if in FP32, another choice is better: 4 nodes in INT8, " in said
    assert "INT8, predicted 39.6 us; what was chosen is predicted to take 80.0 us, 80.0 in float" in said
    advised = yaml.safe_load(said.partition("`")[2].partition("`")[0])  # as the sentence writes it
    assert gpus_of(Recipe.from_mapping(advised)) == (geforce[0].other_accumulation(),)
    same = found(
        lambda name, quantized, _: 5.0 if quantized else 10.0, other=lambda name, quantized, _: 5.0 if quantized else 20
    )
    assert same.decision.other is not None and not same.decision.other.changes
    assert "if in FP32, the choice is the same (predicted 20.0 us, 80.0 in float)" in same.said(geforce)[1]
    back = found(
        lambda name, quantized, _: 5.0 if quantized else 10.0, other=lambda name, quantized, _: 5.0 if quantized else 3
    )
    assert back.decision.other is not None and back.decision.other.changes
    assert "another choice is better: nothing in INT8" in back.said(geforce)[1]


def test_a_float_type_that_does_not_compile_is_said() -> None:
    words = "no kernel\n for body_1" + " of many" * 50

    class Refusing(Judge):
        def price(self, model: Model) -> Price:
            half = any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)
            return Price(us=math.inf, refusal=words) if half else super().price(model)

    model = detector()
    work = VariantBuilder(
        model=model, settings=Settings(), unquantized_types=("fp16", "fp32"), samples=samples(model, 2)
    )
    tuned = tune(work, Refusing(lambda name, quantized, _: 10.0))
    assert tuned.plan.unquantized_type == "fp32" and tuned.refused.keys() == {"fp16"}
    (said,) = (said for said in tuned.said([gpu_named("l4")]) if "FP16" in said)
    assert said.startswith("the FP16 model does not compile: no kernel for body_1 of many")
    assert said.endswith((" of ...", " many ...")) and len(said) < 350
    assert tuned.outcome([]).refused == tuned.refused
