"""Comparing: every metric against numbers computed by hand, limits, NaN, and the files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from places import SHARED

from engines.core import onnx_runtime as ort
from engines.core.errors import EngineError
from engines.verify.compare import STOOD_FOR_ENGINE, Limits, Report, Sums, compare, decibels

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")


def add(value: Any, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """y = x + value: a candidate whose error is known."""
    array = np.asarray(value, helper.tensor_dtype_to_np_dtype(dtype))
    node = helper.make_node("Add", ["x", "v"], ["y"], name="add")
    return graphs.model(
        [node], [graphs.value("x", shape, dtype)], [graphs.value("y", shape, dtype)], [graphs.const("v", array)]
    )


def samples(*arrays: Any, dtype: type = np.float32) -> Iterator[dict[str, np.ndarray]]:
    """A stream of samples, readable once."""
    return ({"x": np.asarray(a, dtype)} for a in arrays)


def report_of(reference: Any, candidate: Any, **options: Any) -> Report:
    """Adds pairs of arrays directly."""
    sums = Sums(options.pop("class_axis", None))
    for r, c in zip(reference, candidate, strict=True):
        sums.add(np.asarray(r), np.asarray(c))
    return Report(
        outputs=(sums.report("y"),), sqnr_db=decibels(sums.signal, sums.noise), samples=sums.samples, **options
    )


def test_metrics_by_hand() -> None:
    """Reference 3, 4 then 6, 8; the candidate adds 1 to the first element: signal 125, noise 2."""
    shape: list[int | str] = [1, 2]
    result = compare(add([[0, 0]], shape), add([[1, 0]], shape), samples([[3, 4]], [[6, 8]]))
    (row,) = result.outputs
    assert row.sqnr_db == result.sqnr_db == pytest.approx(10 * math.log10(125 / 2))
    assert row.cosine == pytest.approx((12 + 16 + 42 + 64) / math.sqrt(125 * (16 + 16 + 49 + 64)))
    each = (28 / math.sqrt(25 * 32), 106 / math.sqrt(100 * 113))
    assert row.mean_sample_cosine == pytest.approx(sum(each) / 2)
    assert (row.max_abs_error, row.mean_abs_error) == (1.0, 0.5)
    assert row.top1 == 0.5  # 4, 4 is a tie in the candidate: argmax takes class 0, the reference has class 1
    assert result.samples == 2 and result.passed


def test_equal_outputs_have_no_noise() -> None:
    result = compare(
        add([0.0], [1, 2]), add([0.0], [1, 2]), samples([[1, 2]]), limits=Limits(min_sqnr_db=200, min_cosine=1)
    )
    assert result.sqnr_db == math.inf and result.passed
    assert json.loads(result.to_json())["sqnr_db"] == "inf"


def test_a_reference_without_signal() -> None:
    assert report_of([[0.0, 0.0]], [[0.0, 1.0]]).sqnr_db == -math.inf
    assert report_of([[0.0, 0.0]], [[0.0, 1.0]]).outputs[0].cosine == 0.0
    assert report_of([[0.0, 0.0]], [[0.0, 0.0]]).outputs[0].cosine == 1.0


def test_sums_do_not_depend_on_the_batching() -> None:
    rng = np.random.default_rng(0)
    r, c = rng.normal(size=(2, 6, 3, 4, 4))
    whole, parts = report_of([r], [c]).outputs[0], report_of(np.split(r, 3), np.split(c, 3)).outputs[0]
    assert whole.dice == parts.dice and whole.top1 == parts.top1 and whole.max_abs_error == parts.max_abs_error
    assert whole.sqnr_db == pytest.approx(parts.sqnr_db, rel=1e-12)  # float64 sums in another order


def test_top1_axis() -> None:
    tokens = np.zeros((1, 2, 3))
    tokens[0, 0, 1] = tokens[0, 1, 2] = 1
    other = np.zeros((1, 2, 3))
    other[0, :, 1] = 1
    assert report_of([tokens], [other]).outputs[0].top1 == 0.5  # rank 3: the last axis
    assert report_of([tokens], [other], class_axis=1).outputs[0].top1 == pytest.approx(2 / 3)
    assert report_of([[1.0, 2.0]], [[1.0, 2.0]]).outputs[0].top1 is None  # rank 1 has no classes


def test_integer_outputs_agree_by_element() -> None:
    row = report_of([np.array([[1, 2, 3, 4]])], [np.array([[1, 2, 0, 4]])]).outputs[0]
    assert row.top1 == 0.75 and row.dice == {}


def test_dice_per_class() -> None:
    """Labels 0 0 1 1 against 0 1 1 1: class 0 has 2*1/(2+1), class 1 has 2*2/(2+3); class 2 is in neither."""
    one_hot = np.eye(3)
    r = one_hot[[0, 0, 1, 1]].T.reshape(1, 3, 2, 2)
    c = one_hot[[0, 1, 1, 1]].T.reshape(1, 3, 2, 2)
    row = report_of([r], [c]).outputs[0]
    assert row.dice == {0: pytest.approx(2 / 3), 1: pytest.approx(4 / 5)} and row.top1 == 0.75


@pytest.mark.parametrize(("reference", "expected"), [([0.2, 0.6, 0.9, 0.1], 0.8), ([-0.2, 0.6, 0.9, 0.1], 1.0)])
def test_dice_of_one_channel(reference: list[float], expected: float) -> None:
    """Probabilities are cut at 0.5 (2 against 3 above, 2 in both), logits at 0 (the same 3 above)."""
    candidate = [-0.1, 0.7, 0.8, 0.55]
    shape = (1, 1, 2, 2)
    row = report_of([np.reshape(reference, shape)], [np.reshape(candidate, shape)]).outputs[0]
    assert row.dice == {1: pytest.approx(expected)} and row.top1 is None


def test_dice_of_independent_channels() -> None:
    """Two sigmoid channels, whose argmax means nothing: channel 0 has 1 above in both, channel 1 has 2 against 1."""
    r = np.array([[0.9, 0.1], [0.8, 0.7]]).reshape(1, 2, 1, 2)
    c = np.array([[0.8, 0.2], [0.9, 0.3]]).reshape(1, 2, 1, 2)
    row = report_of([r], [c]).outputs[0]
    assert row.dice == {0: 1.0, 1: pytest.approx(2 / 3)} and row.top1 is None


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (Limits(min_sqnr_db=20), "Output y: sqnr_db 16.0206 is below 20."),
        (Limits(min_cosine=0.9999), "Output y: cosine 0.9762 is below 0.9999."),
        (Limits(min_top1=0.9), "Output y: top1 0.5000 is below 0.9."),
        (Limits(min_dice=0.9), "No output has a dice to check against 0.9: none has classes."),
    ],
)
def test_a_missed_limit_is_one_sentence(limits: Limits, sentence: str) -> None:
    r = {"sqnr_db": ([[[4.0, 0]]], [[[4.0, math.sqrt(0.4)]]])}.get("sqnr_db")
    if limits.min_cosine:
        r = ([[[4.0, 0.0]]], [[[4.0, 0.888]]])
    if limits.min_top1:
        r = ([[[4.0, 0.0], [1.0, 0.0]]], [[[4.0, 0.0], [0.0, 1.0]]])
    assert r is not None
    result = report_of(*r, limits=limits)
    assert result.failures == [sentence] and not result.passed


def test_a_missed_dice_names_the_class() -> None:
    r = np.eye(2)[[0, 1]].T.reshape(1, 2, 1, 2)
    c = np.eye(2)[[0, 0]].T.reshape(1, 2, 1, 2)
    result = report_of([r], [c], limits=Limits(min_dice=0.5))
    assert result.failures == ["Output y: dice 0.0000 of class 1 is below 0.5."]


def test_nan_fails_every_limit_and_is_reported() -> None:
    limits = Limits(min_sqnr_db=-1000, min_cosine=-1)
    result = report_of([[[1.0, 2.0]]], [[[1.0, math.nan]]], limits=limits)
    assert len(result.failures) == 3 and "1 values" in result.failures[0]
    assert not report_of([[[1.0, 2.0]]], [[[1.0, math.nan]]]).passed
    data = json.loads(result.to_json())
    assert data["passed"] is False and data["outputs"][0]["sqnr_db"] == "nan"


def test_the_report_says_what_stood_for_the_engine(tmp_path: Path) -> None:
    result = compare(add([0], [1, 2]), add([1], [1, 2]), samples([[1, 2]]), stood_for_engine=True)
    result.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["stood_for_engine"] is True and data["note"] == STOOD_FOR_ENGINE
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_paths_sessions_and_runners_are_all_candidates(tmp_path: Path) -> None:
    model = add([1], [1, 2])
    onnx.save(model, tmp_path / "m.onnx")
    values = [
        compare(model, candidate, samples([[1, 2]])).sqnr_db
        for candidate in (tmp_path / "m.onnx", ort.session(model), ort.runner(model))
    ]
    assert values == [math.inf] * 3


def test_memory_does_not_grow_with_the_samples() -> None:
    """Samples come from a generator that checks that the one before the last was let go."""
    import gc
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(6):
            array = np.ones((1, 2), np.float32)
            alive.append(weakref.ref(array))
            yield {"x": array}
            del array
            gc.collect()
            assert sum(r() is not None for r in alive) <= 2

    assert compare(add([0], [1, 2]), add([1], [1, 2]), stream()).samples == 6


@pytest.mark.parametrize(
    ("candidate", "data", "message"),
    [
        (add([0], [1, 2]), [], "There is no sample"),
        (
            add([0], [1, 2]),
            [{"z": np.ones((1, 2), np.float32)}],
            r"A sample holds \['z'\], but the model's inputs are \['x'\]",
        ),
        (add([0], [1, 2]), [{"x": np.ones((1, 3), np.float32)}], "on a sample failed"),
        (
            add([[0], [0]], [1, 2]),
            [{"x": np.ones((1, 2), np.float32)}],
            r"shape \(1, 2\) in the reference and \(2, 2\)",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_error(candidate: onnx.ModelProto, data: list[Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        compare(add([0], [1, 2]), candidate, data)


def test_outputs_are_matched_by_name() -> None:
    other = add([0], [1, 2])
    other.graph.node[0].output[0] = other.graph.output[0].name = "z"
    with pytest.raises(EngineError, match=r"outputs \['y'\], the candidate \['z'\]"):
        compare(add([0], [1, 2]), other, samples([[1, 2]]))


def test_the_reference_keeps_q_and_dq_apart() -> None:
    """Equal to the ONNX reference evaluator, which knows no fused integer kernel."""
    from onnx.reference import ReferenceEvaluator

    model = graphs.matmul(rows=2)
    x = {"x": np.random.default_rng(0).normal(size=(2, 128)).astype(np.float32)}
    (out,) = ort.run(model, [x])
    (expected,) = ReferenceEvaluator(model).run(None, x)
    # float32 sums of 128 products in another order: 128 units in the last place of the largest partial sum
    bound = 128 * np.finfo(np.float32).eps * float(np.abs(expected).max())
    assert np.abs(out["product_out"] - expected).max() <= bound


def test_ort_errors_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"cannot load .*m\.onnx"):
        ort.session(tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="cannot load"):
        ort.session(graphs.identity(), custom_ops=[tmp_path / "absent.so"])
    with pytest.raises(EngineError, match="A sample holds"):
        list(ort.run(graphs.identity(), [{}]))
    with pytest.raises(EngineError, match="failed on a sample"):
        list(ort.run(graphs.identity(), [{"x": np.ones((3, 3), np.float32)}]))


def test_one_output_agrees_with_the_shared_tool() -> None:
    if not (SHARED / "tools/zoo.py").exists():
        pytest.skip("the shared tools are not here")
    sys.path.insert(0, str(SHARED / "tools"))
    try:
        import zoo  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    rng = np.random.default_rng(0)
    r = [rng.normal(size=(2, 5)).astype(np.float32) for _ in range(3)]
    c = [x + rng.normal(size=x.shape).astype(np.float32) / 10 for x in r]
    assert report_of(r, c).sqnr_db == pytest.approx(zoo.sqnr_db(r, c), rel=1e-12)  # float64 sums in another order
