"""Potentials in several plans: error of energy and forces, what the compiler makes of them, energy in dynamics.

Usage: bench_potentials.py MODEL.onnx --data FOLDER --eval FOLDER [--plan TEXT ...] [--unit OUTPUT=UNIT,SCALE ...]
           [--steps N --step-fs FS --structure NAME]

MODEL and samples are of tools/export/chgnet_potential.py or ani_potential.py (--samples), or any with energies. A plan
is `NAME = SCHEME:option=value...`, as `qdq compare --schemes` takes it (`rest` is the float type of all else), and
behind it `PATTERN=CHOICE` of nodes that become something else. Each is quantized, compiled for one target and audited;
times are predicted. INT8 is the share of the multiply-adds in linear layers (products with a weight) that run in INT8
as compiled, and that of all. With --steps each file also runs so many steps at constant energy (md_stability.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import md_stability as dynamics
import numpy as np
from results import record

from calib_data import Samples, open_samples
from engines.core import arithmetic, onnx_runtime as ort
from engines.core.errors import EngineError
from engines.core.files import Scratch
from engines.cost.predict import predict
from engines.verify.audit import Audit, audit
from engines.verify.report import Unit
from qdq.assemble.finish import finish
from qdq.assemble.quantize import quantize
from qdq.build.engine import compile_engine, shape_ranges
from qdq.build.keys.units import units_of
from qdq.build.recipe import Recipe
from qdq.cli.options.read import UNIT_FORM, pairs
from qdq.deploy.compare.compare import entries
from qdq.measure.inference.inputs import input_specs
from qdq.model.model import Model
from qdq.model.storage import load, save
from qdq.passes.prepare import load_float

GPU, TARGET = "rtx4090", "sm89"
PLANS = ("INT8 = int8", "two codes = w8a16", "two codes, rest FP32 = w8a16:rest=fp32")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan to try: its name, and the settings with the float type of the rest."""

    name: str
    recipe: Recipe

    @classmethod
    def parse(cls, text: str) -> Planned:
        """Read `NAME = SCHEME:option=value PATTERN=CHOICE ...`."""
        name, _, words = text.partition(" = ")
        scheme, *others = words.split()
        given = {"target": TARGET, "tune": "off", "overrides": dict(word.rsplit("=", 1) for word in others)}
        (entry,) = entries([scheme], given)
        return cls(name=name.strip(), recipe=entry.recipe)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured of one file."""

    errors: dict[str, float]
    audited: Audit | None
    linear: float | None
    us: float | None
    run: dynamics.Run | None
    problem: str = ""


def errors_of(path: Path, reference: Sequence[dict[str, np.ndarray]], samples: Samples) -> dict[str, float]:
    """Mean absolute error of each output over all elements."""
    session, total, count = arithmetic.session(path), dict[str, float](), dict[str, int]()
    for expected, found in zip(reference, ort.run(session, samples), strict=True):
        for name, values in expected.items():
            total[name] = total.get(name, 0.0) + float(np.abs(found[name].astype(np.float64) - values).sum())
            count[name] = count.get(name, 0) + values.size
    return {name: total[name] / count[name] for name in total}


def linear_share(model: Model, audited: Audit) -> float:
    """The share of the multiply-adds of products with a weight that run in INT8."""
    float_products = {n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and not _weighted(model, n)}
    rows = [row for row in audited.nodes if row.node not in float_products]
    return sum(r.macs or 0 for r in rows if r.consumed == "int8") / max(sum(r.macs or 0 for r in rows), 1)


def _weighted(model: Model, node: Any) -> bool:
    """Whether the second operand comes of constants alone."""
    name = node.input[1]
    while not model.is_constant(name) and (maker := model.producer(name)) is not None:
        if maker.op_type not in ("DequantizeLinear", "QuantizeLinear", "Transpose", "Cast", "Mul"):
            return False
        name = maker.input[0]
    return model.is_constant(name)


def look(path: Path, samples: Samples, reference: Sequence[dict[str, np.ndarray]], given: argparse.Namespace) -> Found:
    """Score, compile, price and run one file."""
    errors, recipe, problem = errors_of(path, reference, samples), Recipe(targets=(TARGET,), tune="off"), ""
    audited, linear, us = None, None, None
    try:
        model = load(path)
        ranges = shape_ranges(model, (), samples)
        engine = compile_engine(model, recipe=recipe, shapes=ranges)
        audited = audit(path, engine.table, shapes=ranges)
        linear = linear_share(model, audited)
        us = predict(path, engine.table, GPU, shapes=ranges).total_us
    except EngineError as error:
        problem = " ".join(str(error).split())[:160]
    run = None
    if given.steps:
        session = arithmetic.session(path)
        moving = dynamics.system(session, given.structure)
        start = dynamics.velocities(moving, 300.0, np.random.default_rng(0))
        run = dynamics.simulate(session, moving, start, steps=given.steps, step_fs=given.step_fs)
    return Found(errors=errors, audited=audited, linear=linear, us=us, run=run, problem=problem)


def row(name: str, found: Found, units: dict[str, Unit], step_fs: float) -> str:
    """One line of the table."""
    cells = [name, *(f"{v * units[n].scale:.3g}" if n in units else f"{v:.3g}" for n, v in found.errors.items())]
    if found.audited is None or found.linear is None:
        cells += ["-"] * 4
    else:
        weights = f"{found.audited.weight_bytes / 1e6:.2f}"
        cells += [f"{found.linear:.2f} / {found.audited.int8_share:.2f}", str(found.audited.kernels), weights]
        cells.append("-" if found.us is None else f"{found.us:.0f}")
    if found.run is not None:
        slope, scatter = found.run.line(step_fs)
        ends = 1000 * (found.run.energies[-1] - found.run.energies[0])
        cells += [f"{ends:+.3f}", f"{slope:+.2f}", f"{scatter:.3f}"]
    return f"| {' | '.join(cells)} |" + (f" {found.problem}" if found.problem else "")


def head(outputs: Sequence[str], units: dict[str, Unit], steps: int, step_fs: float) -> Iterator[str]:
    """The head of the table."""
    named = [f"{name}, {units[name].name}" if name in units else name for name in outputs]
    heads = ["plan", *named, "INT8 of linear / of all", "kernels", "weights, MB", f"predicted us, {GPU}"]
    if steps:
        heads += [f"energy after {steps * step_fs:g} fs, meV/atom", "drift, meV/atom/ps", "scatter, meV/atom"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)


def main() -> None:
    """Measure one potential."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--plan", action="append", dest="plans")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--unit", action="append", default=[])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--step-fs", type=float, default=1.0)
    parser.add_argument("--structure", default="LiMnO2")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the files there, by the plans' names")
    given = parser.parse_args()
    units = units_of(pairs(given.unit, "--unit", UNIT_FORM))
    prepared = load_float(given.model)
    specs = input_specs(prepared)
    calibration, evaluation = open_samples(given.data, specs), open_samples(given.eval, specs)
    reference = list(ort.run(arithmetic.session(given.model), evaluation))
    print(f"{given.model.name}: {len(list(calibration))} samples calibrate, {len(reference)} others count. Mean size:")
    for name in reference[0]:
        size = float(np.mean(np.abs(np.concatenate([r[name].reshape(-1) for r in reference]))))
        print(f"{name} {units[name].shown(size) if name in units else f'{size:.4g}'}")
    print("\n" + "\n".join(head(list(reference[0]), units, given.steps, given.step_fs)), flush=True)
    with Scratch() as scratch:
        folder = given.keep or scratch
        folder.mkdir(parents=True, exist_ok=True)
        save(prepared, folder / "float.onnx")
        print(
            row("float, FP32", look(folder / "float.onnx", evaluation, reference, given), units, given.step_fs),
            flush=True,
        )
        for planned in map(Planned.parse, given.plans or PLANS):
            start, recipe = time.perf_counter(), planned.recipe
            made = quantize(prepared, calibration, settings=recipe.settings)
            done = finish(made.model, made.plan, unquantized_type=recipe.unquantized_type, table=made.table)
            path = folder / f"{planned.name.replace(' ', '_').replace(',', '')}.onnx"
            save(done.model, path)
            print(row(planned.name, look(path, evaluation, reference, given), units, given.step_fs), flush=True)
            print(f"{planned.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    record(main)
