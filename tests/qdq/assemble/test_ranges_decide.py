"""What measured magnitudes decide: what overflows or loses what matters stays FP32, what was feared in vain does not.

Outputs are those of onnx's reference evaluator, which rounds every FP16 tensor as hardware does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from graphs import build, node, normal
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from engines.core import arithmetic
from qdq.assemble.precision.convert import Converted, convert
from qdq.assemble.quantize import quantize
from qdq.measure.collect import collect
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings

Sample = dict[str, np.ndarray]
W = normal(16, 16) / 4


def measured(model: Model, data: Sequence[Sample], low: str = "fp16", **options: bool) -> Converted:
    table = collect(model, placement.plan(model, Settings(exclude=("*",))), data)
    made = convert(model, unquantized_type=low, table=table, **options)
    onnx.checker.check_model(made.model.proto, full_check=True)
    return made


def rules(made: Converted) -> dict[str, str]:
    return {s.node: s.rule for s in made.kept}


def sqnr_db(model: Model, made: Converted, sample: Sample) -> float:
    """Of the first output, computed in true FP16."""
    with np.errstate(all="ignore"):
        want, got = (ReferenceEvaluator(m.proto).run(None, sample)[0].astype(np.float64) for m in (model, made.model))
    error = float(np.sum((want - got) ** 2))
    return 10 * float(np.log10(np.sum(want**2) / max(error, 1e-300))) if np.isfinite(error) else -np.inf


def pointwise(*nodes: onnx.NodeProto, shape: Sequence[int | str] = (4, 16), **tensors: np.ndarray) -> Model:
    return build(list(nodes), {"x": shape}, tensors)


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def test_what_overflows_inside_stays_float32_and_the_rest_does_not() -> None:
    nodes = [
        node("MatMul", "x w", "a", "first"),
        node("Mul", "a large", "b", "grow"),
        node("LayerNormalization", "b one", "n", "norm"),
        node("MatMul", "n w", "y", "last"),
    ]
    model = pointwise(*nodes, w=W, large=number(1e5), one=np.ones(16, np.float32))
    sample = {"x": normal(4, 16)}
    made = measured(model, [sample])
    assert rules(made) == {"grow": "range", "norm": "wide"} and sqnr_db(model, made, sample) > 50
    quiet = pointwise(*nodes, w=W, large=number(3e4), one=np.ones(16, np.float32))  # the constant fits, the product not
    made = measured(quiet, [sample])
    assert rules(made) == {"grow": "range", "norm": "wide"} and sqnr_db(quiet, made, sample) > 50
    assert sqnr_db(quiet, convert(quiet), sample) < 0  # nothing measured: rules do not see it


@pytest.mark.parametrize("keep_io", [True, False])
def test_a_graph_input_beyond_the_type_is_read_in_float32(keep_io: bool) -> None:
    nodes = [node("LayerNormalization", "x one", "n", "norm"), node("MatMul", "n w", "y", "last")]
    model = pointwise(*nodes, one=np.ones(16, np.float32), w=W)
    sample = {"x": normal(4, 16) * 1e5}
    made = measured(model, [sample], keep_io=keep_io)
    assert rules(made) == {"norm": "wide"} and made.model.inputs[0].dtype == "float32"
    assert sqnr_db(model, made, sample) > 50
    assert measured(model, [{"x": normal(4, 16)}], keep_io=False).model.inputs[0].dtype == "float16"


def test_an_input_too_small_for_the_type_is_read_in_float32() -> None:
    model = pointwise(node("Mul", "x c", "a", "grow"), node("MatMul", "a w", "y", "last"), c=number(2e4), w=W)
    sample = {"x": normal(4, 16) * 1e-6}
    made = measured(model, [sample])
    assert rules(made)["grow"] == "wide" and sqnr_db(model, made, sample) > 50


@pytest.mark.parametrize("low", ["fp16", "bf16"])
@pytest.mark.parametrize("end", ["sin", "floor", "equal", "index", "angle"])
def test_positions_that_come_as_floats_stay_exact(end: str, low: str) -> None:
    behind = {
        "sin": [node("Mul", "x f", "p"), node("Sin", "p", "e")],
        "floor": [node("Div", "x f", "p"), node("Floor", "p", "e")],
        "equal": [node("Sub", "x f", "p"), node("Greater", "p f", "b"), node("Cast", "b", "e", to=TensorProto.FLOAT)],
        "index": [
            node("Abs", "x", "p"),
            node("Cast", "p", "i", "to_int", to=TensorProto.INT64),
            node("Gather", "t i", "e"),
        ],
        "angle": [node("MatMul", "x wide", "p", "product"), node("Cos", "p", "e")],
    }[end]
    tensors = {"f": number(3), "w": W, "t": normal(5000), "wide": normal(16, 16)}
    read = {name for n in behind for name in n.input}
    model = pointwise(
        *behind, node("MatMul", "e w", "y", "last"), **{k: v for k, v in tensors.items() if k in read | {"w"}}
    )
    rng = np.random.default_rng(0)
    sample = {"x": rng.integers(2000, 4999, (4, 16)).astype(np.float32)}
    made = measured(model, [sample], low)
    kept = {name for name, rule in rules(made).items() if rule == "positions"}
    assert {n.name for n in behind if n.name != "gather"} - {"cast"} <= kept
    assert ("last" in rules(made)) == ((end, low) == ("floor", "bf16"))  # which holds no 1667
    if low == "fp16":
        assert sqnr_db(model, made, sample) > 50
    small = {"x": rng.integers(0, 2, (4, 16)).astype(np.float32)}
    assert not rules(measured(model, [small], low)).get("last")


def test_small_angles_are_no_positions() -> None:
    model = pointwise(node("MatMul", "x w", "a"), node("Sin", "a", "s"), node("MatMul", "s w", "y", "last"), w=W)
    assert measured(model, [{"x": normal(4, 16)}]).kept == ()


def test_epsilons_that_vanish_keep_what_they_are_for() -> None:
    norm = [node("LayerNormalization", "x one", "n", "norm", epsilon=1e-12), node("MatMul", "n w", "y", "last")]
    model = pointwise(*norm, one=np.ones(16, np.float32), w=W)
    assert rules(measured(model, [{"x": normal(4, 16)}])) == {"norm": "constant"}
    assert measured(model, [{"x": normal(4, 16)}], "bf16").kept == ()
    rows = [
        node("ReduceL2", "x axis", "l", "length"),
        node("Max", "l least", "m", "max"),
        node("Unsqueeze", "m axis", "u", "up"),
        node("Squeeze", "u axis", "v", "down"),
        node("Div", "x v", "n", "divide"),
        node("MatMul", "n w", "y", "last"),
    ]
    model = pointwise(*rows, axis=np.array([1], np.int64), least=number(1e-12), w=W)
    x = normal(4, 16)
    x[1] *= 1e-5  # a row whose squares vanish in FP16
    made = measured(model, [{"x": x}])
    assert rules(made).keys() == {"length", "max", "up", "down", "divide"} and sqnr_db(model, made, {"x": x}) > 30


@pytest.mark.parametrize("op", ["Div", "Log", "Sqrt"])
def test_a_small_element_of_a_larger_constant_counts_where_one_divides_by_it(op: str) -> None:
    c = np.linspace(0, 1, 16, dtype=np.float32)
    c[3], c[0] = 1e-9, 1
    read = [node("Div", "r c", "a", "use")] if op == "Div" else [node("Add", "r c", "b", "use"), node(op, "b", "a")]
    model = pointwise(node("Relu", "x", "r"), *read, node("Softplus", "a", "y", "last"), c=c)
    made = measured(model, [{"x": np.minimum(normal(4, 16), 0)}])
    assert rules(made)["use"] == "constant"
    plain = pointwise(
        node("MatMul", "x w", "m"), node("Add", "m c", "b", "use"), node("MatMul", "b w", "y", "last"), c=c, w=W
    )
    assert measured(plain, [{"x": normal(4, 16)}]).kept == ()  # nobody divides: what vanishes is nothing beside 1


def pooled(count: int) -> Model:
    nodes = [node("MatMul", "x w", "a"), node("ReduceMean", "a axes", "m", "mean"), node("MatMul", "m w", "y", "last")]
    return pointwise(*nodes, shape=("n", count, 16), w=W, axes=np.array([1], np.int64))


def test_a_sum_is_allowed_where_all_its_terms_together_fit() -> None:
    assert rules(convert(pooled(64)))["mean"] == "sum"  # nothing measured
    assert measured(pooled(64), [{"x": normal(1, 64, 16)}]).kept == ()
    made = measured(pooled(4096), [{"x": 30 + normal(1, 4096, 16)}])
    (kept,) = made.kept
    assert kept.node == "mean" and "sums may reach" in kept.reason
    assert measured(pooled(4096), [{"x": 30 + normal(1, 4096, 16)}], "bf16").kept == ()


def test_steps_of_a_normalization_stay_float32_however_small() -> None:
    nodes = [
        node("ReduceMean", "x axes", "mean", "mean"),
        node("Sub", "x mean", "d", "center"),
        node("Mul", "d d", "s", "square"),
        node("ReduceMean", "s axes", "v", "variance"),
        node("Add", "v eps", "ve", "add"),
        node("Sqrt", "ve", "r"),
        node("Div", "d r", "n"),
        node("MatMul", "n w", "y", "last"),
    ]
    model = pointwise(*nodes, axes=np.array([-1], np.int64), eps=number(1e-5), w=W)
    x = normal(4, 16)
    x[2] *= 1e-4
    made = measured(model, [{"x": x}])
    assert set(rules(made)) == {"mean", "center", "square", "variance", "add", "sqrt", "div"}
    assert sqnr_db(model, made, {"x": x}) > 50


def test_powers_and_exponentials_measured_small_are_allowed() -> None:
    gelu = [
        node("MatMul", "x w", "a"),
        node("Mul", "a a", "square", "square"),
        node("Mul", "square a", "cube", "cube"),
        node("Mul", "cube c", "k", "scale"),
        node("Tanh", "k", "t"),
        node("Exp", "t", "e"),
        node("MatMul", "e w", "y", "last"),
    ]
    model = pointwise(*gelu, w=W, c=number(0.04))
    sample = {"x": normal(4, 16)}
    assert convert(model).kept and measured(model, [sample]).kept == ()
    assert rules(measured(model, [{"x": normal(4, 16) * 100}]))["square"] == "range"


@pytest.mark.parametrize("form", ["added", "chosen", "computed"])
def test_a_mask_is_no_large_tensor(form: str) -> None:
    least = float(np.finfo(np.float32).min)
    mask = np.triu(np.full((16, 16), least, np.float32), 1)
    nodes = {
        "added": [node("Add", "s mask", "m", "masked")],
        "chosen": [node("Where", "hidden least s", "m", "masked")],
        "computed": [node("Mul", "ones least", "big", "big"), node("Add", "s big", "m", "masked")],
    }[form]
    ones = (
        [node("Greater", "s zero", "g"), node("Cast", "g", "ones", to=TensorProto.FLOAT)] if form == "computed" else []
    )
    tensors = {"mask": mask, "hidden": mask < 0, "least": number(least), "zero": number(0), "w": W}
    all_nodes = [
        node("MatMul", "x w", "s", "scores"),
        *ones,
        *nodes,
        node("Softmax", "m", "p"),
        node("MatMul", "p w", "y", "last"),
    ]
    read = {name for n in all_nodes for name in n.input}
    model = pointwise(*all_nodes, shape=(16, 16), **{k: v for k, v in tensors.items() if k in read})
    sample = {"x": normal(16, 16)}
    made = measured(model, [sample])
    assert not {"masked", "softmax", "big", "last"} & rules(made).keys()
    assert sqnr_db(model, made, sample) > 45


@pytest.mark.parametrize("reader", ["product", "logarithm", "nobody"])
def test_probabilities_of_many_positions_are_small_for_all_but_the_products_they_weigh(reader: str) -> None:
    nodes = [
        node("MatMul", "x keys", "s", "scores"),
        node("Softmax", "s", "p", "share"),
        node("Transpose", "p", "t", "turn", perm=[1, 0]),
        *{
            "product": [node("MatMul", "values t", "y", "mix")],
            "logarithm": [node("Log", "t", "l", "log"), node("MatMul", "values l", "y", "mix")],
            "nobody": [node("Identity", "t", "y", "same")],
        }[reader],
    ]
    tensors = {"keys": normal(16, 4096) / 100, "values": normal(16, 4096) + np.float32(0.5)}
    used = {n: v for n, v in tensors.items() if n == "keys" or reader != "nobody"}
    model, sample = build(nodes, {"x": (4, 16)}, used), {"x": normal(4, 16)}
    made = measured(model, [sample])  # no probability comes near 2^-10
    assert ("share" in rules(made)) == (reader != "product")
    if reader == "product":
        assert rules(made) == {} and sqnr_db(model, made, sample) > 50


def test_nothing_measured_leaves_the_rules_as_they_are() -> None:
    model = pooled(64)
    empty = collect(model, placement.plan(model, Settings(exclude=("*",))), [{"x": normal(1, 64, 16)}])
    from engines.core.documents import replace

    assert rules(convert(model, table=replace(empty, ranges={}))) == rules(convert(model))


def test_infinities_are_said() -> None:
    from qdq.assemble.finish import finish

    model = pointwise(
        node("Log", "x", "a", "log"), node("Max", "a zero", "b"), node("MatMul", "b w", "y"), zero=number(0), w=W
    )
    plan = placement.plan(model, Settings(exclude=("*",)))
    table = collect(model, plan, [{"x": np.zeros((4, 16), np.float32)}])
    notes = finish(model, plan, unquantized_type="fp16", table=table).notes
    assert "1 tensors of the float model hold infinities or NaN on the samples, 'a' for one" in notes


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
def test_codes_of_8_bit_floats_and_of_blocks_reach_further_than_integers(scheme: str) -> None:
    """9e4 is 448 steps of 201, or 6 steps of 448 steps of 33: each more than float16 holds, 128 steps are not."""
    rng = np.random.default_rng(0)
    model = pointwise(node("MatMul", "x w", "a", "first"), node("MatMul", "a w", "y", "last"), w=W / 20)
    data = [{"x": rng.uniform(-9e4, 9e4, (4, 16)).astype(np.float32)} for _ in range(3)]
    data[0]["x"][0, 0] = 9e4
    made = quantize(model, data, settings=Settings(scheme=scheme, equalize="none"))
    low = convert(made.model, unquantized_type="fp16", table=made.table)
    assert {"first", "last"} & set(rules(low)) == {"first"}
    (got,), (want,) = (arithmetic.session(m.proto).run(None, data[0]) for m in (low.model, made.model))
    assert np.isfinite(got).all() and np.abs(got - want).max() < 0.01 * np.abs(want).max()
