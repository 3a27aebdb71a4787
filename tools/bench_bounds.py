"""What a bound on the error costs with TensorRT: predicted time, nodes in INT8 and SQNR, bound by bound.

    python tools/bench_bounds.py --zoo ../shared/tools [--gpu a10] [--json rows.json] [CASE ...]

Each model of the zoo, and qdq's own demo_unet, is tuned without a bound, then with bounds between the SQNR of INT8
everywhere and that of FP16, a share of the way in dB. The SQNR is that of the finished model on evaluation samples,
which neither calibrated nor judged. Biases are not corrected, ranges are those of least error, nothing is equalized,
weights are rounded to nearest: the fewest choices, so that the bound alone decides. Times are predicted. Rows in --json
are kept, so a run goes on where one ended.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_tune import Case, zoo_cases
from results import record

from engines.backends.compiler import ShapeRange
from engines.cost.gpus import gpu_named
from qdq.assemble.finish import finish
from qdq.assemble.held_out import HeldOutScore, Split
from qdq.assemble.quantize import quantize
from qdq.build.pricing.tensorrt_pricer import pricer_of
from qdq.build.recipe import Recipe
from qdq.deploy.demo import demo_model, demo_samples
from qdq.measure.inference.inputs import as_samples
from qdq.passes.prepare import load_float
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.tune.find_plan import find_plan

HEADER = ("model", "GPU", "bound dB", "chosen / FP16", "INT8 nodes", "of", "SQNR dB", "plans measured", "CPU s")
SHARES = (0.1, 0.25, 0.5)
SAMPLES = 32  # that calibrate and judge, at most
PLAIN = {"bias_correction": "off", "calibrator": "mse", "equalize": "none", "rounding": "nearest"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model and bound; None is no bound."""

    model: str
    gpu: str
    bound: float | None
    ratio: float
    nodes: int
    candidates: int
    sqnr_db: float
    measured: int
    seconds: float

    @property
    def cells(self) -> list[str]:
        """As of `HEADER`; "(below)" where the evaluation samples have less than the bound."""
        bound = "none" if self.bound is None else f"{self.bound:.1f}"
        below = " (below)" if self.bound is not None and self.sqnr_db < self.bound else ""
        figures = [f"{self.ratio:.3f}", str(self.nodes), str(self.candidates), f"{self.sqnr_db:.1f}{below}"]
        return [self.model, self.gpu, bound, *figures, str(self.measured), f"{self.seconds:.0f}"]


def cases(folder: Path) -> Iterator[Case]:
    """The demo network and those of the zoo."""
    calibration, evaluation = demo_samples()
    yield Case(name="demo_unet", path=demo_model(), calibration=calibration, evaluation=evaluation)
    yield from zoo_cases(folder)


def rows(case: Case, gpu: str, done: Sequence[Row]) -> list[Row]:
    """The rows of a model that are not there yet."""
    prepared, made = load_float(case.path), list[Row]()
    data = as_samples(case.calibration[:SAMPLES], prepared)
    judging = as_samples(case.evaluation[:SAMPLES], prepared)
    shapes = {name: ShapeRange.fixed(array.shape) for name, array in case.calibration[0].items()}
    held = Split(samples=judging, fit=(), held=frozenset(range(len(judging))))
    score = HeldOutScore(prepared, held)

    def sqnr_db(recipe: Recipe, plan: Plan) -> float:
        quantized = quantize(prepared, data, settings=recipe.settings, plan=plan)
        return score.sqnr_db(
            finish(quantized.model, quantized.plan, unquantized_type="fp16", table=quantized.table).model
        )

    def row(bound: float | None) -> Row:
        limits = {} if bound is None else {"min_sqnr_db": bound}
        options = {"compiler": "tensorrt", "target": gpu_named(gpu).target, "gpu": gpu, "unquantized_type": "fp16"}
        recipe = Recipe.from_mapping({**options, **PLAIN, **limits})
        pricer = pricer_of(recipe, shapes)
        assert pricer is not None
        began = time.process_time()
        found = find_plan(prepared, pricer, samples=data)
        seconds = time.process_time() - began
        count = len(found.plan.quantized_nodes)
        return Row(
            model=case.name,
            gpu=gpu,
            bound=bound,
            ratio=found.price.us / found.plain,
            nodes=count,
            candidates=count + sum(skip.rule == "tuned" for skip in found.plan.skips),
            sqnr_db=sqnr_db(recipe, found.plan),
            measured=sum(step.startswith("measured") for step in found.steps),
            seconds=seconds,
        )

    usual = Recipe.from_mapping({"compiler": "tensorrt", "target": gpu_named(gpu).target, **PLAIN})
    everything = placement.plan(prepared, usual.settings)
    nothing = placement.plan(prepared, Recipe.from_mapping({**PLAIN, "exclude": ["*"]}).settings)
    low, high = sqnr_db(usual, everything), sqnr_db(usual, nothing)
    known = {(r.model, r.gpu, r.bound) for r in done}
    for bound in (None, *(round(low + share * (high - low), 1) for share in SHARES)):
        if (case.name, gpu, bound) not in known:
            made.append(row(bound))
            print("| " + " | ".join(made[-1].cells) + " |", flush=True)
    return made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all of the zoo if none is given")
    parser.add_argument("--zoo", type=Path, required=True, help="folder with zoo.py")
    parser.add_argument("--gpu", default="a10")
    parser.add_argument("--json", type=Path, help="rows so far; new ones are added")
    given = parser.parse_intermixed_args()
    kept = (
        [Row(**values) for values in json.loads(given.json.read_text())] if given.json and given.json.exists() else []
    )
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for one in kept:
        print("| " + " | ".join(one.cells) + " |")
    for case in cases(given.zoo):
        if not given.cases or case.name in given.cases:
            kept += rows(case, given.gpu, kept)
            if given.json:
                beside = given.json.with_name(f".{given.json.name}.new")
                beside.write_text(json.dumps([asdict(one) for one in kept], indent=1))
                os.replace(beside, given.json)


if __name__ == "__main__":
    record(main, key=3)
