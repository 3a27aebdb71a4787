"""The line and the rest of quantization's noise, measured and taken out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from denoisers import SHAPE, denoising

from qdq import InputError, StaleFileError, quantize
from qdq.deploy.diffusion.correction import NoiseCorrection, noise_correction
from qdq.deploy.diffusion.schedule import Array, Schedule, cosine
from qdq.deploy.diffusion.trajectory import Denoiser, Predict, pictures, samples
from qdq.deploy.report.schemas import schema

KEPT, SPREAD = cosine(), 0.5
SCHEDULE = Schedule.spaced(KEPT, 25)
GAIN, BIAS = np.array([0.9, 1.2, 1.0]).reshape(3, 1, 1), np.array([0.1, 0.0, -0.2]).reshape(3, 1, 1)


def gaussian(x: Array, t: int) -> Array:
    """The best prediction for pictures whose pixels are normal with a deviation of `SPREAD`."""
    return np.asarray(np.sqrt(1 - KEPT[t]) / (KEPT[t] * SPREAD**2 + 1 - KEPT[t]) * x, np.float32)


def noisy(rest: float, seed: int = 0) -> Predict:
    """Such a prediction with gain, bias and noise of a deviation."""
    random = np.random.default_rng(seed)
    return lambda x, t: np.asarray(GAIN * gaussian(x, t) + BIAS + rest * random.standard_normal(x.shape), np.float32)


@pytest.fixture(scope="module")
def correction() -> NoiseCorrection:
    return noise_correction(gaussian, noisy(0.6), SCHEDULE, shape=(3, 16, 16), seeds=range(20))


def test_gain_bias_and_variance_are_found(correction: NoiseCorrection) -> None:
    assert [step.t for step in correction.steps] == list(SCHEDULE.steps) and correction.pictures == 20
    for step in correction.steps[:-3]:
        assert np.allclose(step.gain, GAIN.ravel(), atol=0.05)
        assert np.allclose(step.bias, BIAS.ravel(), atol=0.06)
        assert step.variance == pytest.approx(np.mean(0.36 / GAIN**2), rel=0.15)
        assert step.corrected_db > step.sqnr_db


def test_chance_is_no_gain_or_bias() -> None:
    random = np.random.default_rng(0)

    def chance(x: Array, t: int) -> Array:
        return np.asarray(gaussian(x, t) + random.standard_normal(x.shape), np.float32)

    found = noise_correction(gaussian, chance, SCHEDULE, shape=(3, 8, 8), seeds=range(8))
    assert np.mean([gain == 1 for step in found.steps for gain in step.gain]) > 0.5
    assert np.mean([bias == 0 for step in found.steps for bias in step.bias]) > 0.3


def test_the_line_is_taken_out(correction: NoiseCorrection) -> None:
    x = np.random.default_rng(1).standard_normal((4, 3, 16, 16), np.float32)
    assert np.allclose(correction.noise(noisy(0)(x, 800), 800), gaussian(x, 800), atol=0.15)
    assert correction.noise(x, 800).dtype == np.float32


def test_between_two_steps_values_are_interpolated(correction: NoiseCorrection) -> None:
    a, b = correction.steps[:2]
    assert correction.excess((a.t + b.t) // 2) == pytest.approx((a.variance + b.variance) / 2)
    assert correction.excess(999) == a.variance


def test_ddpm_with_a_noisy_model_draws_pictures_of_the_right_variance(correction: NoiseCorrection) -> None:
    """What a sampler adds and what the model adds are together what the schedule wants."""
    drawn = {
        name: pictures(predict, SCHEDULE, shape=(3, 16, 16), seeds=range(50, 70), correction=known).var()
        for name, predict, known in (
            ("float", gaussian, None),
            ("corrected", noisy(0.6, seed=1), correction),
            ("line", noisy(0.6, seed=1), NoiseCorrection(pictures=1, steps=still(correction))),
        )
    }
    assert abs(drawn["corrected"] / drawn["float"] - 1) < 0.05 < drawn["line"] / drawn["float"] - 1


def still(correction: NoiseCorrection) -> tuple[object, ...]:
    """Its steps, as if there were no noise but the line's."""
    import msgspec

    return tuple(msgspec.structs.replace(step, variance=0.0) for step in correction.steps)


