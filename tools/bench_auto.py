"""What `--calibrator auto` is worth: SQNR of each calibrator and of auto on samples that no choice has seen.

Every model is calibrated once; each calibrator makes its scales from that one table, and the Q/DQ model (rest FP32) is
compared with the float model on the evaluation samples in ONNX Runtime. What auto gains on the best single calibrator
is given with its standard error over the evaluation samples (bootstrap): a few hundred samples do not tell some tenths
of a dB apart, and the best of five is partly the luckiest of five. With --bias the default calibrator also without,
with, and with automatic bias correction. The zoo (models and samples) lies outside the project: `--zoo` is the
folder with zoo.py.

    python tools/bench_auto.py --zoo ../shared/tools [--bias] [--volumes N] [--correction off] [--json OUT] [CASE ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from results import record

from engines.core.documents import replace
from qdq.assemble import quantize
from qdq.assemble.choose_calibrator import METHODS
from qdq.measure.collect import collect
from qdq.measure.inference import inputs
from qdq.model.storage import save
from qdq.passes import prepare
from qdq.plan import placement
from qdq.plan.settings import Settings

Samples = list[dict[str, np.ndarray]]
CORRECTIONS = ("off", "on", "auto")
TOOK = "calibrator auto took "


@dataclass(kw_only=True)
class Row:
    """One model: evaluation SQNR in dB by calibrator, and by bias correction of the default calibrator."""

    model: str
    samples: tuple[int, int]  # to calibrate and to evaluate on
    limited: bool
    sqnr_db: dict[str, float] = field(default_factory=dict)
    noise: dict[str, np.ndarray] = field(default_factory=dict)  # of each evaluation sample, by calibrator
    bias_db: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    picked: str = ""

    @property
    def gain_db(self) -> float:
        """Auto less the best single calibrator."""
        return self.sqnr_db["auto"] - max(self.sqnr_db[m] for m in METHODS)

    @property
    def error_db(self) -> float | None:
        """Standard error of `gain_db` over the evaluation samples, drawn with replacement; None for one sample."""
        auto, best = self.noise["auto"], self.noise[max(METHODS, key=self.sqnr_db.__getitem__)]
        if auto.size < 2:
            return None
        drawn = np.random.default_rng(0).integers(auto.size, size=(2000, auto.size))
        return float(np.std(10 * np.log10(best[drawn].sum(axis=1) / auto[drawn].sum(axis=1))))

    def cells(self) -> list[str]:
        """One line of the table."""
        found = [f"{self.sqnr_db[m]:.2f}" for m in (*METHODS, "auto") if m in self.sqnr_db]
        if found:
            found += [
                f"{self.gain_db:+.2f}" + ("" if self.error_db is None else f" ± {self.error_db:.2f}"),
                f"{self.seconds['auto'] / self.seconds[METHODS[0]]:.1f}",
            ]
        found += [f"{self.bias_db[m]:.2f}" for m in CORRECTIONS if m in self.bias_db]
        mark = "*" if self.limited else ""
        return [self.model, f"{self.samples[0]} / {self.samples[1]}{mark}", *found, self.picked]


def limited(case: Any, volumes: int | None) -> tuple[Samples, Samples, bool]:
    """The samples to calibrate and to evaluate on; of 3-D models no more than `volumes` of each."""
    sets = case.calibration, case.evaluation
    large = any(array.ndim == 5 for array in case.calibration[0].values())
    cut = volumes is not None and large and max(map(len, sets)) > volumes
    return (*(s[:volumes] if cut else s for s in sets), cut)


def noise(expected: list[list[np.ndarray]], found: list[list[np.ndarray]]) -> np.ndarray:
    """Squared error of each evaluation sample; of each member where the samples are batches."""
    units = []
    for wanted, given in zip(expected, found, strict=True):
        count = wanted[0].shape[0] if len({y.shape[:1] for y in wanted}) == 1 and wanted[0].ndim else 1
        squares = [
            np.square(np.float64(y) - z).reshape(count, -1).sum(axis=1) for y, z in zip(wanted, given, strict=True)
        ]
        units.append(np.sum(squares, axis=0))
    return np.concatenate(units)


def row(zoo: Any, case: Any, options: argparse.Namespace) -> Row:
    """Calibrate once, quantize by each calibrator, evaluate."""
    calibration, evaluation, cut = limited(case, options.volumes)
    prepared = prepare.load_float(case.path)
    samples = inputs.as_samples(calibration, prepared)
    found = Row(model=case.name, samples=(len(calibration), len(evaluation)), limited=cut)
    base = Settings(bias_correction=options.correction)
    plan = placement.plan(prepared, base)
    began = time.monotonic()
    table = collect(prepared, plan, samples)
    calibrated = time.monotonic() - began
    expected = zoo.run(case.path, evaluation)

    def score(settings: Settings) -> tuple[float, np.ndarray, float, tuple[str, ...]]:
        began = time.monotonic()
        made = quantize.quantize(prepared, samples, settings=settings, table=table)
        seconds = time.monotonic() - began + calibrated
        with tempfile.TemporaryDirectory() as folder:
            save(made.model, path := Path(folder) / "model.onnx")
            given = zoo.run(path, evaluation)
        sqnr = zoo.sqnr_db([y for each in expected for y in each], [y for each in given for y in each])
        return float(sqnr), noise(expected, given), seconds, made.solution.notes

    if not options.bias_only:
        for method in (*METHODS, "auto"):
            settings = replace(base, calibrator=method)
            found.sqnr_db[method], found.noise[method], found.seconds[method], notes = score(settings)
        said = next((n for n in notes if n.startswith(TOOK)), TOOK)
        found.picked = said.removeprefix(TOOK).partition(":")[0]
    if options.bias or options.bias_only:
        for correction in CORRECTIONS:
            if correction == options.correction and METHODS[0] in found.sqnr_db:
                found.bias_db[correction] = found.sqnr_db[METHODS[0]]
                continue
            settings = replace(base, bias_correction=correction)
            found.bias_db[correction], _, found.seconds[f"bias {correction}"], notes = score(settings)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="folder with zoo.py")
    parser.add_argument("--bias", action="store_true", help="also measure bias correction")
    parser.add_argument("--bias-only", action="store_true", help="measure bias correction and no calibrators")
    parser.add_argument("--correction", choices=CORRECTIONS, default="auto", help="bias correction of all calibrators")
    parser.add_argument("--volumes", type=int, help="of 3-D models, take at most so many samples of each kind")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    sys.path.insert(0, str(options.zoo.resolve()))
    zoo = importlib.import_module("zoo")
    header = ["model", "samples"]
    header += [] if options.bias_only else [*METHODS, "auto", "auto less best", "time of mse's"]
    header += [f"bias {c}" for c in CORRECTIONS] if options.bias or options.bias_only else []
    header += ["picked"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    rows: list[Row] = []
    for case in zoo.zoo():
        if options.cases and case.name not in options.cases:
            continue
        rows.append(row(zoo, zoo.named(case), options))
        print("| " + " | ".join(rows[-1].cells()) + " |", flush=True)
        if options.json:
            options.json.write_text(json.dumps([as_mapping(r) for r in rows], indent=1))
    if any(r.limited for r in rows):
        print(f"\n* at most {options.volumes} volumes of those that the zoo has")
    if rows and not options.bias_only:
        gains = [r.gain_db for r in rows]
        print(
            f"\nauto less the best single calibrator: {np.mean(gains):+.2f} dB on average, {min(gains):+.2f} at worst"
        )


def as_mapping(found: Row) -> Mapping[str, object]:
    """The row as plain values."""
    plain = {name: value for name, value in vars(found).items() if name != "noise"}
    return plain | ({"gain_db": found.gain_db, "error_db": found.error_db} if found.sqnr_db else {})


if __name__ == "__main__":
    record(main)
