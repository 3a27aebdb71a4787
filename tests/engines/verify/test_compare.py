"""Comparing: two models run on samples, what cannot be compared, and the files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.core import onnx_runtime as ort
from engines.core.errors import EngineError
from engines.verify.compare import STOOD_FOR_ENGINE, compare
from engines.verify.report import Limits

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
    # The two samples differ by (3, 4): at each position the variance (n - 1) is half the square of that, 4.5 and 8.
    assert row.spread == pytest.approx(math.sqrt((4.5 + 8) / 2)) and row.rms_error == pytest.approx(math.sqrt(2 / 4))
    assert row.sqnr_spread_db == pytest.approx(10 * math.log10(6.25 / 0.5))
    # The mean is 5.25; around it lie 2.25^2 + 1.25^2 + 0.75^2 + 2.75^2.
    assert row.sqnr_centred_db == pytest.approx(10 * math.log10(14.75 / 2))
    assert row.cosine_centred == pytest.approx(float(np.corrcoef([3, 4, 6, 8], [4, 4, 7, 8])[0, 1]))
    assert (row.task, row.top1, row.dice) == ("regression", None, {})  # an Add says nothing of classes
    assert result.samples == 2 and result.passed
    forced = compare(add([[0, 0]], shape), add([[1, 0]], shape), samples([[3, 4]], [[6, 8]]), task="classification")
    assert (
        forced.outputs[0].top1 == 0.5
    )  # 4, 4 is a tie in the candidate: argmax takes class 0, the reference has class 1


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


def two_outputs(first: float, second: float) -> onnx.ModelProto:
    """big = 1000 x + first, small = x + second: a pool of both hides the small one."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["m"]),
        helper.make_node("Add", ["m", "a"], ["big"]),
        helper.make_node("Add", ["x", "b"], ["small"]),
    ]
    constants = [graphs.const(n, np.asarray(v, np.float32)) for n, v in (("k", 1000), ("a", first), ("b", second))]
    ends = [graphs.value(n, [1, 4], TensorProto.FLOAT) for n in ("x", "big", "small")]
    return graphs.model(nodes, ends[:1], ends[1:], constants)


def test_the_headline_is_the_worst_output() -> None:
    data = [[[1, 2, 3, 4]], [[4, 3, 2, 1]]]
    result = compare(two_outputs(0, 0), two_outputs(0, 1), samples(*data), limits=Limits(min_sqnr_db=20))
    big, small = result.outputs
    assert result.worst_output == "small" and result.sqnr_db == small.sqnr_db == pytest.approx(10 * math.log10(60 / 8))
    assert big.identical and big.sqnr_db == math.inf
    assert [text for text in result.failures if "small" in text] == result.failures != []
    written = json.loads(result.to_json())
    assert written["worst_output"] == "small" and written["sqnr_db"] == pytest.approx(result.sqnr_db)


def test_labels_texts_and_empty_outputs_are_compared() -> None:
    """ArgMax, a comparison, texts and an output without elements beside numbers."""

    def model(shift: float) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Add", ["x", "v"], ["y"]),
            helper.make_node("ArgMax", ["y"], ["best"], axis=1),
            helper.make_node("Greater", ["y", "zero"], ["above"]),
            helper.make_node("Cast", ["best"], ["text"], to=TensorProto.STRING),
            helper.make_node("Slice", ["y", "none", "none"], ["empty"]),
        ]
        constants = [
            graphs.const("v", np.asarray([[shift, 0, 0, 0]], np.float32)),
            graphs.const("zero", np.asarray(0, np.float32)),
            graphs.const("none", np.asarray([0], np.int64)),
        ]
        kinds = {"best": TensorProto.INT64, "above": TensorProto.BOOL, "text": TensorProto.STRING}
        outputs = [
            graphs.value(n, s, kinds.get(n, TensorProto.FLOAT))
            for n, s in (("y", [1, 4]), ("best", [1, 1]), ("above", [1, 4]), ("text", [1, 1]), ("empty", [0, 4]))
        ]
        return graphs.model(nodes, [graphs.value("x", [1, 4], TensorProto.FLOAT)], outputs, constants)

    result = compare(model(0), model(5), samples([[-1, 2, 1, 0]], [[0, 2, 6, -1]]))
    rows = {o.name: o for o in result.outputs}
    assert {n: o.task for n, o in rows.items() if o.task == "labels"} == dict.fromkeys(
        ("best", "above", "text"), "labels"
    )
    assert rows["best"].top1 == rows["text"].top1 == 0.5 and rows["above"].top1 == 0.75
    assert rows["best"].sqnr_db is None and rows["best"].because == "ArgMax ends the graph"
    assert rows["empty"].elements == 0 and rows["empty"].sqnr_db is None and not rows["empty"].identical
    assert result.worst_output == "y" and result.top1 == 0.5


