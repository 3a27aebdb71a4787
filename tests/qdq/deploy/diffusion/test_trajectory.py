"""Samples along real sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from denoisers import SHAPE, denoising

from qdq import quantize
from qdq.core.errors import InputError
from qdq.deploy.diffusion.correction import noise_correction
from qdq.deploy.diffusion.schedule import Array, Schedule, cosine
from qdq.deploy.diffusion.trajectory import Denoiser, pictures, samples, walk

SCHEDULE = Schedule.spaced(cosine(), 10, clip=1.0)


def test_samples_lie_on_the_trajectories_of_the_float_model() -> None:
    model = denoising()
    visits = list(walk(Denoiser(model), SCHEDULE, shape=SHAPE, seeds=[5, 6]))
    found = list(samples(model, SCHEDULE, shape=SHAPE, seeds=[5, 6], count=20))
    assert [int(each["t"][0]) for each in found] == [t for t in SCHEDULE.steps for _ in range(2)]
    for number, each in enumerate(found):
        assert each["t"].dtype == np.int64
        assert np.array_equal(each["x"], visits[number // 2].x[number % 2 : number % 2 + 1])


def test_weights_say_how_many_each_step_gives() -> None:
    weights = [0.0] * 5 + [1.0] * 4 + [4.0]
    found = samples(denoising(), SCHEDULE, shape=SHAPE, seeds=[0], count=16, weights=weights)
    assert Counter(int(each["t"][0]) for each in found) == {400: 2, 300: 2, 200: 2, 100: 2, 0: 8}


@pytest.mark.parametrize("weights", [[1.0], [-1.0] * 10, [0.0] * 10, [float("nan")] * 10])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="10 finite numbers"):
        list(samples(denoising(), SCHEDULE, shape=SHAPE, seeds=[0], weights=weights))


@pytest.mark.parametrize("count", [0, -3])
def test_no_samples_are_refused(count: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        list(samples(denoising(), SCHEDULE, shape=SHAPE, seeds=[0], count=count))


@pytest.mark.parametrize("seeds", [[], [3, -1], np.array([], int)])
def test_seeds_that_are_none_are_refused(seeds: list[int]) -> None:
    with pytest.raises(InputError, match="whole numbers from 0 on"):
        pictures(Denoiser(denoising()), SCHEDULE, shape=SHAPE, seeds=seeds)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x: np.concatenate([x, x], axis=1), "pass on the noise alone"),
        (lambda x: x[:, :1], "both must be the same"),
        (lambda x: np.where(x > 0, x, np.nan), "not finite"),
    ],
)
def test_predictions_that_are_no_noise_are_refused(wrong: Callable[[Array], Array], said: str) -> None:
    """What numpy would stretch, and what would spoil every later step."""
    exact = Denoiser(denoising())

    def late(x: Array, t: int) -> Array:
        return wrong(exact(x, t)) if t < 500 else exact(x, t)

    with pytest.raises(InputError, match=rf"At step 400 .*{said}"):
        pictures(late, SCHEDULE, shape=SHAPE, seeds=[0])
    with pytest.raises(InputError, match=rf"At step 400 .*{said}"):
        noise_correction(exact, late, SCHEDULE, shape=SHAPE, seeds=[0])


def test_a_picture_depends_on_its_own_seed_alone() -> None:
    predict = Denoiser(denoising())
    both = pictures(predict, SCHEDULE, shape=SHAPE, seeds=[3, 4])
    assert np.allclose(both[1:], pictures(predict, SCHEDULE, shape=SHAPE, seeds=[4]), atol=1e-5)
    assert not np.allclose(both[0], both[1], atol=0.1)


def test_a_file_and_inputs_of_ones_own(tmp_path: Path) -> None:
    onnx.save(denoising(), tmp_path / "model.onnx")
    x = np.ones((2, *SHAPE), np.float32)
    own = Denoiser(tmp_path / "model.onnx", inputs=lambda x, t: {"x": x, "t": np.full(len(x), t)})
    assert np.array_equal(own(x, 7), Denoiser(denoising())(x, 7))


def test_calibration_takes_them() -> None:
    model = denoising()
    found = list(samples(model, SCHEDULE, shape=SHAPE, seeds=[0, 1], count=10))
    assert quantize(model, found).plan.quantized_nodes


def test_a_model_with_other_inputs_is_refused() -> None:
    model = denoising()
    model.graph.input.append(onnx.helper.make_tensor_value_info("text", 1, ["batch", 4, 4]))
    with pytest.raises(InputError, match=r"inputs are \['x', 't', 'text'\]"):
        Denoiser(model)


def test_a_model_of_one_picture_is_refused() -> None:
    with pytest.raises(InputError, match="takes 1 pictures a run"):
        Denoiser(denoising(batch=1))
