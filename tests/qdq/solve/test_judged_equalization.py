"""Equalize 'auto': divisors and headroom of each tensor, judged on samples that its ranges were not taken from."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal

from engines.core.documents import replace
from qdq.assemble.quantize import Quantized, quantize
from qdq.measure.statistics import ChannelRange
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve.equalize.channels import TURNS, Channels, SampleChannels, candidates
from qdq.solve.equalize.choose import by_input

POWERS = np.geomspace(1, 300, 32).astype(np.float32)[np.random.default_rng(4).permutation(32)]


def outliers() -> Model:
    """x -> MatMul -> y, whose small input channels have large weights: all channels matter alike."""
    return build([node("MatMul", "x w", "y")], {"x": (64, 32)}, {"w": normal(32, 16) / POWERS[:, None]})


def steady(count: int = 9) -> list[graphs.Sample]:
    return [{"x": s["x"] * POWERS} for s in graphs.samples(outliers(), count)]


def shifting(count: int = 9) -> list[graphs.Sample]:
    """Each sample has other channels large: what was small in some is large in others."""
    rng = np.random.default_rng(7)
    return [{"x": s["x"] * POWERS[rng.permutation(32)]} for s in graphs.samples(outliers(), count)]


def growing(count: int = 9) -> list[graphs.Sample]:
    """Each sample is larger than the one before, all channels alike."""
    return [{"x": s["x"] * np.float32(1.2**i)} for i, s in enumerate(graphs.samples(outliers(), count))]


def made(data: list[graphs.Sample], model: Model | None = None, **settings: str) -> Quantized:
    chosen = replace(Settings(equalize="auto", bias_correction="off"), **settings)
    return quantize(model or outliers(), data, settings=chosen)


def test_outlier_channels_that_stay_are_divided() -> None:
    solution = made(steady()).solution
    assert set(solution.divisors) == {"x"}
    assert any("equalized" in note for note in solution.notes)


def test_outlier_channels_that_move_are_not() -> None:
    assert not made(shifting()).solution.divisors


def test_values_beyond_the_range_of_the_other_samples_get_headroom() -> None:
    found = made(growing())
    measured = max(float(np.abs(s["x"]).max()) for s in growing())
    params = found.solution.activations["x"]
    assert float(params.scale) * 127 > 1.2 * measured
    assert not found.solution.divisors
    assert any("wider range" in note for note in found.solution.notes)


def test_too_few_samples_to_hold_some_out_take_the_cautious_formula() -> None:
    few = steady(TURNS - 1)
    cautious = made(few, equalize="smoothquant").solution
    assert np.array_equal(made(few).solution.divisors["x"], cautious.divisors["x"])


def test_the_order_of_the_samples_changes_nothing() -> None:
    assert made(steady()).model.proto == made(steady()[::-1]).model.proto


def test_a_plan_gives_the_same_model_again() -> None:
    first = made(steady())
    assert quantize(outliers(), steady(), plan=first.plan).model.proto == first.model.proto


def test_each_sample_is_held_out_once_and_the_ends_differ_most() -> None:
    parts = tuple(
        SampleChannels(
            limits=ChannelRange(low=np.zeros(2), high=np.array([float(size), 1.0])),
            rows=np.full((1, 2), size, dtype=np.float32),
        )
        for size in (5, 1, 9, 2, 8, 4)
    )
    turns = Channels(parts=parts).turns()
    held = sorted(sorted(turn.held[:, 0].tolist()) for turn in turns)
    assert held == [[1, 2], [4, 5], [8, 9]]
    (last,) = (turn for turn in turns if 9.0 in turn.held)
    assert last.limits.high.tolist() == [5.0, 1.0]
    assert Channels(parts=parts[: TURNS - 1]).turns() == []


def depthwise() -> Model:
    """x -> depthwise Conv -> y, whose channels span a factor 300."""
    weights = {"w": normal(32, 1, 3, 3) / POWERS[:, None, None, None]}
    return build([node("Conv", "x w", "y", group=32, pads=[1, 1, 1, 1])], {"x": (1, 32, 12, 12)}, weights)


def spread(count: int = 6) -> list[graphs.Sample]:
    return [{"x": s["x"] * POWERS[:, None, None]} for s in graphs.samples(depthwise(), count)]


def noise(found: Quantized, data: list[graphs.Sample]) -> float:
    pairs = zip(graphs.run(found.prepared, data), graphs.run(found.model, data), strict=True)
    return float(sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs))


def test_the_data_of_a_depthwise_convolution_are_divided_at_no_cost_to_its_weights() -> None:
    model = depthwise()
    plan = placement.plan(model, Settings())
    nodes = weighted_nodes(model, plan)
    assert set(candidates(plan, nodes)) == {"x"}
    (reader,) = nodes.values()
    assert by_input(model, reader).shape == (32, 1, 9)
    auto, none = made(spread(), model), made(spread(), model, equalize="none")
    assert "x" in auto.solution.divisors
    assert noise(auto, spread()) < noise(none, spread()) / 20  # 24 dB between the channels on average


@pytest.mark.parametrize("calibrator", ["mse", "auto"])
def test_equalization_is_judged_with_every_calibrator(calibrator: str) -> None:
    assert "x" in made(steady(), calibrator=calibrator).solution.divisors
