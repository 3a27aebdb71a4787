"""A quantized diffusion model along its sampling, with and without the correction of its noise.

    python tools/bench_diffusion.py DDPM.onnx OUT [--steps 100] [--pictures 5] [--schemes int8,w4a8] [--groups 4]
        [--random] [--quick] [--results tools/RESULTS.md]

DDPM.onnx is of `tools/train_ddpm.py`. Every run of a sampler has the same noise. "forced" is the SQNR of the predicted
noise along the float model's own sampling, "free" that of the array that the quantized model's sampling has at the same
step, and "end" that of the pictures. OUT gets the Q/DQ models, corrections (JSON) and a grid of the pictures for each
sampler (PNG): float, then the models in the order of the table. What lies there is taken as it is, so that a run
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from results import record

from engines.core.documents import replace as replaced
from qdq import Settings, quantize, save
from qdq.assemble.held_out import decibels
from qdq.deploy.diffusion.correction import NoiseCorrection, noise_correction
from qdq.deploy.diffusion.schedule import Array, Schedule, cosine
from qdq.deploy.diffusion.trajectory import Denoiser, Sample, pictures, sample_of, samples, walk
from qdq.model.storage import load

SHAPE = (3, 32, 32)
CALIBRATED, CORRECTED = range(1000, 1004), range(2000, 2004)
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


def quantized(model: Path, out: Path, settings: Settings, data: Iterator[Sample]) -> Path:
    """The Q/DQ model, made where it is not there."""
    if not out.exists():
        began = time.monotonic()
        made = quantize(model, list(data), settings=settings)
        save(made.model, out)
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return out


def kept(path: Path, make: Callable[[], Array]) -> Array:
    """An array that an earlier run left, or made now and left."""
    if not path.exists():
        began = time.monotonic()
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, make())
        path.with_suffix(".tmp").rename(path)
        print(f"{path.name} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    found: Array = np.load(path)
    return found


@dataclass(frozen=True)
class Run:
    """What one model does: SQNR of its predicted noise on the float model's arrays, and the arrays that it comes to."""

    name: str
    forced: list[float]
    free: Array


@dataclass(frozen=True)
class Bench:
    """The float model's sampling, (3, steps, pictures, C, H, W): arrays, predicted noise, next arrays."""

    visits: Array
    schedule: Schedule
    stem: str

    def foreseen(self, name: str, told: Array) -> None:
        """Print what lines can explain of a model's errors, fitted to the very pictures that are judged."""
        x, noise, _ = self.visits
        errors = told - noise
        alone = [explained(*parts) for parts in zip(errors, noise, strict=True)]
        both = [explained(*parts) for parts in zip(errors, noise, x, strict=True)]
        channel = [np.square(e.mean((0, 2, 3))).mean() / np.square(e).mean() for e in errors]
        print(
            f"- {name}, of the error's energy, mean and largest of the steps: means of channels "
            f"{100 * np.mean(channel):.2f} and {100 * max(channel):.2f} %, a line of the float model's output "
            f"{100 * np.mean(alone):.2f} and {100 * max(alone):.2f} %, of it and of the noisy picture "
            f"{100 * np.mean(both):.2f} and {100 * max(both):.2f} %"
        )

    def judged(self, name: str, path: Path, correction: NoiseCorrection | None) -> Run:
        """A model against the float model."""
        x, noise, _ = self.visits
        predict, plain, steps = Denoiser(path), name.partition(" + ")[0].replace(", ", "_"), self.schedule.steps
        told = kept(
            Path(f"{self.stem}_{plain}_forced.npy"),
            lambda: np.stack([predict(at, t) for at, t in zip(x, steps, strict=True)]),
        )
        if correction is None:
            self.foreseen(name, told)
        else:
            told = np.stack([correction.noise(each, t) for each, t in zip(told, steps, strict=True)])
        walked = partial(walk, predict, self.schedule, shape=SHAPE, seeds=range(x.shape[1]), correction=correction)
        free = kept(
            Path(f"{self.stem}_{name.replace(', ', '_').replace(' ', '_')}.npy"),
            lambda: np.stack([visit.after for visit in walked()]),
        )
        return Run(name, [sqnr(w, f) for w, f in zip(noise, told, strict=True)], free)


def explained(error: Array, *causes: Array) -> float:
    """The share of an error's energy that the best line of its causes explains."""
    columns = np.stack([*(cause.ravel() for cause in causes), np.ones(error.size)], axis=1).astype(np.float64)
    values = error.ravel().astype(np.float64)
    fitted = columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
    return float(np.square(fitted).sum() / np.square(values).sum())


def without_variance(correction: NoiseCorrection) -> NoiseCorrection:
    """The line alone: the sampler adds all of its noise."""
    return replaced(correction, steps=tuple(replaced(step, variance=0.0) for step in correction.steps))


def row(name: str, values: Sequence[float]) -> str:
    """A line of the table: ten values of a hundred."""
    picked = [values[int(i)] for i in np.linspace(0, len(values) - 1, 10)]
    return f"| {name} | " + " | ".join(f"{value:.1f}" for value in picked) + " |"


