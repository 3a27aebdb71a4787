"""A quantized diffusion model along its sampling, with and without the correction of its noise.

    python tools/bench_diffusion.py DDPM.onnx OUT [--steps 100] [--pictures 5] [--schemes int8,w4a8] [--groups 4]
        [--results tools/RESULTS.md]

DDPM.onnx is of `tools/train_ddpm.py`. Every run of a sampler has the same noise. "forced" is the SQNR of the predicted
noise along the float model's own sampling, "free" that of the array that the quantized model's sampling has at the same
step, and "end" that of the pictures. OUT gets the Q/DQ models, corrections (JSON) and a grid of the pictures for each
sampler (PNG); Q/DQ models that lie there are taken as they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from results import record

from qdq import Settings, quantize, save
from qdq.assemble.held_out import decibels
from qdq.core.errors import InputError
from qdq.deploy.diffusion.correction import NoiseCorrection, StepNoise, noise_correction
from qdq.deploy.diffusion.schedule import Array, Schedule, cosine
from qdq.deploy.diffusion.trajectory import Denoiser, Predict, Sample, Visit, pictures, sample_of, samples, walk
from qdq.model.storage import load

SHAPE = (3, 32, 32)
CALIBRATED, CORRECTED = range(1000, 1008), range(2000, 2004)
"""Seeds of the pictures that calibration and the correction see; those from 0 on are judged."""
SAMPLERS = {"DDPM": 1.0, "DDIM": 0.0}


def sqnr(wanted: Array, found: Array) -> float:
    """10 log10(signal / noise)."""
    return decibels([float(np.square(wanted, dtype=np.float64).sum())], [float(np.square(found - wanted).sum())])


def random_steps(model: Path, schedule: Schedule, count: int) -> Iterator[Sample]:
    """What a user calibrates with who does not sample: pictures with noise, at training steps drawn uniformly."""
    random, asked = np.random.default_rng(0), sample_of(load(model))
    clean = pictures(Denoiser(model), schedule, shape=SHAPE, seeds=CALIBRATED)
    for index, t in enumerate(random.integers(len(schedule.kept), size=count)):
        kept = schedule.kept[int(t)]
        x = clean[index % len(clean)][None]
        noise = random.standard_normal(x.shape, np.float32)
        yield asked(np.asarray(np.sqrt(kept) * x + np.sqrt(1 - kept) * noise, np.float32), int(t))


def quantized(model: Path, out: Path, scheme: str, data: Iterator[Sample]) -> Path:
    """The Q/DQ model, made where it is not there."""
    if not out.exists():
        began = time.monotonic()
        made = quantize(model, list(data), settings=Settings(scheme=scheme))
        save(made.model, out)
        kept = [skip for skip in made.plan.skips if skip.reason]
        print(f"{out.name}: {len(made.plan.quantized_nodes)} nodes, {len(kept)} float", flush=True)
        log(f"{out.name} in {time.monotonic() - began:.0f} s")
    return out


def log(text: str) -> None:
    """For who waits: not part of the results."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """What one model does: errors in dB at each step and at the end."""

    name: str
    forced: list[float]
    free: list[float]
    final: Array


def judged(
    name: str, visits: Sequence[Visit], predict: Predict, schedule: Schedule, correction: NoiseCorrection | None
) -> Run:
    """A model against the float model's visits."""
    forced = []
    for visit in visits:
        told = predict(visit.x, visit.step.t)
        forced.append(sqnr(visit.noise, told if correction is None else correction.noise(told, visit.step.t)))
    seeds = range(len(visits[0].x))
    own = walk(predict, schedule, shape=SHAPE, seeds=seeds, correction=correction)
    free, final = [], visits[-1].after
    for visit, at in zip(visits, own, strict=True):
        free.append(sqnr(visit.after, at.after))
        final = at.after
    log(f"{name}: {free[-1]:.2f} dB")
    return Run(name, forced, free, final)


def without_variance(correction: NoiseCorrection) -> NoiseCorrection:
    """The line alone: the sampler adds all of its noise."""
    steps = tuple(
        StepNoise(**{n: getattr(s, n) for n in s.__struct_fields__} | {"variance": 0.0}) for s in correction.steps
    )
    return NoiseCorrection(pictures=correction.pictures, steps=steps)


def row(name: str, values: Sequence[float], end: float | None = None) -> str:
    """A line of the table: ten values of a hundred."""
    picked = [values[int(i)] for i in np.linspace(0, len(values) - 1, 10)]
    last = "" if end is None else f" {end:.1f}"
    return f"| {name} | " + " | ".join(f"{value:.1f}" for value in picked) + f" |{last} |"


