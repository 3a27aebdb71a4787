"""`explain`: what the rewrites say of a node."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphs import build, node, normal

from qdq.build.recipe import Recipe
from qdq.deploy.explain import explain


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (1, ["conv_transpose: fits; `tune` says whether it pays", "norm_bias: does not fit: it has no bias"]),
        (2, ["conv_transpose: does not fit: it has 2 groups, not one", "norm_bias: does not fit: it has no bias"]),
    ],
)
def test_each_rewrite_of_the_operator_says_whether_it_fits(tmp_path: Path, group: int, said: list[str]) -> None:
    nodes = [node("ConvTranspose", "x w", "a", "up", strides=[2, 2], group=group), node("Relu", "a", "y")]
    model = build(nodes, {"x": (1, 8, 5, 5)}, {"w": normal(8, 4, 2, 2)})
    (tmp_path / "m.onnx").write_bytes(model.proto.SerializeToString())
    lines = explain(tmp_path / "m.onnx", "up", Recipe())
    assert sorted(line for line in lines if "rewrite" in line) == [f"  rewrite {line}" for line in said]
    assert not [line for line in explain(tmp_path / "m.onnx", "relu", Recipe()) if "rewrite" in line]