def table(sampler: str, bench: Bench, runs: Sequence[Run]) -> None:
    """Print what a sampler came to."""
    after, steps = bench.visits[2], bench.schedule.steps
    picked = [steps[int(i)] for i in np.linspace(0, len(steps) - 1, 10)]
    print(f"\n{sampler}, SQNR in dB at training steps:\n")
    print(f"| model | {' | '.join(map(str, picked))} |\n|---|{'---|' * 10}")
    for run in runs:
        print(row(f"{run.name}, forced", run.forced))
        print(row(f"{run.name}, free", [sqnr(w, f) for w, f in zip(after, run.free, strict=True)]))
    print()
    plain = {run.name: run.free[-1] for run in runs}
    for run in runs:
        end, before = sqnr(after[-1], run.free[-1]), plain[run.name.partition(" + ")[0]]
        gains = [sqnr(w, f) - sqnr(w, p) for w, f, p in zip(after[-1], run.free[-1], before, strict=True)]
        said = f", {end - sqnr(after[-1], before):+.2f}: by seed {', '.join(f'{g:+.1f}' for g in gains)}"
        print(f"- {run.name}: {end:.2f} dB at the end{said if ' + ' in run.name else ''}")
    print()


def shares(name: str, correction: NoiseCorrection) -> None:
    """Print how much of the noise the correction can take: bias and correlation, as shares of the error's energy."""
    taken = [1 - 10 ** ((step.sqnr_db - step.corrected_db) / 10) for step in correction.steps]
    slopes = [np.mean(step.gain) - 1 for step in correction.steps]
    print(
        f"- {name}, correction measured on other pictures: bias and correlation are {100 * np.mean(taken):.2f} % of "
        f"the error's energy at a step (mean; {100 * np.min(taken):.2f} to {100 * np.max(taken):.2f}); gain - 1 is "
        f"{np.mean(slopes):+.4f} ({np.min(slopes):+.4f} to {np.max(slopes):+.4f})"
    )


def grid(rows: Sequence[Array], path: Path, *, zoom: int = 4) -> None:
    """One row of pictures for each model, (N, 3, 32, 32) from -1 to 1."""
    picture = np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)
    codes = ((picture.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(codes.repeat(zoom, 0).repeat(zoom, 1)).save(path)


def by_group(model: Path, out: Path, settings: Settings, bench: Bench, groups: int, count: int) -> None:
    """One range for each group of steps against one for all: SQNR of the predicted noise along the float sampling."""
    (x, noise, _), steps = bench.visits, bench.schedule.steps
    whole = Denoiser(out / f"{settings.scheme}.onnx")
    print("| steps | one range for all, dB | ranges of their own, dB |\n|---|---|---|")
    for number, part in enumerate(np.array_split(np.arange(len(steps)), groups)):
        weights = list(np.isin(np.arange(len(steps)), part).astype(float))
        data = samples(model, bench.schedule, shape=SHAPE, seeds=CALIBRATED, count=count, weights=weights)
        own = Denoiser(quantized(model, out / f"{settings.scheme}_group{number}.onnx", settings, data))
        picked = part[:: max(1, len(part) // 8)]
        dbs = [np.mean([sqnr(noise[i], predict(x[i], steps[i])) for i in picked]) for predict in (whole, own)]
        print(f"| {steps[part[0]]} to {steps[part[-1]]} | {dbs[0]:.2f} | {dbs[1]:.2f} |", flush=True)
    print()


def corrected(exact: Denoiser, path: Path, schedule: Schedule, file: Path) -> NoiseCorrection:
    """The correction of a model, measured where its file is not there."""
    coarse = Denoiser(path)
    if not file.exists():
        noise_correction(exact, coarse, schedule, shape=SHAPE, seeds=CORRECTED).save(file)
    return NoiseCorrection.load(file, sha256=coarse.sha256)


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
    parser.add_argument("--groups", type=int, default=0, help="of steps with ranges of their own; 0 leaves that out")
    parser.add_argument(
        "--random", action="store_true", help="also calibrate the first scheme on steps drawn at random"
    )
    parser.add_argument("--quick", action="store_true", help="quantize without comparing choices, no bias correction")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    whole, exact = Schedule.spaced(cosine(), options.steps, clip=1.0), Denoiser(options.model)
    models, settings = {}, {}
    for scheme in options.schemes.split(","):
        plain = Settings(scheme=scheme)
        settings[scheme] = replaced(plain, bias_correction="off").settled if options.quick else plain
        data = samples(options.model, whole, shape=SHAPE, seeds=CALIBRATED, count=options.count)
        models[scheme] = quantized(options.model, options.out / f"{scheme}.onnx", settings[scheme], data)
    first = next(iter(settings.values()))
    if options.random:
        data, path = random_steps(options.model, whole, options.count), options.out / "random.onnx"
        models[f"{first.scheme}, random steps"] = quantized(options.model, path, first, data)
    for sampler in options.samplers.split(","):
        schedule, stem = replace(whole, eta=SAMPLERS[sampler]), f"{options.out / sampler.lower()}"
        seeds = range(options.pictures)
        walked = partial(walk, exact, schedule, shape=SHAPE, seeds=seeds)
        visits = kept(
            Path(f"{stem}_float.npy"),
            lambda walked=walked: np.stack([(v.x, v.noise, v.after) for v in walked()], axis=1),
        )
        bench, runs = Bench(visits, schedule, stem), []
        for name, path in models.items():
            runs.append(bench.judged(name, path, None))
            if "random" not in name:
                made = corrected(exact, path, schedule, Path(f"{stem}_{name}.json"))
                shares(f"{sampler}, {name}", made)
                runs.append(bench.judged(f"{name} + line", path, without_variance(made)))
                if schedule.eta:
                    runs.append(bench.judged(f"{name} + line, variance", path, made))
        table(sampler, bench, runs)
        grid([visits[2, -1], *(run.free[-1] for run in runs)], Path(f"{stem}.png"))
        if options.groups and schedule.eta:
            by_group(options.model, options.out, first, bench, options.groups, options.count)


if __name__ == "__main__":
    record(main)