def table(sampler: str, steps: Sequence[int], runs: Sequence[Run], float_final: Array) -> None:
    """Print what a sampler came to."""
    picked = [steps[int(i)] for i in np.linspace(0, len(steps) - 1, 10)]
    print(f"\n**{sampler}**, SQNR in dB at training step\n")
    print(f"| model | {' | '.join(map(str, picked))} | end |\n|---|{'---|' * 11}")
    for run in runs:
        print(row(f"{run.name}, forced", run.forced))
        print(row(f"{run.name}, free", run.free, sqnr(float_final, run.final)))
    base = {run.name: run for run in runs}
    print()
    for run in runs:
        if " + " in run.name and (plain := base.get(run.name.partition(" + ")[0])) is not None:
            each = [sqnr(w, f) - sqnr(w, p) for w, f, p in zip(float_final, run.final, plain.final, strict=True)]
            gain = sqnr(float_final, run.final) - sqnr(float_final, plain.final)
            print(f"{run.name}: {gain:+.2f} dB at the end; by seed {', '.join(f'{g:+.1f}' for g in each)}. ")


def shares(name: str, correction: NoiseCorrection) -> None:
    """Print how much of the noise the correction can take: bias and correlation, as shares of the error's energy."""
    taken = [1 - 10 ** ((step.sqnr_db - step.corrected_db) / 10) for step in correction.steps]
    slopes = [np.mean(step.gain) - 1 for step in correction.steps]
    print(
        f"{name}: bias and correlation are {100 * np.mean(taken):.0f} % of the error's energy (mean of the steps; "
        f"{100 * np.min(taken):.0f} to {100 * np.max(taken):.0f}), so that at most "
        f"{-10 * np.log10(1 - np.mean(taken)):.1f} dB can be had; gain - 1 is {np.mean(slopes):+.4f} "
        f"({np.min(slopes):+.4f} to {np.max(slopes):+.4f}). "
    )


def grid(rows: Sequence[Array], path: Path, *, zoom: int = 4) -> None:
    """One row of pictures for each model, (N, 3, 32, 32) from -1 to 1."""
    picture = np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)
    codes = ((picture.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(codes.repeat(zoom, 0).repeat(zoom, 1)).save(path)


def by_group(model: Path, out: Path, schedule: Schedule, groups: int, count: int, visits: Sequence[Visit]) -> None:
    """One range for each group of steps against one for all: SQNR of the predicted noise."""
    parts = np.array_split(np.arange(len(schedule.steps)), groups)
    print("\n| steps | one range, dB | a range of their own, dB |\n|---|---|---|")
    whole = Denoiser(out / "int8_trajectory.onnx")
    for number, part in enumerate(parts):
        weights = np.isin(np.arange(len(schedule.steps)), part).astype(float)
        data = samples(model, schedule, shape=SHAPE, seeds=CALIBRATED, count=count, weights=list(weights))
        own = Denoiser(quantized(model, out / f"int8_group{number}.onnx", "int8", data))
        picked = [visits[int(i)] for i in part[:: max(1, len(part) // 8)]]
        dbs = [np.mean([sqnr(v.noise, p(v.x, v.step.t)) for v in picked]) for p in (whole, own)]
        print(f"| {picked[0].step.t} to {picked[-1].step.t} | {dbs[0]:.2f} | {dbs[1]:.2f} |", flush=True)


def main() -> None:
    """Read options, quantize, sample, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=5, help="a seed each")
    parser.add_argument("--count", type=int, default=64, help="samples of calibration")
    parser.add_argument("--schemes", default="int8,w4a8")
    parser.add_argument("--samplers", default="DDPM,DDIM")
    parser.add_argument("--groups", type=int, default=0, help="of steps with a range of their own; 0 leaves that out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    whole = Schedule.spaced(cosine(), options.steps, clip=1.0)
    schemes = options.schemes.split(",")
    models = {}
    for scheme in schemes:
        if scheme == schemes[0]:
            data = random_steps(options.model, whole, options.count)
            path = options.out / f"{scheme}_random.onnx"
            models[f"{scheme}, random steps"] = quantized(options.model, path, scheme, data)
        data = samples(options.model, whole, shape=SHAPE, seeds=CALIBRATED, count=options.count)
        models[scheme] = quantized(options.model, options.out / f"{scheme}_trajectory.onnx", scheme, data)
    exact, seeds = Denoiser(options.model), range(options.pictures)
    for sampler in options.samplers.split(","):
        if sampler not in SAMPLERS:
            raise InputError(f"No sampler {sampler!r}: there are {', '.join(SAMPLERS)}.")
        schedule = replace(whole, eta=SAMPLERS[sampler])
        visits = list(walk(exact, schedule, shape=SHAPE, seeds=seeds))
        runs: list[Run] = []
        for name, path in models.items():
            predict = Denoiser(path)
            runs.append(judged(name, visits, predict, schedule, None))
            if "random" in name:
                continue
            made = noise_correction(exact, predict, schedule, shape=SHAPE, seeds=CORRECTED)
            made.save(path.with_suffix(f".{sampler.lower()}.json"))
            shares(f"{sampler}, {name}", made)
            runs.append(judged(f"{name} + line", visits, predict, schedule, without_variance(made)))
            if schedule.eta:
                runs.append(judged(f"{name} + line, variance", visits, predict, schedule, made))
        table(sampler, schedule.steps, runs, visits[-1].after)
        grid([visits[-1].after, *(run.final for run in runs)], options.out / f"{sampler.lower()}.png")
        if options.groups and schedule.eta:
            by_group(options.model, options.out, schedule, options.groups, options.count, visits)


if __name__ == "__main__":
    record(main)
