"""A refusal without a node names the node that was found to be it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from graphs import node, normal
from raw_models import raw

from engines.backends import rtx
from engines.backends.compiler import ShapeRange
from engines.backends.locate import located, nothing_named
from engines.core.errors import BuildError
from qdq.build.engine import compile_engine
from qdq.build.recipe import Recipe

pytest.importorskip("tensorrt_rtx")


def deep(path: Path, *, external: bool = False) -> Path:
    """Twelve convolutions; behind the eighth a transposed one that the compiler has no kernel for."""
    nodes, last = [], "x"
    for index in range(12):
        nodes.append(node("Conv", f"{last} v", f"c{index}", f"conv{index}"))
        last = f"c{index}"
        if index == 7:
            nodes.append(node("ConvTranspose", f"{last} u", "d", "up", strides=[2, 1], dilations=[1, 2]))
            last = "d"
    nodes[-1].output[0] = "y"
    model = raw(nodes, {"x": ("n", 8, 6, 6)}, {"v": normal(8, 8, 1, 1), "u": normal(8, 8, 3, 3)})
    onnx.save(model.proto, path, save_as_external_data=external, location="weights.data", size_threshold=10)
    return path


@pytest.mark.parametrize("external", [False, True])
def test_the_node_is_found(tmp_path: Path, external: bool) -> None:
    path, shapes = deep(tmp_path / "deep.onnx", external=external), {"x": ShapeRange.fixed((1, 8, 6, 6))}
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(BuildError, match="compiles up to ConvTranspose 'up'") as caught:
        compile_engine(path, recipe=Recipe(), shapes=shapes)
    assert caught.value.nodes == ("up",) and sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_name_inside_a_word_is_not_taken_for_a_node(tmp_path: Path) -> None:
    """The message holds "supported", in which 'up' occurs."""
    with pytest.raises(BuildError) as caught:
        rtx.build(deep(tmp_path / "deep.onnx"), shapes={"x": ShapeRange.fixed((1, 8, 6, 6))})
    assert caught.value.nodes == () and nothing_named(caught.value)


def test_a_search_ends_with_its_time_or_with_other_words(tmp_path: Path) -> None:
    proto, refusal = onnx.load(deep(tmp_path / "deep.onnx")), BuildError("The engine builder failed: no kernel")

    def refuse(words: str) -> object:
        def build(part: Path) -> object:
            if any(n.name == "up" for n in onnx.load(part).graph.node):
                raise BuildError(words)
            return part

        return build

    found = located(refusal, proto, tmp_path, refuse(str(refusal)), seconds=0)  # type: ignore[arg-type]
    assert "one of the 13 nodes from Conv 'conv0' to Conv 'conv11'" in str(found)
    assert located(refusal, proto, tmp_path, refuse("The ONNX parser refused it"), seconds=60) is refusal  # type: ignore[arg-type]
    assert located(refusal, proto, tmp_path, refuse(str(refusal)), seconds=60).nodes == ("up",)  # type: ignore[arg-type]


def test_messages_of_ours_start_no_search() -> None:
    assert not nothing_named(BuildError("Input x has dynamic dimensions and no shapes were given."))
    assert not nothing_named(BuildError("The engine builder failed: at conv", nodes=("conv",)))
