"""What the tool that decodes step by step feeds back."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest
from places import ROOT


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("decode_steps")


def test_caches_are_paired_by_name_or_as_said(tool: ModuleType) -> None:
    inputs = ["input_ids", "past_key_values.0.decoder.key", "past_key_values.0.encoder.key", "state"]
    pairs = tool.pairs_of(inputs, ["logits", "present.0.decoder.key", "new_state"], {"state": "new_state"})
    assert pairs == {"past_key_values.0.decoder.key": "present.0.decoder.key", "state": "new_state"}


def test_the_next_step_has_a_longer_mask_and_the_next_position(tool: ModuleType) -> None:
    sample = {
        "input_ids": np.array([[4, 5]]),
        "attention_mask": np.array([[0, 1]]),
        "bias_mask": np.float32([[-1e9, 0]]),
        "position_ids": np.array([[0, 1]]),
        "past.0": np.zeros((1, 2, 0, 4), np.float32),
        "encoder": np.ones((1, 3), np.float32),
    }
    after = tool.following(sample, {"present.0": np.ones((1, 2, 2, 4))}, {"past.0": "present.0"}, np.array([[7]]))
    assert after["input_ids"].tolist() == [[7]] and after["position_ids"].tolist() == [[2]]
    assert after["attention_mask"].tolist() == [[0, 1, 1]] and after["bias_mask"][0, -1] == 0
    assert after["past.0"].shape == (1, 2, 2, 4) and after["encoder"] is sample["encoder"]


def test_drift_is_what_the_own_cache_costs_the_last_quarter(tool: ModuleType) -> None:
    steps = [tool.Step(signal=100.0, own=1.0 if i < 6 else 10.0, fresh=1.0, agrees=True) for i in range(8)]
    assert tool.drift_db(steps) == pytest.approx(10) and tool.sqnr_db(steps, fresh=True) == pytest.approx(20)
