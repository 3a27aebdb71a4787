"""Which tables a Gather reads become codes, which stay float and why, and which product has the same values."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from decoder_graphs import ROWS, WIDTH, llama, lookup
from graphs import normal
from onnx import TensorProto, helper, numpy_helper

from engines.core.documents import replace
from qdq.core.errors import InputError
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import prepare
from qdq.plan import placement, tables
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings


def planned(model: Model, **settings: object) -> Plan:
    plan = placement.plan(model, Settings(embeddings="int8", **settings))  # type: ignore[arg-type]
    plan.check(model)
    return plan


def why(plan: Plan, node: str = "read") -> str:
    return next((s.reason for s in plan.skips if s.node == node), "")


def test_float_is_the_default_and_the_reason_names_the_option() -> None:
    plan = placement.plan(lookup(), Settings())
    assert not plan.tables
    assert why(plan) == "a table of 600 x 128, in float: embeddings int8 or int4 stores it smaller"


def test_each_row_has_a_scale_and_the_plan_says_so() -> None:
    plan = planned(lookup())
    (point,) = plan.tables
    assert (point.tensor, point.role, point.spec.format, point.spec.axis) == ("table", "table", "int8", 0)
    assert point.consumers == ("read:0",)
    assert plan.explain("read") == [
        "read: reads a table of codes",
        "  table 'table': int8 per channel on axis 0, weight only, rule 'embeddings'",
    ]
    assert not why(plan) and Plan.from_json(plan.to_json()) == plan


def test_int4_takes_blocks_that_divide_a_row_else_int8() -> None:
    (four,) = placement.plan(lookup(), Settings(embeddings="int4")).tables
    assert four.spec.format == "int4" and four.spec.axis == 1 and 128 % (four.spec.block or 0) == 0
    (asked,) = placement.plan(lookup(), Settings(embeddings="int4", block=64)).tables
    assert asked.spec.block == 64 and not asked.reason
    (shorter,) = placement.plan(lookup(width=192), Settings(embeddings="int4", block=128)).tables
    assert shorter.spec.block in (16, 32, 64) and shorter.reason == "blocks of 128 do not divide its 192 columns"
    (eight,) = placement.plan(lookup(width=120), Settings(embeddings="int4")).tables
    assert eight.spec.format == "int8" and eight.reason == "int8: blocks of int4 do not divide its 120 columns"


def test_columns_have_no_scale() -> None:
    node = helper.make_node
    graph = helper.make_graph(
        [node("Gather", ["table", "ids"], ["x"], "read", axis=1), node("MatMul", ["x", "w"], ["y"], "layer")],
        "columns",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(normal(WIDTH, ROWS), "table"), numpy_helper.from_array(normal(4, 8), "w")],
    )
    model = prepare(load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)))
    assert "its columns are read" in why(planned(model))


def test_two_gathers_share_a_table_and_stay_together() -> None:
    model = lookup(second=True)
    (point,) = planned(model).tables
    assert point.consumers == ("read:0", "again:0")
    left = planned(model, exclude=("again",))
    assert not left.tables
    assert why(left) == "the table stays float: 'again' reads it in float, and codes would come on top"


@pytest.mark.parametrize(
    "model, reason",
    [
        (lambda: lookup(rows=100), "the table of 100 x 128 stays float: codes would save less than 64 KB"),
        (lambda: lookup(body=True), "a body of an If, Loop or Scan reads it"),
        (lambda: lookup(beside="Relu"), "'beside' (Relu) reads it too"),
    ],
)
def test_what_cannot_be_codes_says_why(model: Callable[[], Model], reason: str) -> None:
    plan = planned(model())
    assert not plan.tables and reason in why(plan)


def test_tied_words_are_found_turned_or_not() -> None:
    for head in ("turned", "gemm"):
        model = lookup(head=head)
        plan = planned(model)
        assert plan.tables[0].tie == {"turned": "turned", "gemm": "table"}[head]
        assert "head" in plan.quantized_nodes
    far = lookup(head="turned")
    changed = onnx.ModelProto.FromString(far.proto.SerializeToString())
    turned = next(t for t in changed.graph.initializer if t.name == "turned")
    values = numpy_helper.to_array(turned).copy()
    values[3, 5] += 1
    turned.CopyFrom(numpy_helper.from_array(values, "turned"))
    assert planned(prepare(load(changed))).tables[0].tie is None


def test_a_product_that_reads_the_table_in_float_keeps_it_float() -> None:
    model = lookup(head="gemm")
    plan = planned(model, exclude=("head",))
    assert not plan.tables
    assert why(plan) == "the table stays float: 'head' reads it in float, and codes would come on top"
    full = planned(model)
    fewer = tables.kept(model, replace(full, points=()))
    assert not fewer.tables and "codes would come on top" in why(fewer)


def test_the_plan_refuses_a_table_of_another_node() -> None:
    model = lookup()
    plan = planned(model)
    text = plan.to_json().replace('"read:0"', '"layer:0"')
    with pytest.raises(InputError, match="has no such operand"):
        Plan.from_json(text).check(model)


def test_the_plan_refuses_scales_that_a_table_cannot_have() -> None:
    model = lookup(rows=700, width=96)
    plan = planned(model)
    for spec in ({"axis": 1}, {"axis": 0, "block": 16, "format": "int4"}, {"axis": 1, "block": 128, "format": "int4"}):
        (point,) = plan.tables
        edited = replace(plan, tables=(replace(point, spec=replace(point.spec, **spec)),))
        with pytest.raises(InputError, match="rows have a scale each"):
            edited.check(model)


def test_a_decoder_has_its_words_as_codes_for_both_compilers() -> None:
    for compiler in ("rtx", "tensorrt"):
        settings = Settings(embeddings="int8", compiler=compiler)
        model = prepare(load(llama(words=1100)))
        assert [p.tensor for p in placement.plan(model, settings).tables] == ["embedding"]
        assert bool(settings.doubts) == (compiler == "tensorrt")
