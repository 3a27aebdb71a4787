"""The table depends on the samples alone, not on their order; bad samples, models and files are refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from graphs import build, node, normal

from engines.core.documents import replace
from qdq.core.errors import InputError, StaleFileError
from qdq.measure.collect import collect
from qdq.measure.histogram import BINS, Histogram
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.plan import placement


def table_of(model: Any, data: Any, **options: Any) -> CalibrationTable:
    return collect(model, placement.plan(model), data, **options)


def histograms(table: CalibrationTable) -> str:
    """The text of the table without what names the samples."""
    return replace(table, count=0, samples_sha256="", samples=()).to_json()


def test_the_table_is_byte_identical_for_every_order_and_batching() -> None:
    model = graphs.conv(batch="n")
    rng = np.random.default_rng(0)
    scales = [0.01, 1.0, 3.0, 300.0]
    data = [{"x": (rng.normal(size=(1, 4, 6, 6)) * s).astype(np.float32)} for s in scales]
    data.append({"x": np.full((1, 4, 6, 6), -0.0, np.float32)})
    batched = [{"x": np.concatenate([s["x"] for s in data])}]
    table = table_of(model, data)
    for order in itertools.islice(itertools.permutations(data), 0, 120, 17):
        assert table_of(model, list(order)).to_json() == table.to_json()
    assert table_of(model, batched).to_json() == table.to_json()
    assert table.count == table.tensors["x"].samples == 5
    assert float(table.tensors["x"].peaks) == pytest.approx(sum(float(np.abs(s["x"]).max()) for s in data), rel=1e-12)


@pytest.mark.parametrize("form", ["second axis", "joined with another", "of no use"])
def test_a_batch_is_taken_apart_wherever_its_axis_went(form: str) -> None:
    """Transposed behind another axis, joined with one by Reshape, or fixed, where a batch is one sample."""
    shape = {"second axis": (0, -1, 6), "joined with another": (-1, 6), "of no use": (0, 0, 6)}[form]
    nodes = [node("Reshape", "x s", "a"), node("MatMul", "a w", "y")]
    if form == "second axis":
        nodes = [node("Transpose", "x", "a", perm=[1, 0, 2]), node("MatMul", "a w", "y")]
    batch = 3 if form == "of no use" else "n"
    model = build(nodes, {"x": (batch, 5, 6)}, {"w": normal(6, 4), "s": np.array(shape, np.int64)})
    rng = np.random.default_rng(0)
    data = [(rng.normal(size=(1, 5, 6)) * 10**i).astype(np.float32) for i in range(3)]
    whole = table_of(model, [{"x": np.concatenate(data)}])
    if form == "of no use":
        assert whole.count == 1 and all(h.samples == 1 for h in whole.tensors.values())
        return
    assert whole.to_json() == table_of(model, [{"x": x} for x in data]).to_json()
    assert {h.samples for h in whole.tensors.values()} == {3}


def test_negative_zeros_leave_no_trace_in_the_histograms() -> None:
    model = graphs.conv()
    data = [{"x": np.full((1, 4, 6, 6), zero, np.float32)} for zero in (-0.0, 0.0)]
    assert table_of(model, data).to_json() == table_of(model, data[::-1]).to_json()
    assert histograms(table_of(model, data[:1])) == histograms(table_of(model, data[1:]))


def test_samples_of_different_shapes_and_a_generator_work() -> None:
    model = graphs.conv(spatial=("h", "w"))
    data = [{"x": normal(1, 4, h, w, seed=h)} for h, w in ((6, 6), (3, 9), (12, 4))]
    table = table_of(model, iter(data))
    whole = Histogram.of(np.concatenate([s["x"].ravel() for s in data]))
    assert np.array_equal(table.tensors["x"].counts, whole.counts)
    assert table.count == 3


def test_inner_tensors_hold_what_the_float_model_computes() -> None:
    model = graphs.residual()
    data = graphs.samples(model, 3)
    table = table_of(model, data)
    whole = Histogram.of(np.maximum(np.stack([s["x"] for s in data]), 0))
    assert table.tensors.keys() == {"t"}
    assert np.array_equal(table.tensors["t"].counts, whole.counts)
    assert (table.tensors["t"].low, table.tensors["t"].high) == (whole.low, whole.high)


def test_progress_counts_the_samples() -> None:
    model = graphs.conv()
    seen: list[tuple[int, int | None, str]] = []
    table_of(model, graphs.samples(model, 2), on_progress=lambda *a: seen.append(a))
    assert seen == [(1, 2, "calibrating"), (2, 2, "calibrating")]
    seen.clear()
    table_of(model, iter(graphs.samples(model, 1)), on_progress=lambda *a: seen.append(a))
    assert seen == [(1, None, "calibrating")]


def test_no_samples_are_refused() -> None:
    with pytest.raises(InputError, match="no samples"):
        table_of(graphs.conv(), [])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_is_refused_by_number_and_tensor(value: float) -> None:
    model = graphs.conv()
    data = graphs.samples(model, 2)
    data[1]["x"][0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"Sample 1 makes tensor 'x' .* not finite"):
        table_of(model, data)


def test_nan_and_infinity_made_inside_the_model_are_refused() -> None:
    nodes = [node("Log", "x", "a"), node("Conv", "a w", "y")]
    model = build(nodes, {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 1, 1)})
    for value in (-1, 0):
        with pytest.raises(InputError, match="Sample 0 makes tensor 'a'"):
            table_of(model, [{"x": np.full((1, 4, 5, 5), value, np.float32)}])


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(InputError, match="no values"):
        table_of(graphs.conv(batch="n"), [{"x": np.zeros((0, 4, 6, 6), np.float32)}])


def test_a_sample_that_onnx_runtime_refuses_is_one_paragraph() -> None:
    with pytest.raises(InputError, match="ONNX Runtime cannot run the float model") as caught:
        table_of(graphs.residual(), [{"x": np.zeros((1, 3, 6, 6), np.float32)}])
    assert "\n" not in str(caught.value)


def test_a_model_that_onnx_runtime_refuses_is_one_paragraph() -> None:
    model = graphs.residual()
    for broken in (graphs.residual(), graphs.residual()):
        broken.graph.node[0].op_type = "NoSuchOperator"
        with pytest.raises(InputError, match="ONNX Runtime cannot run the float model"):
            Session(broken, ["t"])
    assert Session(model, ["t"])(graphs.samples(model)[0]).keys() == {"t"}


def test_a_missing_custom_operator_library_is_refused() -> None:
    with pytest.raises(InputError, match="ONNX Runtime cannot load the custom operators"):
        Session(graphs.residual(), ["t"], custom_ops=["none.so"])


def test_a_bfloat16_model_that_onnx_runtime_has_no_kernels_for_is_one_paragraph() -> None:
    with pytest.raises(InputError, match=r"ONNX Runtime cannot run the float model: .*bfloat16"):
        Session(half("bfloat16"), ["y"])


def half(dtype: str) -> Model:
    nodes = [node("Relu", "x", "t"), node("Conv", "t w", "y")]
    return build(nodes, {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 1, 1)}, dtype=dtype)


def test_float16_tensors_are_measured() -> None:
    model = half("float16")
    data = graphs.samples(model, 2)
    whole = Histogram.of(np.maximum(np.stack([s["x"] for s in data]), 0))
    assert np.array_equal(table_of(model, data).tensors["t"].counts, whole.counts)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    model = graphs.branches()
    table = table_of(model, graphs.samples(model))
    zero = Histogram.of(np.zeros(3, np.float32))
    edges = Histogram.of(np.float32([-BINS, BINS - 1, 1e-45]))
    table = replace(table, tensors={**table.tensors, "zero": zero, "edges": edges})
    table.save(tmp_path / "table.json")
    back = CalibrationTable.load(tmp_path / "table.json")
    assert back.to_json() == table.to_json()
    assert (back.model_sha256, back.samples_sha256, back.count) == (model.sha256, table.samples_sha256, 4)
    back.check(model, placement.plan(model))
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no tensors": lambda c: c.pop("tensors"),
    "no count": lambda c: c.pop("count"),
    "count is text": lambda c: c.update(count="many"),
    "entry no mapping": lambda c: c["tensors"].append(3),
    "no counts": lambda c: c["tensors"][0].pop("counts"),
    "counts empty": lambda c: c["tensors"][0].update(counts=[]),
    "counts all zero": lambda c: c["tensors"][0].update(counts=[0, 0]),
    "counts negative": lambda c: c["tensors"][0]["counts"].append(-1),
    "counts too large": lambda c: c["tensors"][0]["counts"].append(10**30),
    "counts text": lambda c: c["tensors"][0].update(counts=["a"]),
    "bin outside": lambda c: c["tensors"][0].update(first_bin=BINS),
    "bin below": lambda c: c["tensors"][0].update(first_bin=-BINS - 1),
    "low is NaN": lambda c: c["tensors"][0].update(low=float("nan")),
    "high is infinite": lambda c: c["tensors"][0].update(high=float("inf")),
    "low above zero": lambda c: c["tensors"][0].update(low=1.0),
    "exponent is text": lambda c: c["tensors"][0].update(exponent="e"),
    "no exponent": lambda c: c["tensors"][0].update(exponent=None),
    "no samples": lambda c: c["tensors"][0].update(samples=0),
    "no peaks": lambda c: c["tensors"][0].pop("peaks"),
    "peaks of no size": lambda c: c["tensors"][0].update(peaks="1/0"),
    "peaks above the range": lambda c: c["tensors"][0].update(peaks="1000000"),
    "other version": lambda c: c.update(format="qdq.table/99"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_table_is_refused(name: str, tmp_path: Path) -> None:
    model = graphs.conv()
    content = json.loads(table_of(model, graphs.samples(model)).to_json())
    DAMAGE[name](content)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"table\.json"):
        CalibrationTable.load(path)


def test_a_table_of_another_model_or_plan_is_stale() -> None:
    model, other = graphs.conv(), graphs.conv(bias=False)
    plan = placement.plan(model)
    table = table_of(model, graphs.samples(model))
    with pytest.raises(StaleFileError, match="made from another model"):
        replace(table, model_sha256=other.sha256).check(model, plan)
    with pytest.raises(StaleFileError, match=r"lacks 1 tensors .* 'x'"):
        replace(table, tensors={}).check(model, plan)
