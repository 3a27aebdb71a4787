"""The file of every scheme is valid, loads in ONNX Runtime with default options and computes the same there."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
from graphs import build, node, normal, quantized, samples
from places import ROOT

from qdq.plan.scheme import SCHEMES

sys.path.insert(0, str(ROOT / "tools"))
import every_scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_are_valid_and_load_with_default_options(scheme: str, tmp_path: Path) -> None:
    assert every_scheme.write(tmp_path, [scheme]) == []
    assert len(list(tmp_path.glob("*.onnx"))) >= (16 if "nvfp4" not in scheme else 8)
    assert every_scheme.loaded(tmp_path) == []


@pytest.mark.parametrize("shift", [False, True])  # with one, a correction comes before the bias
def test_what_is_added_to_a_product_of_rank_3_has_its_rank(shift: bool) -> None:
    nodes = [
        node("MatMul", "x w", "m"),
        node("Add", "b m", "a"),
        node("Relu", "a", "r"),
        node("Add", "r b", "y", "two"),
    ]
    model = build(nodes, {"x": (2, 4, 8)}, {"w": normal(8, 8), "b": normal(8)})
    made = quantized(model, samples(model, low=3.0), shift=shift).model.proto
    read = {tensor.name: tensor for tensor in made.graph.initializer}
    behind = [n for n in made.graph.node if n.op_type == "Add" and n.name != "two"]
    assert len(behind) == (2 if shift else 1)
    (first,) = (
        n for n in behind if any(i in n.input for m in made.graph.node for i in m.output if m.op_type == "MatMul")
    )
    assert [list(read[i].dims) for i in first.input if i in read] == [[1, 1, 8]]
    two = next(n for n in made.graph.node if n.name == "two")
    assert list(read[two.input[1]].dims) == [8]
    used = {name for n in made.graph.node for name in n.input}
    assert set(read) <= used
    onnx.checker.check_model(made, full_check=True)
