"""Models whose outputs are more than numbers of one size get through every verb that looks at outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import node, normal
from models import save_samples
from onnx import TensorProto, helper, numpy_helper

from qdq.assemble.held_out import comparable
from qdq.cli.main import main
from qdq.passes.prepare import load_float

Graph = tuple[list[onnx.NodeProto], dict[str, np.ndarray], list[onnx.ValueInfoProto]]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def tensor(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def detector() -> Graph:
    """Boxes and scores, and those that NonMaxSuppression leaves: their number depends on the scores."""
    nodes = [
        node("MatMul", "x wb", "b0", "boxes"),
        node("Reshape", "b0 bs", "b"),
        node("MatMul", "x ws", "s0", "scores"),
        node("Sigmoid", "s0", "s1"),
        node("Reshape", "s1 ss", "s", "reshape_s"),
        node("NonMaxSuppression", "b s most iou least", "chosen"),
        node("Gather", "chosen two", "index", axis=1),
        node("Squeeze", "b first", "all"),
        node("Gather", "all index", "found", "take"),
    ]
    tensors = {
        "wb": 10 * normal(16, 160),
        "ws": normal(16, 40, seed=1) / 2,
        "bs": np.array([1, 40, 4]),
        "ss": np.array([1, 1, 40]),
        "most": np.array(20),
        "iou": np.array(0.5, np.float32),
        "least": np.array(0.6, np.float32),
        "two": np.array(2),
        "first": np.array([0]),
    }
    return nodes, tensors, [tensor("found", FLOAT, ["n", 4])]


def detector_with_scores() -> Graph:
    nodes, tensors, ends = detector()
    return nodes, tensors, [*ends, tensor("s", FLOAT, [1, 1, 40])]


def sequence() -> Graph:
    nodes = [node("MatMul", "x w", "m"), node("SplitToSequence", "m", "parts", axis=1)]
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, [1, "k"]))
    return nodes, {"w": normal(16, 8)}, [helper.make_value_info("parts", kind)]


def super_resolution() -> Graph:
    nodes = [
        node("Reshape", "x image", "i"),
        node("Conv", "i w", "c", pads=[1, 1, 1, 1]),
        node("DepthToSpace", "c", "y", blocksize=2),
    ]
    return nodes, {"w": normal(16, 4, 3, 3), "image": np.array([1, 4, 2, 2])}, [tensor("y", FLOAT, [1, 4, 4, 4])]


def best() -> Graph:
    nodes = [
        node("MatMul", "x w", "m"),
        node("ArgMax", "m", "label", axis=1),
        node("TopK", "m k", "top places", axis=1),
    ]
    ends = [tensor("label", INT64, [1, 1]), tensor("top", FLOAT, [1, 3]), tensor("places", INT64, [1, 3])]
    return nodes, {"w": normal(16, 8), "k": np.array([3])}, ends


def written(graph: Graph, folder: Path) -> str:
    nodes, tensors, ends = graph
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    made = helper.make_graph(nodes, "tiny", [tensor("x", FLOAT, [1, 16])], ends, stored)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "m.onnx")
    rng = np.random.default_rng(0)
    save_samples(folder / "data", [{"x": rng.normal(size=(1, 16)).astype(np.float32)} for _ in range(6)])
    return str(folder / "m.onnx")


def ran(*args: object) -> str:
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("graph", [detector, detector_with_scores, sequence, super_resolution, best])
def test_quantize_and_check_get_through(graph: Any, tmp_path: Path) -> None:
    model, data, made = written(graph(), tmp_path), tmp_path / "data", tmp_path / "q.onnx"
    ran("quantize", model, "--data", data, "-o", made)
    assert "nodes in INT8" in ran("quantize", model, "--data", data, "-o", made, "--scheme", "int8")
    report = json.loads(ran("check", model, made, "--data", data, "--json"))
    outputs = {o["name"]: o for o in report["outputs"]}
    assert list(outputs) == [end.name for end in graph()[2]]
    if graph is sequence:
        assert outputs["parts"]["not_compared"] == "a sequence" and report["sqnr_db"] is None
    if "found" in outputs and outputs["found"]["mismatched"]:
        assert "of 6 samples had the same shape)" in outputs["found"]["not_compared"]
    assert all(o["sqnr_db"] is None or o["sqnr_db"] > 20 for name, o in outputs.items() if name != "found")


@pytest.mark.parametrize("graph", [detector, sequence, best])
def test_compare_says_what_it_cannot_score(graph: Any, tmp_path: Path) -> None:
    model, data = written(graph(), tmp_path), tmp_path / "data"
    result = CliRunner().invoke(main, ["compare", model, "--data", str(data), "--schemes", "int8", "--json"])
    if graph is sequence:
        assert result.exit_code == 2 and "No output is a tensor" in result.output
        return
    assert result.exit_code == 0, result.output
    assert [row["scheme"] for row in json.loads(result.stdout)["rows"]] == ["FP32", "FP16", "int8"]


def test_candidates_are_judged_by_what_has_one_size(tmp_path: Path) -> None:
    def by(graph: Graph) -> set[str]:
        return set(comparable(load_float(written(graph, tmp_path))))

    assert by(detector()) == {"b", "s", "all"}
    assert by(detector_with_scores()) == {"s"}
    assert by(sequence()) == set()
    assert by(best()) == {"top"}
