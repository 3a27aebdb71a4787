"""A plan that mixes precisions is an ordinary plan: read back, edited, calibrated once, solved, written, explained."""

from __future__ import annotations

from pathlib import Path

import graphs
import onnx
import pytest
from graphs import build, node, normal

from engines.backends import rtx
from engines.core.documents import replace
from engines.verify.audit import audit
from qdq.assemble.finish import finish
from qdq.assemble.held_out import HeldOutScore, Split
from qdq.assemble.quantize import quantize
from qdq.core.errors import InputError
from qdq.lint.lint import lint
from qdq.measure.collect import collect
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.plan import placement
from qdq.plan.choice import choice
from qdq.plan.groups import groups, together, united
from qdq.plan.plan import Plan
from qdq.plan.scheme import SCHEMES
from qdq.plan.settings import Settings

CHOICES = ("int8", "int8:shift=off", "int8-weight", "int4:block=32", "w4a8", "fptq", "fp8", "nvfp4", "float", "fp32")
PAIRS = [(one, CHOICES[(i + step) % len(CHOICES)]) for i, one in enumerate(CHOICES) for step in (1, 3)]


def network() -> Model:
    """Conv, then tokens: three products of one tensor, a sum of two of them, two products in a row."""
    nodes = [
        node("Conv", "image w0", "c", name="conv", pads=[1, 1, 1, 1]),
        node("Relu", "c", "r", name="relu"),
        node("Flatten", "r", "f", name="flat", axis=2),
        node("MatMul", "f wq", "q", name="q"),
        node("MatMul", "f wk", "k", name="k"),
        node("MatMul", "f wv", "v", name="v"),
        node("Add", "q k", "s", name="sum"),
        node("Sigmoid", "s", "g", name="gate"),
        node("Mul", "g v", "m", name="gated"),
        node("MatMul", "m w1", "h", name="up"),
        node("Relu", "h", "hr", name="hidden"),
        node("MatMul", "hr w2", "y", name="down"),
    ]
    weights = {name: normal(64, 64, seed=i) / 8 for i, name in enumerate(("wq", "wk", "wv"))}
    weights |= {
        "w0": normal(8, 4, 3, 3, seed=4) / 6,
        "w1": normal(64, 128, seed=5) / 8,
        "w2": normal(128, 64, seed=6) / 11,
    }
    return load_float(build(nodes, {"image": (1, 4, 8, 8)}, weights).proto)


def settings(**overrides: str) -> Settings:
    return Settings(overrides=overrides, calibrator="mse", bias_correction="off", rounding="nearest", equalize="none")


@pytest.fixture(scope="module")
def table() -> CalibrationTable:
    """Of every tensor that any scheme quantizes."""
    model = network()
    union = together([placement.plan(model, Settings(scheme=name)) for name in SCHEMES])
    union.check(model)
    return collect(model, union, graphs.samples(model, 3))


def test_what_must_share_a_precision_is_one_group() -> None:
    model = network()
    found = groups(model, placement.plan(model, Settings()))
    assert [group.nodes for group in found] == [("conv",), ("q", "k", "v"), ("up",), ("down",)]
    assert found[1].name == "q"


def test_where_kernels_write_codes_both_sides_of_a_sum_are_one_group() -> None:
    nodes = [
        node("Conv", "x w0", "a", name="enter"),
        node("Relu", "a", "b", name="relu"),
        node("Conv", "b w1", "c", name="left", pads=[1, 1, 1, 1]),
        node("Relu", "c", "d", name="relu1"),
        node("Conv", "d w2", "e", name="main", pads=[1, 1, 1, 1]),
        node("Conv", "b w3", "f", name="side"),
        node("Add", "e f", "g", name="sum"),
        node("Conv", "g w4", "y", name="exit"),
    ]
    weights = {f"w{i}": normal(32, 32, *(size, size), seed=i) for i, size in enumerate((1, 3, 3, 1, 1))}
    model = build(nodes, {"x": (1, 32, 8, 8)}, weights)
    found = {c: groups(model, placement.plan(model, Settings(compiler=c))) for c in ("rtx", "tensorrt")}
    assert [g.nodes for g in found["rtx"]] == [("enter",), ("left", "side"), ("main",), ("exit",)]
    assert [g.nodes for g in found["tensorrt"]] == [("enter",), ("left", "main", "side"), ("exit",)]


def test_one_weight_read_twice_is_one_group() -> None:
    nodes = [node("MatMul", "x w", "a", name="one"), node("Relu", "a", "r"), node("MatMul", "r w", "y", name="two")]
    model = build(nodes, {"x": (5, 64)}, {"w": normal(64, 64)})
    assert [g.nodes for g in groups(model, placement.plan(model, Settings()))] == [("one", "two")]


