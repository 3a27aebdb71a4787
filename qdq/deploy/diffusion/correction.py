"""What quantization adds to the noise that a diffusion model predicts, and a sampler that takes it out again.

float and quantized model along the float model's sampling -> `measured` -> `NoiseCorrection` -> file -> sampler.

At each step, in each channel, the quantized model's output is a straight line of the float model's, and a rest:

    quantized = gain * float + bias + rest

The gain is 1 and the correlation of PTQD, which comes of codes that are too coarse or clipped. The sampler gets
(quantized - bias) / gain. The rest is noise like the one that the sampler adds itself, which adds as much less: the
variance of the rest over gain squared, times the square of how far an error of the prediction moves the next picture. A
sampler that adds none (DDIM) gets the line alone.

Must not run a model but through the functions it is given. Source: He et al., PTQD, arXiv 2305.10657.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from engines.core.documents import Document, Measured, Part
from qdq.assemble.held_out import decibels
from qdq.core.errors import InputError, StaleFileError
from qdq.core.files import read_document, write_text
from qdq.deploy.diffusion.schedule import Array, Schedule
from qdq.deploy.diffusion.trajectory import Predict, predicted, walk


class StepNoise(Part, frozen=True, kw_only=True):
    """What quantization does at one step.

    Attributes:
        t: the training step.
        gain: of each channel.
        bias: of each channel.
        variance: of what is left of the error behind the correction, the mean of the channels.
        sqnr_db: of the quantized model's output, 10 log10(signal / noise).
        corrected_db: the same of the corrected output, on the same pictures.
    """

    t: int
    gain: tuple[float, ...]
    bias: tuple[float, ...]
    variance: float
    sqnr_db: Measured
    corrected_db: Measured

    @property
    def usable(self) -> bool:
        """Whether a sampler can compute with it."""
        finite = np.isfinite([*self.gain, *self.bias, self.variance]).all()
        return bool(finite) and min(self.gain, default=0) > 0 and self.variance >= 0


class NoiseCorrection(Document, frozen=True, kw_only=True):
    """For the sampler of a quantized diffusion model: its output's gain, bias and noise at each step.

    Attributes:
        float_sha256: of the float model; "" of a function that has none.
        quantized_sha256: of the quantized model, likewise.
        pictures: that were sampled to measure it.
        steps: in the order of sampling; between two, values are interpolated.
    """

    FORMAT: ClassVar[str] = "qdq.noise-correction/1"
    MAKE: ClassVar[str] = "noise_correction(...).save(FILE)"

    float_sha256: str = ""
    quantized_sha256: str = ""
    pictures: int
    steps: tuple[StepNoise, ...]

    def noise(self, predicted: Array, t: int) -> Array:
        """The noise that the quantized model predicted, (N, C, ...) float32, with its gain and bias taken out.

        Raises:
            InputError: it has other channels than those measured.
        """
        channels = len(self.steps[0].gain)
        if predicted.ndim < 2 or predicted.shape[1] != channels:
            raise InputError(
                f"The predicted noise has shape {list(predicted.shape)}, and the correction is of {channels} channels, "
                "the second axis: measure it with this model."
            )
        shape = (channels,) + (1,) * (predicted.ndim - 2)
        gain, bias = (self._at(t, [getattr(step, name) for step in self.steps]) for name in ("gain", "bias"))
        return np.asarray((predicted - bias.reshape(shape)) / gain.reshape(shape), np.float32)

    def excess(self, t: int) -> float:
        """The variance of the error that is left in what `noise` gives."""
        return float(self._at(t, [(step.variance,) for step in self.steps])[0])

    def _at(self, t: int, values: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
        """Columns of values at a step, between the nearest that were measured."""
        steps = [step.t for step in reversed(self.steps)]
        return np.array([np.interp(t, steps, column) for column in zip(*reversed(values), strict=True)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sha256: str = "") -> Self:
        """Read what `save` wrote.

        Args:
            sha256: of the quantized model that it is for, `Denoiser.sha256`; "" believes the caller.

        Raises:
            StaleFileError: it was measured with another model.
            InputError: see `read_document`; it has no steps, or channels without a usable gain.
        """
        found = read_document(path, cls, "noise correction")
        if sha256 and found.quantized_sha256 not in ("", sha256):
            raise StaleFileError(
                f"The noise correction {path} is of the model {found.quantized_sha256[:12]}, and the given one "
                f"is {sha256[:12]} (sha256): measure it again, with `{cls.MAKE}`."
            )
        channels = {len(part) for step in found.steps for part in (step.gain, step.bias)}
        falling = all(a.t > b.t for a, b in zip(found.steps, found.steps[1:], strict=False))
        if len(channels) != 1 or 0 in channels or not falling or not all(step.usable for step in found.steps):
            raise InputError(
                f"Cannot use the noise correction {path}: falling steps are needed, each with a gain above 0 and a "
                f"bias for every channel and a variance of 0 or more, all finite. Make it again with `{cls.MAKE}`."
            )
        return found


@dataclass(slots=True)
class _Sums:
    """Of one step: the pixels of a picture, and each picture's (5, C): the float output's and its error's moments."""

    pixels: int = 0
    moments: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, wanted: Array, found: Array) -> None:
        """Count the outputs of some pictures, (N, C, ...)."""
        y = wanted.reshape(*wanted.shape[:2], -1).astype(np.float64)
        error = found.reshape(y.shape) - y
        self.pixels = y.shape[2]
        self.moments += list(np.stack([p.sum(2) for p in (y, error, y * y, y * error, error * error)], axis=1))

    def step(self, t: int, near: Sequence[_Sums]) -> StepNoise:
        """The line through the points of the steps near this one, and what it leaves of this one's error.

        The slope and the mean are pulled towards none by as much as they differ from picture to picture (the variance
        of a regression with clusters; James and Stein's factor), so that chance is not taken for a correlation. No
        quantizer halves or doubles an output: where a line does, the output is next to nothing, and the line is none.
        """
        each = np.sum([sums.moments for sums in near], axis=0) / len(near)
        y, error, square, product, _ = each.mean(0) / self.pixels
        spread = square - y * y
        slope = np.divide(product - y * error, spread, out=np.zeros_like(y), where=spread > 1e-12 * square)
        rest = (each[:, 1] - slope * each[:, 0]) / self.pixels - (error - slope * y)
        tilt = (each[:, 3] - slope * each[:, 2]) / self.pixels - (error - slope * y) * each[:, 0] / self.pixels
        slope, mean = _sure(slope, (tilt - y * rest) / np.maximum(spread, 1e-300)), _sure(error, rest)
        slope = np.where((slope > -0.5) & (slope < 1), slope, 0.0)
        bias = mean - slope * y
        y, error, square, product, noise = np.mean(self.moments, axis=0) / self.pixels
        left = noise - 2 * (slope * product + bias * error) + slope**2 * square + 2 * slope * bias * y + bias**2
        left = np.maximum(left, 0) / (1 + slope) ** 2
        return StepNoise(
            t=t,
            gain=tuple((1 + slope).tolist()),
            bias=tuple(bias.tolist()),
            variance=float(left.mean()),
            sqnr_db=decibels([square.sum()], [noise.sum()]),
            corrected_db=decibels([square.sum()], [left.sum()]),
        )