def test_ddim_is_corrected_by_the_line_alone(correction: NoiseCorrection) -> None:
    ddim = replace(SCHEDULE, eta=0.0)
    wanted, plain, corrected = (
        pictures(predict, ddim, shape=(3, 16, 16), seeds=[90], correction=known)
        for predict, known in ((gaussian, None), (noisy(0), None), (noisy(0), correction))
    )
    assert np.square(corrected - wanted).sum() < np.square(plain - wanted).sum() / 4


def test_steps_side_by_side_show_a_line_that_one_alone_does_not() -> None:
    """A bias that is a thousandth of the error's energy at each step adds up, and is found."""
    random = np.random.default_rng(0)

    def coarse(x: Array, t: int) -> Array:
        return np.asarray(gaussian(x, t) + 0.01 + 0.3 * random.standard_normal(x.shape), np.float32)

    alone, together = (
        [
            bias
            for step in noise_correction(gaussian, coarse, SCHEDULE, shape=(3, 16, 16), seeds=range(4), near=near).steps
            for bias in step.bias
        ]
        for near in (0, 8)
    )
    assert np.square(np.array(together) - 0.01).mean() < np.square(np.array(alone) - 0.01).mean() / 2


def test_a_quantized_network_comes_nearer() -> None:
    model, schedule = denoising(), Schedule.spaced(KEPT, 8, eta=0.0, clip=1.0)
    data = list(samples(model, schedule, shape=SHAPE, seeds=range(4), count=16))
    exact, coarse = Denoiser(model), Denoiser(quantize(model, data).model)
    found = noise_correction(exact, coarse, schedule, shape=SHAPE, seeds=range(10, 18))
    assert all(10 < step.sqnr_db <= step.corrected_db for step in found.steps)


def test_the_file_is_read_as_it_was_written(correction: NoiseCorrection, tmp_path: Path) -> None:
    correction.save(tmp_path / "noise.json")
    assert NoiseCorrection.load(tmp_path / "noise.json") == correction
    jsonschema.validate(json.loads((tmp_path / "noise.json").read_text()), schema("noise-correction"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gain", [0.0, 1.0, 1.0]),
        ("bias", [0.0]),
        ("bias", [float("nan"), 0.0, 0.0]),
        ("gain", [float("inf"), 1.0, 1.0]),
        ("variance", -1.0),
    ],
)
def test_a_file_without_a_usable_line_is_refused(
    correction: NoiseCorrection, tmp_path: Path, field: str, value: object
) -> None:
    plain = correction.to_mapping()
    plain["steps"][3][field] = value
    (tmp_path / "noise.json").write_text(json.dumps(plain))
    with pytest.raises(InputError, match=r"noise\.json: falling steps"):
        NoiseCorrection.load(tmp_path / "noise.json")


def test_a_correction_of_another_model_is_refused(tmp_path: Path) -> None:
    model, schedule = Denoiser(denoising()), Schedule.spaced(KEPT, 2)
    noise_correction(gaussian, gaussian, schedule, shape=SHAPE, seeds=[0]).save(tmp_path / "any.json")
    noise_correction(model, model, schedule, shape=SHAPE, seeds=[0]).save(tmp_path / "own.json")
    for name in ("any", "own"):
        assert NoiseCorrection.load(tmp_path / f"{name}.json", sha256=model.sha256).pictures == 1
    with pytest.raises(StaleFileError, match="measure it again"):
        NoiseCorrection.load(tmp_path / "own.json", sha256="0" * 64)


def test_other_channels_are_refused(correction: NoiseCorrection) -> None:
    with pytest.raises(InputError, match="3 channels"):
        correction.noise(np.zeros((1, 4, 8, 8), np.float32), 0)


def test_a_model_of_another_thing_is_refused() -> None:
    with pytest.raises(InputError, match="at every step"):
        noise_correction(gaussian, lambda x, t: -gaussian(x, t), SCHEDULE, shape=(3, 4, 4), seeds=[0])
    with pytest.raises(InputError, match="0 seeds"):
        noise_correction(gaussian, gaussian, SCHEDULE, shape=(3, 4, 4), seeds=[])
    with pytest.raises(InputError, match="-1 steps to each side"):
        noise_correction(gaussian, gaussian, SCHEDULE, shape=(3, 4, 4), seeds=[0], near=-1)
