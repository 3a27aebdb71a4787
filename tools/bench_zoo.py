"""Quantize every model of the evaluation zoo with qdq and with the peers, and compare them in one table.

The zoo (models, samples, the peers' calls) lies outside the project: `--zoo` is the folder with zoo.py and peers.py.
Each peer runs in its own environment on the same calibration samples. Everything is scored on the same evaluation
samples in the types of its file (`engines.core.arithmetic`), and compiled for the same target by TensorRT-RTX. ONNX
Runtime alone would not do: behind its optimizer meshnet5 has 8 dB less than the standard's arithmetic says, for it
multiplies FP16 weights by the scales that a rewrite put behind the convolution, and rounds the products.

    python tools/bench_zoo.py --zoo ../shared/tools --ort PYTHON --modelopt PYTHON [--target sm89] [CASE ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import record

from engines import ShapeRange
from engines.backends import rtx
from engines.core import arithmetic
from engines.core.errors import EngineError
from engines.verify.audit import audit
from qdq.build.recipe import Recipe
from qdq.deploy.deploy import deploy

HARTREE_PER_KCAL = 0.00159362


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model quantized by one tool."""

    sqnr_db: float | None = None
    int8_share: float | None = None
    weight_ratio: float | None = None
    bytes_ratio: float | None = None
    kernels: int | None = None
    error_kcal: float | None = None
    problem: str = ""

    def __str__(self) -> str:
        """One line of the table."""
        if self.problem:
            return self.problem[:60]
        text = (
            f"{self.sqnr_db:6.1f} dB  int8 {self.int8_share:.3f}"
            if self.int8_share is not None
            else f"{self.sqnr_db:6.1f} dB"
        )
        if self.weight_ratio is not None:
            text += f"  weights {self.weight_ratio:.3f}  bytes {self.bytes_ratio:.2f}  kernels {self.kernels}"
        return text + (f"  |error| {self.error_kcal:.3f} kcal/mol" if self.error_kcal is not None else "")


def score(zoo: Any, case: Any, path: Path, target: str) -> Row:
    """SQNR on the evaluation samples and what the compiler makes of a file, against the float model."""
    shapes = {k: ShapeRange.fixed(v.shape) for k, v in case.evaluation[0].items()}
    reference, outputs = (_run(p, case.evaluation) for p in (case.path, path))
    sqnr = float(zoo.sqnr_db([a for y in reference for a in y], [a for y in outputs for a in y]))
    kcal = None
    if case.name.startswith("ani"):
        kcal = (
            float(np.mean([np.abs(r[0] - o[0]).mean() for r, o in zip(reference, outputs, strict=True)]))
            / HARTREE_PER_KCAL
        )
    try:
        made, plain = (
            audit(p, rtx.build(p, targets=[target], shapes=shapes).table, shapes=shapes) for p in (path, case.path)
        )
    except EngineError as error:
        return Row(sqnr_db=sqnr, problem=f"{sqnr:6.1f} dB, does not compile: {error}")
    bytes_ratio = made.bytes_moved / plain.bytes_moved if made.bytes_moved and plain.bytes_moved else float("nan")
    return Row(
        sqnr_db=sqnr,
        int8_share=made.int8_share,
        weight_ratio=made.weight_bytes / plain.weight_bytes,
        bytes_ratio=bytes_ratio,
        kernels=made.kernels,
        error_kcal=kcal,
    )


def _run(path: Path, samples: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    """The outputs of each sample."""
    session = arithmetic.session(path)
    return [session.run(None, sample) for sample in samples]


def peer(python: str, zoo_folder: Path, tool: str, case: str, out: Path) -> str:
    """Run a peer in its own environment; returns what went wrong, "" for nothing."""
    done = subprocess.run(
        [python, str(zoo_folder / "peers.py"), tool, case, str(out)], capture_output=True, text=True, cwd=zoo_folder
    )
    return "" if done.returncode == 0 and out.exists() else "fails: " + (done.stderr.strip().splitlines() or ["?"])[-1]


def table(rows: Mapping[str, Mapping[str, Row]]) -> Iterator[str]:
    """The rows in Markdown; "float" is said of a peer that quantized nothing."""
    peers = {"ort": "ONNX Runtime", "modelopt": "Model Optimizer"}
    heads = ("model", *peers.values(), "qdq", "INT8 share", "engine weights of FP32", "bytes moved of FP32")
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for case, row in rows.items():
        ours = row["qdq"]
        cells = [case]
        for name in (*peers, "qdq"):
            made = row.get(name)
            if made is None or made.sqnr_db is None:
                cells.append("fails" if made else "-")
            else:
                cells.append("float" if made.int8_share == 0 else f"{made.sqnr_db:.1f}")
        figures = (ours.int8_share, ours.weight_ratio, ours.bytes_ratio)
        yield f"| {' | '.join((*cells, *('-' if v is None else f'{v:.3f}' for v in figures)))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="folder with zoo.py and peers.py")
    parser.add_argument("--ort", help="python of an environment with onnxruntime")
    parser.add_argument("--modelopt", help="python of an environment with nvidia-modelopt")
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    sys.path.insert(0, str(options.zoo.resolve()))
    zoo = importlib.import_module("zoo")
    rows: dict[str, dict[str, Row]] = {}
    for case in zoo.zoo():
        if options.cases and case.name not in options.cases:
            continue
        zoo.named(case)
        row = rows.setdefault(case.name, {})
        with tempfile.TemporaryDirectory() as folder:
            done = deploy(
                case.path,
                case.calibration,
                Path(folder),
                recipe=Recipe(targets=(options.target,), tune="rewrites"),  # everything in INT8, as the peers do
                evaluation=case.evaluation,
                allow_overlap=True,  # one file of magika's is there twice
            )
            row["qdq"] = score(zoo, case, Path(folder) / f"{case.path.stem}.int8.onnx", options.target)
            assert done.report.check.sqnr_db is not None
            for name, python in (("ort", options.ort), ("modelopt", options.modelopt)):
                if python:
                    out = Path(folder) / f"{name}.onnx"
                    problem = peer(python, options.zoo.resolve(), name, case.name, out)
                    row[name] = Row(problem=problem) if problem else score(zoo, case, out, options.target)
        for name, result in row.items():
            print(f"{case.name:15s} {name:9s} {result}", file=sys.stderr, flush=True)
    print("\n".join(table(rows)) + "\n")
    ours = [r["qdq"].sqnr_db or 0 for r in rows.values()]
    best = [
        max(
            (x.sqnr_db for n, x in r.items() if n != "qdq" and x.sqnr_db is not None and (x.int8_share or 0) > 0),
            default=float("nan"),
        )
        for r in rows.values()
    ]
    if not all(np.isnan(best)):
        print(f"mean gain over the better peer that quantizes at all: {np.nanmean(np.subtract(ours, best)):.1f} dB")
    if options.json:
        content = {case: {name: vars(r) for name, r in row.items()} for case, row in rows.items()}
        options.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    record(main)