def test_united_takes_the_first_of_each_chain() -> None:
    assert united("abcde", ["ed", "da", "cx"]) == {"a": "a", "b": "b", "c": "c", "d": "a", "e": "a"}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_one_table_serves_every_mixed_plan(pair: tuple[str, str], table: CalibrationTable, tmp_path: Path) -> None:
    model, (one, other) = network(), pair
    data = graphs.samples(model, 3)
    plan = placement.plan(model, settings(**{"[qkvc]*": one, "up": other, "down": one}))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    made = quantize(model, data, plan=plan, table=table)
    done = finish(made.model, made.plan, unquantized_type="auto", table=table)
    onnx.checker.check_model(done.model.proto if "nvfp4" not in pair else made.prepared.proto, full_check=True)
    for name, text in {"q": one, "up": other}.items():
        row = choice(text).row
        formats = {p.spec.format for p in plan.points for n, _ in p.uses if n == name}
        wanted = {f for f in (row.data, row.weight) if f} if choice(text).quantizes else set()
        assert formats == wanted
        assert "\n".join(plan.explain(name)).startswith(f"{name}: quantized" if wanted else f"{name} (MatMul): float")
    held = Split(samples=data, fit=(), held=frozenset(range(3)))
    assert HeldOutScore(model, held).sqnr_db(made.model) > 8


def test_a_node_that_the_plan_wants_in_fp32_stays_so_where_the_others_are_fp16() -> None:
    model = network()
    data = graphs.samples(model, 2)
    plan = placement.plan(model, settings(up="fp32", gate="fp32", down="float"))
    assert plan.in_fp32 == {"up", "gate"}
    made = quantize(model, data, plan=plan)
    done = finish(made.model, plan, unquantized_type="fp16", table=made.table)
    assert any("as the plan asks" in text for text in done.notes)
    whole = done.model
    kinds = {name: whole.dtype(whole.node(name).input[0]) for name in ("up", "gate", "down")}
    assert kinds == {"up": "float32", "gate": "float32", "down": "float16"}
    edited = replace(plan, skips=tuple(replace(s, rule="asked") if s.node == "up" else s for s in plan.skips))
    done = finish(made.model, edited, unquantized_type="fp16", table=made.table)
    assert done.model.dtype(done.model.node("up").input[0]) == "float16"


def test_an_edited_point_changes_its_node_alone() -> None:
    model = network()
    data = graphs.samples(model, 2)
    plan = placement.plan(model, settings(up="w4a8"))
    points = tuple(
        replace(p, spec=replace(p.spec, block=16)) if p.spec.block and p.tensor == "w1" else p for p in plan.points
    )
    made = quantize(model, data, plan=replace(plan, points=points))
    assert {key[0]: q.params.block for key, q in made.solution.weights.items() if q.params.block} == {"w1": 16}


def test_a_mixed_plan_compiles_to_kernels_of_each_precision() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    model = network()
    data = graphs.samples(model, 2)
    plan = placement.plan(model, settings(**{"[qkv]": "fp8", "up": "w4a8", "down": "int8", "conv": "fp32"}))
    made = quantize(model, data, plan=plan)
    done = finish(made.model, plan, unquantized_type="fp16", table=made.table)
    assert not [f for f in lint(done.model) if f.severity == "error"]
    engine = rtx.build(done.model.proto, targets=["sm89"])
    found = {row.node: row.consumed for row in audit(done.model.proto, engine.table).nodes}
    assert {name: found[name] for name in ("q", "up", "down", "conv")} == {
        "q": "fp8", "up": "int8", "down": "int8", "conv": "float32",
    }  # fmt: skip


def test_the_settings_of_a_mix_are_chosen_from_what_its_schemes_have() -> None:
    assert Settings(overrides={"*": "int4"}).options("rounding") == ("descent", "clip", "nearest")
    assert Settings(overrides={"*": "int4"}).options("equalize") == ("smoothquant", "validated", "awq", "sinq", "none")
    assert Settings(overrides={"*": "float"}).label == "int8" and Settings(overrides={"*": "fp8"}).label == "mixed"
    assert Settings(overrides={"*": "fp32"}).formats == {"int8"}
    assert Settings(overrides={"*": "int4:block=32"}).of("x").block == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int44", "Did you mean 'int4'"),
        ("int4:blok=3", "Unknown option of int4 'blok'"),
        ("int4:block", "an option is KEY=VALUE"),
        ("int4:block=33", "block is 33"),
        ("int4:block=32:block=16", "once each"),
        ("float:block=32", "neither block nor shift"),
        ("int8:shift=maybe", "Unknown shift 'maybe'"),
        ("w4a8:block=channel", "multiplies 4-bit weights through blocks"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(overrides={"*": text})
