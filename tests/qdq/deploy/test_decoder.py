"""A decoder with a cache: every linear layer in INT8, an empty cache among the samples, and no drift over the steps."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from decoder_graphs import llama, step
from places import ROOT

from engines.core import arithmetic, onnx_runtime as ort
from qdq.build.recipe import Recipe
from qdq.deploy.deploy import Deployed, deploy
from qdq.plan.settings import Settings

pytest.importorskip("tensorrt_rtx")
QUICK = Settings(calibrator="max", rounding="nearest", equalize="none", bias_correction="off")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("decode_steps")


def deployed(model: onnx.ModelProto, samples: list[dict[str, np.ndarray]], folder: Path) -> Deployed:
    path = folder / "net.onnx"
    onnx.save(model, path)
    return deploy(path, samples, folder / "out", recipe=Recipe(tune="off", settings=QUICK))


@pytest.mark.parametrize("past", [None, 9], ids=["dynamic", "fixed"])
def test_a_decoder_is_int8_and_does_not_drift(past: int | None, tool: ModuleType, tmp_path: Path) -> None:
    """Calibrated on 12 steps of two prompts, and let go on from another one."""
    model = llama(past=past)
    floating = ort.session(model)
    names = [i.name for i in floating.get_inputs()], [o.name for o in floating.get_outputs()]
    pairs = tool.pairs_of(*names)
    starts = [step(0, 8, seed=seed) if past is None else step(past, 1, seed=seed) for seed in range(3)]
    samples = [state.inputs for start in starts[1:] for state in tool.states(floating, start, 12, pairs)]
    done = deployed(model, samples, tmp_path)
    asked = [row for row in done.report.audit.nodes if row.requested]
    assert len(asked) == 15 and {row.consumed for row in asked} == {"int8"}
    stated = {output.name: output.sqnr_db for output in done.report.check.outputs}
    assert set(stated) == {"logits", *(f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value"))}
    assert min(stated.values()) > 25
    low = arithmetic.session(tmp_path / "out" / "net.int8.onnx")
    steps = list(tool.decode(floating, low, starts[0], 32, pairs))
    assert tool.drift_db(steps) < tool.DRIFT_DB
    assert past is not None or tool.sqnr_db(steps) > stated["logits"] - 3


def test_the_engine_takes_an_empty_cache(tmp_path: Path) -> None:
    samples = [step(past, length, layers=1, seed=past) for past, length in ((0, 8), (8, 1), (12, 1), (20, 1))]
    done = deployed(llama(layers=1), samples, tmp_path)
    manifest = (done.folder / "net.engine.manifest.json").read_text()
    assert '"1x2x0x16:1x2x20x16:1x2x20x16"' in manifest and '"1x1:1x1:1x8"' in manifest
