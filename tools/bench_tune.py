"""What tuning is worth: predicted time of each model in FP32, FP16, untuned INT8, by Model Optimizer, and tuned.

Every variant of a row is compiled in this process by TensorRT-RTX for the same target and priced by the same model of
cost (`engines.cost`), as the GPU's own compiler would build it; nothing is run on a GPU. The zoo (models and samples)
and the MONAI networks (`tools/export`, with crops of a NIfTI volume as samples) lie outside the project. Model
Optimizer runs in its own environment.

    python tools/bench_tune.py --zoo FOLDER [--modelopt PYTHON] [--target SM] [--gpu NAME] [--json OUT] [CASE ...]
    python tools/bench_tune.py --monai FOLDER --volume T1.nii.gz --min-sqnr-db 30 [...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import record

from engines.backends.compiler import ShapeRange
from engines.cost.gpus import gpu_named
from qdq.assemble import quantize
from qdq.assemble.finish import finish
from qdq.build.cost import TIE, TIE_US
from qdq.build.pricing.tensorrt_pricer import pricer_of
from qdq.build.recipe import TIME_LIMIT_S, TUNE_COMPILES, Recipe
from qdq.deploy import check
from qdq.measure.inference import inputs
from qdq.model.storage import load, save
from qdq.passes import prepare
from qdq.tune.find_plan import difference, find_plan
from qdq.tune.variant_builder import VariantBuilder

Samples = list[dict[str, np.ndarray]]
HEADER = (
    *("model", "GPU", "FP32", "FP16", "everything", "Model Optimizer", "tuned", "of FP16"),
    *("INT8 against float", "SQNR dB", "INT8 nodes", "variants", "s"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with samples to calibrate and to evaluate on."""

    name: str
    path: Path
    calibration: Samples
    evaluation: Samples


@dataclass(frozen=True, kw_only=True)
class Row:
    """Predicted microseconds, the output SQNR in dB of the tuned model in ONNX Runtime, and how long tuning took.

    `untuned` is INT8 wherever it is possible; `ended` what ended the search before it was through, else "".
    """

    model: str
    gpu: str
    fp32: float
    fp16: float
    untuned: float
    peer: float | None
    tuned: float
    sqnr_db: float | None
    int8_nodes: int
    of_nodes: int
    seconds: float
    variants: int
    ended: str
    decision: str
    rewrites: tuple[str, ...]
    difference: str

    def line(self, shown: Sequence[str]) -> str:
        """The columns that are shown, as one line of a Markdown table."""
        best = min(x for x in (self.fp32, self.fp16, self.untuned, self.peer) if x is not None)
        mark = "" if self.tuned <= best * (1 + TIE) + TIE_US else " (above)"
        times = [self.fp32, self.fp16, self.untuned, self.peer, self.tuned, self.sqnr_db]
        fp32, fp16, untuned, peer, tuned, sqnr = ("-" if x is None else f"{x:.1f}" for x in times)
        alike = self.decision in ("tie", "within the error")
        of_fp16 = "equal" if alike else f"{self.tuned / self.fp16:.2f}"
        cells = [self.model, self.gpu, fp32, fp16, untuned, peer, tuned + mark, of_fp16]
        cells += [self.decision, sqnr, f"{self.int8_nodes}/{self.of_nodes}"]
        cells += [f"{self.variants}{'+' if self.ended else ''}", f"{self.seconds:.0f}"]
        return "| " + " | ".join(c for name, c in zip(HEADER, cells, strict=True) if name in shown) + " |"


def zoo_cases(folder: Path) -> Iterator[Case]:
    """The evaluation zoo."""
    sys.path.insert(0, str(folder.resolve()))
    zoo = importlib.import_module("zoo")
    for case in zoo.zoo():
        zoo.named(case)
        yield Case(name=case.name, path=case.path, calibration=case.calibration, evaluation=case.evaluation)


def monai_cases(folder: Path, volume: Path) -> Iterator[Case]:
    """Networks of `tools/export` in a folder, on crops of a volume; those to evaluate on are of its mirror image."""
    import nibabel

    stored: Any = nibabel.load(volume)
    whole = np.asarray(stored.dataobj).astype(np.float32)
    whole = (whole - whole.mean()) / whole.std()
    for path in sorted(folder.glob("*.onnx")):
        rng, entry = np.random.default_rng(0), load(path).inputs[0]
        size = [d for d in (entry.shape or ())[2:] if isinstance(d, int)]
        sets = []
        for source, count in ((whole, 4), (whole[::-1], 2)):
            starts = [
                [int(rng.integers(0, have - need + 1)) for have, need in zip(whole.shape, size, strict=True)]
                for _ in range(count)
            ]
            cuts = [tuple(slice(s, s + n) for s, n in zip(at, size, strict=True)) for at in starts]
            sets.append([{entry.name: np.ascontiguousarray(source[cut][None, None])} for cut in cuts])
        yield Case(name=path.stem, path=path, calibration=sets[0], evaluation=sets[1])