def _sure(value: npt.NDArray[np.float64], deviations: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A mean over pictures, (C,), pulled towards 0 by as much as the pictures' deviations from it, (N, C), allow."""
    variance = np.square(deviations).sum(0) / (len(deviations) * max(len(deviations) - 1, 1))
    return np.asarray(value * np.maximum(0, 1 - variance / np.maximum(value * value, 1e-300)))


def noise_correction(
    float_model: Predict,
    quantized_model: Predict,
    schedule: Schedule,
    *,
    shape: Sequence[int],
    seeds: Sequence[int],
    batch: int = 8,
    near: int = 4,
) -> NoiseCorrection:
    """Measure what quantization does at each step, along what the float model samples.

    Args:
        float_model: see `Denoiser`.
        quantized_model: the same, or an engine's.
        shape: of one picture, (C, ...).
        seeds: one for each picture; others than those that results are judged on.
        batch: pictures in a run.
        near: steps to each side whose pictures count for a step's line too. A line that is next to nothing of the error
            at one step adds up over all of them, and is seen only where many pictures agree.

    Raises:
        InputError: no seeds, see `walk` and `predicted`, or at no step the quantized model is nearer to the float model
            than nothing is.
    """
    if len(seeds) == 0 or batch < 1 or near < 0:
        raise InputError(
            f"{len(seeds)} seeds in batches of {batch} with {near} steps to each side are given: at least one seed, "
            "batches of 1 and 0 steps are needed."
        )
    sums = {int(t): _Sums() for t in schedule.steps}
    for start in range(0, len(seeds), batch):
        for visit in walk(float_model, schedule, shape=shape, seeds=seeds[start : start + batch]):
            t = visit.step.t
            sums[t].add(visit.noise, predicted(quantized_model, visit.x, t))
    held = list(sums.values())
    steps = tuple(sums[t].step(t, held[max(i - near, 0) : i + near + 1]) for i, t in enumerate(sums))
    if (best := max(step.sqnr_db for step in steps)) <= 0:
        raise InputError(
            f"The quantized model's error is as large as the float model's output at every step (SQNR of {best:.1f} dB "
            "at best): there is nothing to correct. Check that both files are of one model, and how it was calibrated."
        )
    return NoiseCorrection(
        float_sha256=getattr(float_model, "sha256", ""),
        quantized_sha256=getattr(quantized_model, "sha256", ""),
        pictures=len(seeds),
        steps=steps,
    )
