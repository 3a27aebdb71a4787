"""A part of ONNX's node tests through preparation, FP16 and INT8; all of them with the tool itself."""

from __future__ import annotations

import importlib
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
from places import ROOT


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("run_onnx_tests")


@pytest.mark.parametrize(("stage", "every"), [("prepare", 17), ("fp16", 31), ("int8", 31)])
def test_a_part_of_the_node_tests_is_taken_and_computes_the_same(tool: ModuleType, stage: str, every: int) -> None:
    results = list(tool.walk(stage, part=(5, every)))
    found = Counter(result.verdict for result in results)
    bad = [r for r in results if r.verdict in ("wrong", "invalid", "crash")]
    assert not bad and found["equal"] > len(results) / 2 and found["refused"] <= 0.02 * len(results)


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
