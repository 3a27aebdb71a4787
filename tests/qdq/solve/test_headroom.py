"""Headroom of tensors of which a sample shows one vector, judged on samples that the range was not taken from."""

from __future__ import annotations

import graphs
import numpy as np
from graphs import build, node, normal

from qdq.assemble.quantize import Quantized, quantize
from qdq.core.disk.spill import Spill
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve.equalize.channels import TURNS, Channels, SampleChannels, candidates
from qdq.solve.equalize.choose import by_input


def head(rows: int = 1) -> Model:
    """x -> MatMul -> y, as a classifier reads the means of an image."""
    return build([node("MatMul", "x w", "y")], {"x": (rows, 32)}, {"w": normal(32, 16)})


def growing(rows: int = 1, count: int = 12) -> list[graphs.Sample]:
    """Each sample is larger than the one before: what was held out goes beyond the others."""
    return [{"x": s["x"] * np.float32(1.15**i)} for i, s in enumerate(graphs.samples(head(rows), count))]


def steady(count: int = 12) -> list[graphs.Sample]:
    """Every sample has the same largest value."""
    return [{"x": (s["x"] / np.abs(s["x"]).max()).astype(np.float32)} for s in graphs.samples(head(), count)]


def made(data: list[graphs.Sample], rows: int = 1) -> Quantized:
    settings = Settings(equalize="none", rounding="nearest", shift=False, bias_correction="off", calibrator="max")
    return quantize(head(rows), data, settings=settings)


def reach(found: Quantized, data: list[graphs.Sample]) -> float:
    """The range of the codes over the largest value of the samples."""
    return float(found.solution.activations["x"].scale) * 127 / max(float(np.abs(s["x"]).max()) for s in data)


def test_what_samples_held_out_go_beyond_gets_headroom() -> None:
    data = growing()
    found = made(data)
    assert reach(found, data) > 1.2
    assert any("wider range" in note for note in found.solution.notes)


def test_what_they_keep_within_gets_none() -> None:
    found = made(steady())
    assert abs(reach(found, steady()) - 1) < 0.02  # half a code of 127, and the rounding of the scale
    assert not any("wider range" in note for note in found.solution.notes)


def test_a_tensor_of_many_vectors_a_sample_is_left_alone() -> None:
    data = growing(rows=8)
    assert abs(reach(made(data, rows=8), data) - 1) < 0.02


def test_too_few_samples_to_hold_some_out_give_none() -> None:
    few = growing(count=TURNS - 1)
    assert abs(reach(made(few), few) - 1) < 0.02


def test_the_order_of_the_samples_changes_nothing() -> None:
    assert made(growing()).model.proto == made(growing()[::-1]).model.proto


def test_each_sample_is_held_out_once_and_the_ends_differ_most() -> None:
    spill = Spill("channel vectors")
    parts = tuple(
        SampleChannels(
            ends=spill.put(np.array([[0, 0], [size, 1]], dtype=np.float32)),
            rows=spill.put(np.full((1, 2), size, dtype=np.float32)),
        )
        for size in (5, 1, 9, 2, 8, 4)
    )
    turns = Channels(parts=parts).turns()
    held = sorted(sorted(turn.held[:, 0].tolist()) for turn in turns)
    assert held == [[1, 2], [4, 5], [8, 9]]
    (last,) = (turn for turn in turns if 9.0 in turn.held)
    assert last.limits.high.tolist() == [5.0, 1.0]
    assert Channels(parts=parts[: TURNS - 1]).turns() == []


def test_the_data_of_a_depthwise_convolution_are_divided_at_no_cost_to_its_weights() -> None:
    powers = np.geomspace(1, 300, 32).astype(np.float32)[np.random.default_rng(4).permutation(32)]
    weights = {"w": normal(32, 1, 3, 3) / powers[:, None, None, None]}
    model = build([node("Conv", "x w", "y", group=32, pads=[1, 1, 1, 1])], {"x": (1, 32, 12, 12)}, weights)
    data = [{"x": s["x"] * powers[:, None, None]} for s in graphs.samples(model, 6)]
    plan = placement.plan(model, Settings())
    nodes = weighted_nodes(model, plan)
    assert set(candidates(plan, nodes)) == {"x"}
    (reader,) = nodes.values()
    assert by_input(model, reader).shape == (32, 1, 9)

    def noise(equalize: str) -> float:
        settings = Settings(equalize=equalize, rounding="nearest", shift=False, bias_correction="off")
        done = quantize(model, data, settings=settings)
        assert ("x" in done.solution.divisors) == (equalize != "none")
        pairs = zip(graphs.run(model, data), graphs.run(done.model, data), strict=True)
        return float(sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs))

    assert noise("smoothquant") < noise("none") / 2  # the formula asks for a predicted 3 dB
