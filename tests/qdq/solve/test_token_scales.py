"""FPTQ's classes with thresholds chosen from data: per token only where it is felt beside the weights' noise."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal, quantized

from qdq.core.errors import InputError
from qdq.core.qtensor import from_codes, to_codes
from qdq.measure.collect import collect
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import V0, V1, Settings
from qdq.plan.weighted_node import by_data, weighted_nodes
from qdq.solve.activations import activation_params
from qdq.solve.equalize import predicted_error

AUTO = {"scheme": "fptq", "block": 16, "v0": "auto", "v1": "auto"}


def model_and_data(kind: str) -> tuple[Model, list[graphs.Sample]]:
    """A product of 64 inputs whose data are alike, or of unlike channels, or of unlike rows."""
    channels = np.geomspace(1, 100, 64).astype(np.float32) if kind == "channels" else np.ones(64, np.float32)
    model = build([node("MatMul", "x w", "y")], {"x": (40, 64)}, {"w": normal(64, 32) / channels[:, None]})
    rows = np.geomspace(1, 300, 40).astype(np.float32)[:, None] if kind == "rows" else np.float32(1)
    return model, [{"x": s["x"] * channels * rows} for s in graphs.samples(model, 4)]


@pytest.mark.parametrize(("kind", "tokens", "divided"), [("alike", 0, 0), ("channels", 0, 1), ("rows", 1, 0)])
def test_each_tensor_gets_what_its_error_asks_for(kind: str, tokens: int, divided: int) -> None:
    model, data = model_and_data(kind)
    solution = quantized(model, data, **AUTO).solution
    assert (len(solution.tokens), len(solution.divisors)) == (tokens, divided)
    assert any(
        note.startswith(f"{len(solution.tokens)} of 1 tensors have one INT8 scale per token") for note in solution.notes
    )


def test_predicted_errors_are_those_of_the_products() -> None:
    model, data = model_and_data("channels")
    plan = placement.plan(model, Settings(**AUTO))
    table = collect(model, plan, data)
    params = activation_params(model, plan, table, {})
    readers = by_data(weighted_nodes(model, plan).values())
    (found,) = predicted_error.errors(model, readers, params, {}, data).values()
    x = np.concatenate([s["x"] for s in data]).astype(np.float64)
    w = model.array("w").astype(np.float64)
    rounded = from_codes(to_codes(x, params["x"]), params["x"]).astype(np.float64)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    by_row = np.rint(x / step) * step
    signal = np.square(x) @ np.square(w).sum(axis=1)
    # columns of the error have little in common, which is all that the prediction assumes
    for predicted, made in ((found.data, rounded), (found.tokens, by_row)):
        measured = float(np.mean(np.sum(((made - x) @ w) ** 2, axis=1) / signal))
        assert predicted == pytest.approx(measured, rel=0.3)
    blocks = w.reshape(4, 16, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
    error = (np.rint(blocks / scale) * scale - blocks).reshape(64, 32)
    assert found.weights == pytest.approx(float(np.mean(np.sum((x @ error) ** 2, axis=1) / signal)), rel=0.3)


def test_without_samples_auto_is_the_papers_numbers_and_a_note_says_so() -> None:
    model, data = model_and_data("alike")
    plan = placement.plan(model, Settings(**AUTO))
    solution = graphs.solve.solve(model, plan, collect(model, plan, data))
    assert not solution.tokens
    assert any(f"auto stands for {V0:g} and {V1:g}" in note for note in solution.notes)


def test_settings_take_numbers_as_text_and_auto() -> None:
    assert (Settings(v0="3", v1="4.5").v0, Settings(v0="3", v1="4.5").v1) == (3.0, 4.5)
    assert (Settings(v0="auto", v1=7).v0, Settings(v0=2, v1="auto").v1) == ("auto", "auto")
    assert Settings.from_mapping(Settings(v1="auto").to_mapping()).v1 == "auto"
    with pytest.raises(InputError, match="v1 is 'some': it must be a number of at least v0, or auto"):
        Settings(v1="some")