def test_a_shape_that_differs_in_some_samples_is_counted() -> None:
    """What NonZero finds depends on the values: of two samples one gives another number of indices."""

    def model(shift: float) -> onnx.ModelProto:
        nodes = [helper.make_node("Add", ["x", "v"], ["y"]), helper.make_node("NonZero", ["y"], ["found"])]
        outputs = [graphs.value("found", [2, "n"], TensorProto.INT64)]
        constant = graphs.const("v", np.asarray([[shift, 0]], np.float32))
        return graphs.model(nodes, [graphs.value("x", [1, 2], TensorProto.FLOAT)], outputs, [constant])

    found = compare(model(0), model(1), samples([[0, 1]], [[1, 1]]))
    (row,) = found.outputs
    assert (row.mismatched, row.elements, row.identical) == (1, 4, True)
    why = "its size depends on the data (1 of 2 samples had the same shape)"
    assert found.poor == [f"Output found: {why}."] and row.not_compared == why
    (none,) = compare(model(0), model(1), samples([[0, 1]])).outputs
    assert (none.elements, none.sqnr_db, none.top1) == (0, None, None) and "(0 of 1 samples" in none.not_compared


def test_a_shape_that_no_values_decide_must_be_that_of_the_reference() -> None:
    def model(axis: int) -> onnx.ModelProto:
        nodes = [helper.make_node("Concat", ["x", "x"], ["y"], axis=axis)]
        ends = [graphs.value("x", [1, 2], TensorProto.FLOAT), graphs.value("y", ["a", "b"], TensorProto.FLOAT)]
        return graphs.model(nodes, ends[:1], ends[1:], [])

    with pytest.raises(EngineError, match=r"y has shape \(2, 2\) in the reference and \(1, 4\)"):
        compare(model(0), model(1), samples([[0, 1]]))


def test_what_is_no_tensor_is_named_and_the_others_are_compared() -> None:
    """A sequence and an optional beside numbers, and alone."""

    def model(shift: float, *names: str) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Add", ["x", "v"], ["y"]),
            helper.make_node("SplitToSequence", ["y"], ["parts"], axis=1),
            helper.make_node("Optional", ["y"], ["maybe"]),
        ]
        tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["a", "b"])
        kinds = {
            "y": tensor,
            "parts": helper.make_sequence_type_proto(tensor),
            "maybe": helper.make_optional_type_proto(tensor),
        }
        ends = [helper.make_value_info(name, kinds[name]) for name in names]
        constant = graphs.const("v", np.asarray([[shift, 0]], np.float32))
        return graphs.model(nodes, [graphs.value("x", [1, 2], TensorProto.FLOAT)], ends, [constant])

    found = compare(model(0, "y", "parts"), model(1, "y", "parts"), samples([[3, 4]]))
    assert {o.name: o.not_compared for o in found.outputs} == {"y": "", "parts": "a sequence"}
    assert found.worst_output == "y" and found.sqnr_db == pytest.approx(10 * math.log10(25)) and found.passed
    alone = compare(model(0, "parts", "maybe"), model(1, "parts", "maybe"), samples([[3, 4]]))
    assert [(o.task, o.not_compared) for o in alone.outputs] == [("none", "a sequence"), ("none", "an optional")]
    assert alone.sqnr_db is None and alone.passed and not alone.poor


def test_a_value_that_is_not_finite_is_placed() -> None:
    given = list(samples([[1, 2, 3, 4]], [[1, 2, 3, 4]]))
    found = compare(two_outputs(0, 0), two_outputs(1, math.nan), given, names=("float model", "engine"))
    assert found.failures == ["Output small: 8 values are not finite, the first in sample 0 of the engine."]
    both = compare(two_outputs(0, math.inf), two_outputs(1, math.nan), given)
    assert both.failures[0].endswith("sample 0 of the reference and the candidate.")


@pytest.mark.parametrize(
    ("symbol", "axis", "samples_lead"), [("N", 0, True), ("time", 1, False), ("s", 0, False), ("s", 1, True)]
)
def test_a_time_axis_holds_no_samples(symbol: str, axis: int, samples_lead: bool) -> None:
    """What lies along the leading axis of the inputs: by its symbol, else by a sum along it."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"]),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    ends = [graphs.value(name, [symbol, 2], TensorProto.FLOAT) for name in "xy"]
    made = graphs.model(nodes, ends[:1], ends[1:], [graphs.const("axes", np.asarray([axis]))])
    (row,) = compare(made, made, samples([[1, 2], [3, 5]])).outputs
    assert (row.spread is not None) == samples_lead


def test_the_worst_output_is_one_that_is_not_finite_then_one_that_differs() -> None:
    """Outputs with numbers beside one with NaN, and labels that differ beside numbers that do not."""
    first = compare(two_outputs(0, 0), two_outputs(1, math.nan), samples([[1, 2, 3, 4]]))
    assert first.worst_output == "small" and first.poorest is first.outputs[1]
    assert first.poor[0] == "Output small: values are not finite."

    def model(shift: float) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Identity", ["x"], ["y"]),
            helper.make_node("Add", ["x", "v"], ["z"]),
            helper.make_node("ArgMax", ["z"], ["best"], axis=1),
        ]
        ends = [graphs.value("y", [1, 2], TensorProto.FLOAT), graphs.value("best", [1, 1], TensorProto.INT64)]
        constant = graphs.const("v", np.asarray([[shift, 0]], np.float32))
        return graphs.model(nodes, [graphs.value("x", [1, 2], TensorProto.FLOAT)], ends, [constant])

    assert compare(model(0), model(5), samples([[0, 1]])).worst_output == "best"
    assert compare(model(0), model(0), samples([[0, 1]])).worst.identical