def modelopt(python: str, case: Case, folder: Path) -> Path | None:
    """Model Optimizer's INT8 with an FP16 rest; few samples, since kernels do not depend on scales."""
    out = folder / f"{case.name}.modelopt.onnx"
    if out.exists():
        return out
    data = {k: np.concatenate([s[k] for s in case.calibration[:2]]) for k in case.calibration[0]}
    np.savez(folder / "data.npz", allow_pickle=False, **data)
    command = [python, Path(__file__).with_name("peer_modelopt.py"), str(case.path), str(folder / "data.npz"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not out.exists():
        print(
            f"{case.name}: Model Optimizer fails: {(done.stderr.strip().splitlines() or ['?'])[-1][:150]}", flush=True
        )
        return None
    return out


def row(case: Case, recipe: Recipe, peer: Path | None, folder: Path, *, measure: bool) -> Row:
    """One model for one target; without `measure` no accuracy, and the price is that of the search."""
    prepared = prepare.load_float(case.path)
    data = inputs.as_samples(case.calibration, prepared)
    shapes: Mapping[str, Any] = {k: ShapeRange.fixed(v.shape) for k, v in case.calibration[0].items()}
    pricer = pricer_of(recipe, shapes)
    assert pricer is not None
    began = time.monotonic()
    found = find_plan(prepared, pricer, samples=data)
    seconds = time.monotonic() - began
    built, accuracy = found.price, None
    if measure:
        made = quantize.quantize(prepared, data, settings=recipe.settings, plan=found.plan)
        done = finish(made.model, made.plan, unquantized_type=recipe.unquantized_type, table=made.table)
        save(done.model, folder / "tuned.onnx")
        built = pricer(done.model)
        held = inputs.as_samples(case.evaluation, prepared)
        accuracy = check.evaluate(case.path, folder / "tuned.onnx", held, limits={}).sqnr_db
    plain = VariantBuilder(model=prepared, settings=recipe.settings, unquantized_types=("fp32",))
    return Row(
        model=case.name,
        gpu=pricer.told[0].name,
        fp32=pricer(prepared).us,
        fp16=found.plain,
        untuned=found.untuned,
        peer=None if peer is None else pricer(load(peer)).us,
        tuned=built.us,
        sqnr_db=accuracy,
        int8_nodes=len(found.plan.quantized_nodes),
        of_nodes=len(plain.quantizable(found.variant)),
        seconds=seconds,
        variants=found.tried,
        ended=found.ended,
        decision=found.decision.verdict,
        rewrites=tuple(r.name for r in found.plan.rewrites),
        difference=difference(found, built),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="folder with zoo.py")
    parser.add_argument("--monai", type=Path, help="folder with networks of tools/export")
    parser.add_argument("--volume", type=Path, help="NIfTI volume for the MONAI networks")
    parser.add_argument("--modelopt", help="python of an environment with nvidia-modelopt")
    parser.add_argument("--target", action="append", help="its usual GPU; sm86, sm89 and sm120 if none is given")
    parser.add_argument("--gpu", action="append", default=[], help="which decides the compiler")
    parser.add_argument("--min-sqnr-db", type=float)
    parser.add_argument("--tune-compiles", type=int, default=TUNE_COMPILES)
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S)
    parser.add_argument("--times-only", action="store_true", help="do not calibrate and measure the tuned model")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    cases: list[Iterator[Case]] = []
    if options.zoo:
        cases.append(zoo_cases(options.zoo))
    if options.monai:
        cases.append(monai_cases(options.monai, options.volume))
    options_of_all = {
        "bias_correction": "off",  # a pass per layer: long on volumes
        "tune_compiles": options.tune_compiles,
        "time_limit": options.time_limit,
        "min_sqnr_db": options.min_sqnr_db,
    }
    rows = []
    absent = {"Model Optimizer": not options.modelopt, "SQNR dB": options.times_only}
    shown = [name for name in HEADER if not absent.get(name)]
    print("| " + " | ".join(shown) + " |\n|" + "---|" * len(shown))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in (case for source in cases for case in source):
            if options.cases and case.name not in options.cases:
                continue
            peer = modelopt(options.modelopt, case, folder) if options.modelopt else None
            named = [{"gpu": gpu, "target": gpu_named(gpu).target} for gpu in options.gpu]
            usual = [] if options.gpu else ["sm86", "sm89", "sm120"]
            for where in [*named, *({"target": target} for target in options.target or usual)]:
                recipe = Recipe.from_mapping({**where, **options_of_all})
                rows.append(row(case, recipe, peer, folder, measure=not options.times_only))
                print(rows[-1].line(shown), flush=True)
                if options.json:
                    options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    record(main)
