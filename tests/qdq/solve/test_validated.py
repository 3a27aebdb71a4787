"""Equalization whose strength is validated tensor by tensor, on samples that its ranges were not made from."""

from __future__ import annotations

import graphs
import numpy as np
import pytest
from graphs import build, node, normal

from qdq.assemble.held_out import HeldOutScore, Split
from qdq.assemble.quantize import Quantized, quantize
from qdq.core.disk.spill import Spill
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve.equalize.channels import TURNS, Channels, SampleChannels, candidates
from qdq.solve.equalize.choose import by_input
from qdq.solve.equalize.formulas.validated import EXPONENTS, FLOOR, HEADROOM, scales

CHANNELS, COUNT = 32, 9
POWERS = np.geomspace(1, 1 / 8, CHANNELS).astype(np.float32)[np.random.default_rng(4).permutation(CHANNELS)]


def depthwise() -> Model:
    """x -> depthwise Conv -> y, whose filters make all channels matter alike."""
    weight = normal(CHANNELS, 1, 3, 3) / POWERS[:, None, None, None]
    return build([node("Conv", "x w", "y", group=CHANNELS)], {"x": (1, CHANNELS, 12, 12)}, {"w": weight})


def product(rows: int = 64) -> Model:
    """x -> MatMul -> y, of the same kind."""
    return build([node("MatMul", "x w", "y")], {"x": (rows, CHANNELS)}, {"w": normal(CHANNELS, 16) / POWERS[:, None]})


def steady(model: Model, count: int = COUNT) -> list[graphs.Sample]:
    """Every channel keeps its size."""
    return [_times(s["x"], POWERS) for s in graphs.samples(model, count)]


def moving(model: Model) -> list[graphs.Sample]:
    """Each sample has other channels large, by far more than the headroom."""
    rng = np.random.default_rng(7)
    return [_times(s["x"], np.square(POWERS[rng.permutation(CHANNELS)])) for s in graphs.samples(model, COUNT)]


def _times(x: np.ndarray, powers: np.ndarray) -> graphs.Sample:
    return {"x": (x * (powers[:, None, None] if x.ndim == 4 else powers)).astype(np.float32)}


def made(model: Model, data: list[graphs.Sample], equalize: str = "validated") -> Quantized:
    settings = Settings(equalize=equalize, rounding="nearest", shift=False, bias_correction="off", calibrator="max")
    return quantize(model, data, settings=settings)


def sqnr_db(model: Model, found: Quantized, data: list[graphs.Sample]) -> float:
    score = HeldOutScore(model, Split(samples=data, fit=(), held=frozenset(range(len(data)))))
    return score.sqnr_db(found.model)


def test_in_front_of_a_depthwise_convolution_channels_get_ranges_of_their_own() -> None:
    model = depthwise()
    data, later = steady(model), steady(model, 2 * COUNT)[COUNT:]
    found = made(model, data)
    divisors = found.solution.divisors["x"]
    ranges = np.max([np.abs(s["x"]).max(axis=(0, 2, 3)) for s in data], axis=0)
    exponents = [a for a, _ in EXPONENTS if np.allclose(divisors, (ranges / ranges.max()) ** a, rtol=1e-5)]
    assert exponents and exponents[0] >= 0.5  # the weights have no say: each channel has a scale of its own
    scale = float(found.solution.activations["x"].scale)
    assert scale * 127 == pytest.approx(HEADROOM * (ranges / divisors).max(), rel=1e-5)
    plain, gentle = (sqnr_db(model, made(model, data, e), later) for e in ("none", "smoothquant"))
    assert sqnr_db(model, found, later) > max(plain, gentle) + 2


def test_channels_that_do_not_keep_their_ranges_are_left_alone() -> None:
    for model in (depthwise(), product()):
        assert not made(model, moving(model)).solution.divisors


def test_no_channel_is_narrower_than_the_floor() -> None:
    ranges = np.array([1.0, 0.5, 1e-6, 0.0])
    assert scales(ranges, np.ones(4), (1.0, 0.0)).tolist() == [1.0, 0.5, FLOOR, FLOOR]


def test_a_tensor_of_one_vector_a_sample_gets_more_headroom() -> None:
    many, one = product(), product(rows=1)
    reaches = []
    for model in (many, one):
        data = steady(model, 3 * COUNT)
        found = made(model, data).solution
        divided = max(float(np.abs(s["x"] / found.divisors["x"]).max()) for s in data)
        reaches.append(float(found.activations["x"].scale) * 127 / divided)
    np.testing.assert_allclose(reaches, (HEADROOM, 2 * HEADROOM), rtol=1e-3)


def test_too_few_samples_validate_nothing() -> None:
    model = depthwise()
    assert not made(model, steady(model, 2)).solution.divisors


def test_the_order_of_the_samples_changes_no_bit() -> None:
    model = depthwise()
    data = steady(model)
    forth, back = (made(model, order).solution for order in (data, data[::-1]))
    assert np.array_equal(forth.divisors["x"], back.divisors["x"]) and forth.activations == back.activations


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
