"""What a denoising model is asked along real sampling: its pictures, and the samples that calibration wants.

model -> `Denoiser`; it and a `Schedule` -> `walk` -> `Visit`s -> `pictures`, or `samples` of calibration or evaluation.
Every picture draws its noise from a seed of its own, so that two models, or other batches, see the same.
Must not know of quantization.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engines.core import arithmetic, onnx_runtime
from qdq.core.errors import InputError
from qdq.deploy.diffusion.schedule import Array, Schedule, Step
from qdq.model.graphsurgeon import ModelSource
from qdq.model.model import Model
from qdq.model.storage import load

Sample = dict[str, np.ndarray]
Predict = Callable[[Array, int], Array]
"""Noisy pictures (N, C, ...) float32 and a training step -> the noise in them, of the same shape."""


class Correction(Protocol):
    """What a sampler knows of a model's errors; see `qdq.deploy.diffusion.correction`."""

    def noise(self, predicted: Array, t: int) -> Array:
        """Predicted noise without what is foreseen of its error."""

    def excess(self, t: int) -> float:
        """The variance of the error that is left."""


def sample_of(model: Model) -> Callable[[Array, int], Sample]:
    """How a model with two inputs is asked: the one of more dimensions gets the pictures, the other the step.

    Raises:
        InputError: it has other inputs, or is of so many pictures.
    """
    found = sorted(model.inputs, key=lambda fed: -len(fed.shape or ()))
    if len(found) != 2 or len(found[0].shape or ()) < 2 or len(found[1].shape or ()) > 1:
        raise InputError(
            f"The model's inputs are {[fed.name for fed in model.inputs]}: noisy pictures and the number of a step, a "
            "scalar or one for each picture, are needed. Give `inputs`, a function from both to all inputs by name."
        )
    pictures, step = found
    if isinstance(batch := (pictures.shape or (None,))[0], int):
        raise InputError(
            f"The model takes {batch} pictures a run, no more and no fewer: export it with an open batch, the first "
            f"axis of {pictures.name!r}."
        )

    def asked(x: Array, t: int) -> Sample:
        return {pictures.name: x, step.name: np.full(len(x) if step.shape else (), t, step.dtype)}

    return asked


class Denoiser:
    """A model, float or quantized, in ONNX Runtime, in the arithmetic of its file: a `Predict`.

    Attributes:
        sha256: of the model.
    """

    def __init__(
        self, model: Model | ModelSource, *, inputs: Callable[[Array, int], Mapping[str, np.ndarray]] | None = None
    ) -> None:
        """Open it.

        Args:
            model: whose first output is the predicted noise.
            inputs: pictures and step to all of its inputs by name; None as `sample_of`.

        Raises:
            InputError, ModelError: it cannot be read, or has other inputs.
        """
        loaded = _loaded(model)
        self.sha256, self._asked = loaded.sha256, inputs or sample_of(loaded)
        file = os.fspath(model) if isinstance(model, str | os.PathLike) else None
        self._session = arithmetic.session(file or loaded.proto)

    def __call__(self, x: Array, t: int) -> Array:
        """The noise in some pictures, all at one step."""
        (found,) = onnx_runtime.run(self._session, [self._asked(x, t)])
        return np.asarray(next(iter(found.values())), np.float32)


def predicted(predict: Predict, x: Array, t: int) -> Array:
    """What a model says of pictures at a step.

    Raises:
        InputError: its answer has another shape, which the sampler's arithmetic might stretch, or is not finite.
    """
    noise = predict(x, t)
    if noise.shape != x.shape:
        raise InputError(
            f"At step {t} the model predicts noise of shape {list(noise.shape)} for pictures of {list(x.shape)}: both "
            "must be the same. Of a model that predicts more, as a variance, pass on the noise alone."
        )
    if not np.isfinite(noise).all():
        raise InputError(
            f"At step {t} the model predicts {np.count_nonzero(~np.isfinite(noise))} of {noise.size} values that are "
            "not finite. Check that its float part holds its values, with --rest fp32, and what it is fed."
        )
    return noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One step of sampling: what the model got and said, and what became of it."""

    step: Step
    x: Array
    noise: Array
    after: Array


def walk(
    predict: Predict,
    schedule: Schedule,
    *,
    shape: Sequence[int],
    seeds: Sequence[int],
    correction: Correction | None = None,
) -> Iterator[Visit]:
    """Sample pictures, step by step.

    Args:
        shape: of one picture, (C, ...).
        seeds: of each picture's noise, the one it starts from and what the sampler adds.
        correction: of the model's errors.

    Raises:
        InputError: no seeds, or one below 0; and see `predicted`.
    """
    if len(seeds) == 0 or min(seeds) < 0:
        raise InputError(f"The seeds are {list(seeds)[:5]}: whole numbers from 0 on are needed, one for each picture.")
    sources = [np.random.default_rng(seed) for seed in seeds]

    def drawn() -> Array:
        return np.stack([source.standard_normal(tuple(shape), np.float32) for source in sources])

    x = drawn()
    for step in schedule:
        noise = predicted(predict, x, step.t)
        told = noise if correction is None else correction.noise(noise, step.t)
        excess = 0.0 if correction is None else correction.excess(step.t)
        after = step.next(x, told, drawn(), excess=excess)
        yield Visit(step=step, x=x, noise=noise, after=after)
        x = after


def pictures(
    predict: Predict,
    schedule: Schedule,
    *,
    shape: Sequence[int],
    seeds: Sequence[int],
    correction: Correction | None = None,
) -> Array:
    """What sampling ends with: (seeds, C, ...); arguments as of `walk`."""
    *_, last = walk(predict, schedule, shape=shape, seeds=seeds, correction=correction)
    return last.after


def samples(
    model: Model | ModelSource,
    schedule: Schedule,
    *,
    shape: Sequence[int],
    seeds: Sequence[int],
    count: int = 128,
    weights: Sequence[float] | None = None,
    inputs: Callable[[Array, int], Mapping[str, np.ndarray]] | None = None,
) -> Iterator[Sample]:
    """What the float model sees while it samples: the samples for calibration, each of one picture at one step.

    Each step gives as many as its weight says, of the pictures in turn, for a calibration counts every sample once.

    Args:
        model: the float model.
        count: of samples.
        weights: of each step of the schedule, in the order of sampling; None weighs all alike.
        inputs: as of `Denoiser`.

    Raises:
        InputError: as `Denoiser` and `walk`; weights that are none, or no samples are asked for.
    """
    if count < 1:
        raise InputError(f"{count} samples are asked for: at least 1 is needed.")
    share = np.ones(len(schedule.steps)) if weights is None else np.asarray(weights, np.float64)
    if share.shape != (len(schedule.steps),) or not np.all(share >= 0) or not 0 < share.sum() < np.inf:
        raise InputError(
            f"The weights of steps have shape {share.shape}: {len(schedule.steps)} finite numbers from 0 on, not all "
            "0, are needed, one for each step of the schedule."
        )
    asked = inputs or sample_of(_loaded(model))
    ends = np.round(np.cumsum(share) / share.sum() * count).astype(int)
    taken = 0
    visits = walk(Denoiser(model, inputs=inputs), schedule, shape=shape, seeds=seeds)
    for visit, end in zip(visits, ends, strict=True):
        for index in range(taken, int(end)):
            row = index % len(seeds)
            yield {name: np.asarray(array) for name, array in asked(visit.x[row : row + 1], visit.step.t).items()}
        taken = int(end)


def _loaded(model: Model | ModelSource) -> Model:
    return model if isinstance(model, Model) else load(model)
