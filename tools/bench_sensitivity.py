"""Sensitivity by cached prefixes and noises in proportion, against every trial run from the input.

    python tools/bench_sensitivity.py [--model UNET.onnx] [--samples 4] [--candidates int8,fp8] [--memory 2G]

Without --model, MONAI's UNet (channels 16 to 256, 96^3) is exported, which needs torch and monai here. Samples are the
package's brain volume, turned and moved. Each way is a process of its own: time of its processor and of the clock,
and the most memory it had. Calibration, the same in both, is timed apart.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from results import record

from qdq.core.arrays import spearman
from qdq.core.resources import parse_bytes, within
from qdq.measure.collect import collect
from qdq.measure.inference.samples import sample_sha256
from qdq.passes.prepare import load_float
from qdq.plan.settings import Settings
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.measure import sensitivity
from qdq.tune.sensitivity.run import Runner, here
from qdq.tune.sensitivity.table import Sensitivity

CANDIDATES = "int8,int8:shift=off,fp8,float"
WAYS = {"scaled": (True, False), "to the outputs": (False, False), "from the input": (False, True)}


def volumes(shape: tuple[int, ...], count: int) -> Iterator[np.ndarray]:
    """The demo's volume at a size, turned and moved another way for each sample."""
    whole = np.load(Path(__file__).resolve().parents[1] / "qdq/demo_data/demo_volume.npz")["volume"].astype(np.float32)
    whole = (whole - whole.mean()) / whole.std()
    rng = np.random.default_rng(0)
    for number in range(count):
        moved = np.roll(whole, rng.integers(-8, 9, 3), (0, 1, 2))[(slice(None, None, (-1) ** number),)]
        sized = np.zeros(shape[2:], np.float32) + moved.min()
        space = tuple(slice(min(a, b)) for a, b in zip(sized.shape, moved.shape, strict=True))
        sized[space] = moved[space]
        yield np.broadcast_to(sized, shape).astype(np.float32)


def child(model: str, count: int, texts: str, way: str, memory: str | None) -> dict[str, object]:
    """One way, in this process."""
    scale, from_input = WAYS[way]
    with within(parse_bytes(memory) if memory else None):
        prepared = load_float(Path(model))
        fed = prepared.inputs[0]
        samples = [{fed.name: values} for values in volumes(tuple(map(int, fed.shape or ())), count)]
        candidates = Candidates.of(prepared, Settings(), texts.split(","))
        began = time.perf_counter()
        table = collect(candidates.model, candidates.measuring, samples)
        calibrated, clock, processor = time.perf_counter() - began, time.perf_counter(), time.process_time()
        runner = Runner(units=here(candidates, table, samples, from_input=from_input))
        made = sensitivity(candidates, runner, [sample_sha256(sample) for sample in samples], scale=scale)
    return {
        "calibrated": calibrated,
        "clock": time.perf_counter() - clock,
        "processor": time.process_time() - processor,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "table": made.to_mapping(),
    }


def noises(made: Sensitivity) -> np.ndarray:
    """Of every trial, in the order of the table."""
    return np.array([t.noise for row in made.groups for t in row.trials if t.noise is not None])


def main() -> None:
    """Run each way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--candidates", default=CANDIDATES)
    parser.add_argument("--memory")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["scaled", "from the input"])
    parser.add_argument(
        "--keep", type=Path, help="folder of what each way gave: those that are there are not run again"
    )
    parser.add_argument("--child", choices=list(WAYS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.model, given.samples, given.candidates, given.child, given.memory)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            from bench_calibration import export

            model = str(Path(folder) / "unet.onnx")
            export(Path(model))
        found = {}
        for way in given.ways:
            command = [sys.executable, __file__, "--model", model, "--samples", str(given.samples)]
            command += ["--candidates", given.candidates, "--child", way]
            command += ["--memory", given.memory] if given.memory else []
            kept = (given.keep or Path(folder)) / f"{way}.json"
            if not kept.exists():
                kept.write_text(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            found[way] = json.loads(kept.read_text())
    tables = {way: Sensitivity.from_mapping(row["table"]) for way, row in found.items()}
    last = given.ways[-1]
    reference = noises(tables[last])
    print("| way | run to the outputs | processor s | clock s | times faster | peak MB | rank correlation | dB apart |")
    print("|---|---|---|---|---|---|---|---|")
    for way, row in found.items():
        mine = noises(tables[way])
        apart = np.abs(10 * np.log10(np.maximum(mine, 1e-300) / np.maximum(reference, 1e-300)))
        run = sum(not t.scaled for group in tables[way].groups for t in group.trials if t.noise is not None)
        faster = found[last]["processor"] / row["processor"]
        print(
            f"| {way} | {run} of {len(mine)} | {row['processor']:.1f} | {row['clock']:.1f} | {faster:.2f} | "
            f"{row['memory']:.0f} | {spearman(mine, reference):.4f} | "
            f"{np.median(apart):.2f}, at most {apart.max():.2f} |"
        )
    for way, made in tables.items():
        if made.check is not None:
            rank = made.check.rank_correlation
            own = math.nan if rank is None else rank
            print(f"\n{way}: its own check of {made.check.trials} trials has a rank correlation of {own:.4f}.")
    calibrated = found[last]["calibrated"]
    print(f"\n{len(tables[last].groups)} groups, {given.samples} samples; calibration {calibrated:.1f} s.")


if __name__ == "__main__":
    record(main)
