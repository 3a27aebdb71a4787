"""A part of ONNX's node tests through preparation, FP16 and INT8; all of them with the tool itself."""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from graphs import build, node, normal
from onnx import ModelProto, numpy_helper
from places import ROOT

from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan import placement


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("run_onnx_tests")


@pytest.mark.parametrize(("stage", "every"), [("prepare", 17), ("fp16", 31), ("int8", 31)])
def test_a_part_of_the_node_tests_is_taken_and_computes_the_same(tool: ModuleType, stage: str, every: int) -> None:
    results = list(tool.walk(stage, part=(5, every)))
    found = Counter(result.verdict for result in results)
    bad = [r for r in results if r.verdict in ("wrong", "invalid", "crash")]
    assert not bad and found["equal"] + found["float"] > len(results) / 2 and found["refused"] <= 0.02 * len(results)
    assert found["noisy"] <= 2 and (found["equal"] > 5 or stage != "int8")


def test_the_tool_sees_what_differs(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.float32([1, -2, np.inf])
    assert not tool.differs(a * np.float32(1 + 1e-6), a, tool.FLOAT_ERROR)
    for other in (a * np.float32(1.001), a[:2], a.astype(np.float64), np.float32([1, -2, np.nan])):
        assert tool.differs(other, a, tool.FLOAT_ERROR)
    assert tool.differs([a], [a, a], 0.1) and tool.differs(np.int64([1]), np.int64([2]), 0.1)
    assert not tool.differs([a, a], [a, a], 0.0) and tool.differs(None, a, 0.1)

    def broken(*_: object) -> tuple[str, str]:
        raise KeyError("a fault of ours")

    monkeypatch.setitem(tool.STAGES, "prepare", broken)
    assert [r.verdict for r in tool.walk("prepare", "^test_relu$")] == ["crash"]


def product() -> ModelProto:
    """x -> MatMul -> y."""
    return build([node("MatMul", "x w", "y")], {"x": (16, 32)}, {"w": normal(32, 64)}).proto


def test_int8_is_held_to_the_noise_that_its_steps_make(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is 2 % too large, or of another channel, shows; and so do few decibels."""
    sample = {"x": normal(16, 32, seed=3)}
    wanted = tool.outputs(product(), sample)
    assert tool.in_int8(product(), sample, wanted, True) == ("equal", "")
    plain = tool.finish

    def spoilt(spoil: Callable[[np.ndarray], np.ndarray]) -> Callable[..., object]:
        def finish(model: Model, *args: object, **options: object) -> object:
            proto = copy.deepcopy(model.proto)
            for tensor in proto.graph.initializer:
                if tensor.name.endswith("scale") and len(tensor.dims):
                    values = numpy_helper.to_array(tensor)
                    tensor.CopyFrom(numpy_helper.from_array(spoil(values), tensor.name))
            return plain(model.replace(proto), *args, **options)

        return finish

    for spoil in (lambda s: s * np.float32(1.02), lambda s: np.roll(s, 1)):
        monkeypatch.setattr(tool, "finish", spoilt(spoil))
        verdict, said = tool.in_int8(product(), sample, wanted, True)
        assert verdict == "wrong" and "expected" in said
    assert tool.noisy([np.float32([1, 1.1])], [np.float32([1, 1])], [0.1])[0] == "noisy"


def test_the_noise_expected_is_that_of_the_steps(tool: ModuleType) -> None:
    """Of a product: a row's noise is step squared / 12 times the weights', and the other way round."""
    noise = importlib.import_module("quantization_noise")
    model = prepare(Model(proto=product(), directory=Path(), sha256="m"))
    x, w = normal(16, 32, seed=3), model.array("w").astype(np.float64)
    (found,) = noise.expected_noise(model, placement.plan(model), {"x": x})
    steps = np.abs(x).max() / 127, np.abs(w).max(axis=0) / 127
    wanted = (16 * steps[0] ** 2 * np.sum(w**2) + np.sum(x.astype(np.float64) ** 2) * np.sum(steps[1] ** 2)) / 12
    assert found == pytest.approx(np.sqrt(wanted), rel=0.05)
