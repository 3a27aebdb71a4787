"""What INT8 is predicted to gain on FP16 with either compiler, beside published ratios of TensorRT.

    python tools/bench_compilers.py NETWORKS --export PYTHON [NAME ...]
    python tools/bench_compilers.py NETWORKS --json rows.json [--published FOLDER] [NAME ...]
    python tools/bench_compilers.py NETWORKS --json rows.json --compiler rtx [--tune-compiles 40] [NAME ...]

NETWORKS holds <name>.onnx with fixed shapes; --export writes those of the table that are missing with the scripts of
tools/export, in an environment with torch, torchvision, transformers and monai. For TensorRT each one is
compiled once in FP16 for each kind of GPU and what is quantized is chosen exactly; for TensorRT-RTX the search of
`qdq tune` runs, which takes minutes. Neither sees samples: in a network with random weights values vanish from layer to
layer, which would keep much of its FP16 form in FP32. A line below the table says what does so without. Rows in --json
are kept, so a run goes on where one ended; all of them are printed. --published is a folder with
published_latencies.csv: INT8 / FP16 of one network, GPU and source, without host time; the least and the most over
shapes and batches, which are others than here.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from results import record

from engines.core.errors import EngineError
from engines.core.operators import CONTRACTIONS
from engines.cost.gpus import gpu_named
from qdq.assemble.precision.rules import decide
from qdq.build.engine import shape_ranges
from qdq.build.pricing.tensorrt_pricer import pricer_of
from qdq.build.recipe import Recipe
from qdq.passes.prepare import load_float
from qdq.tune.find_plan import find_plan

GPUS: Mapping[str, tuple[str, ...]] = {"tensorrt": ("t4", "a10", "a100", "l4"), "rtx": ("rtx4090", "rtx5090")}
HEADER = (
    *("network", "compiler", "GPU", "FP16 us", "INT8 everywhere / FP16", "chosen / FP16", "INT8 nodes", "of"),
    *("INT8 against float", "s", "published INT8 / FP16"),
)
# name of a file -> script of tools/export, and its options: the sizes that latencies are published for
SCRIPTS: Mapping[str, str] = {
    "resnet50": "resnet50 --batch 8",
    "efficientnet_b0": "resnet50 --model efficientnet_b0 --batch 8",
    "mobilenet_v2": "resnet50 --model mobilenet_v2 --batch 8",
    "vit_b_16": "vit --batch 8",
    "bert_base": "bert --batch 8 --no-mask",
    "yolo": "yolo --batch 8",
    "unet": "unet --norm instance",
    "segresnet": "segresnet --width 16 --classes 14",
    "dynunet": "dynunet",
    "swinunetr": "swinunetr --width 24 --classes 14",
}
# name of a file -> names in published_latencies.csv
PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "resnet50": ("resnet50", "tv_resnet50"),
    "efficientnet_b0": ("efficientnet_b0", "tv_efficientnet_b0"),
    "mobilenet_v2": ("mobilenetv2_100",),
    "bert_base": ("bertb128",),
    "yolo": ("yolov9c",),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network, compiler and GPU; microseconds, None where FP16 does not compile."""

    network: str
    compiler: str
    gpu: str
    fp16: float | None
    everything: float | None
    chosen: float | None
    nodes: int
    candidates: int
    verdict: str
    seconds: float

    def cells(self, published: str) -> list[str]:
        """As of `HEADER`."""
        if self.fp16 is None or self.chosen is None:
            return [self.network, self.compiler, self.gpu, "does not compile", *[""] * 6, published]
        most = "does not compile" if self.everything is None else f"{self.everything / self.fp16:.2f}"
        figures = [f"{self.fp16:.0f}", most, f"{self.chosen / self.fp16:.2f}", str(self.nodes), str(self.candidates)]
        return [self.network, self.compiler, self.gpu, *figures, self.verdict, f"{self.seconds:.0f}", published]


def export(folder: Path, names: Sequence[str], python: str) -> None:
    """Write the networks of `SCRIPTS` that are not there, all or those that are named.

    Raises:
        subprocess.CalledProcessError: a script fails, and has said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or SCRIPTS:
        script, *options = SCRIPTS[name].split()
        path = folder / f"{name}.onnx"
        if not path.exists():
            own = Path(__file__).parent / "export" / f"{script}.py"
            subprocess.run([python, str(own), str(path), *options], check=True, stdout=sys.stderr)


def float32_products(path: Path) -> int:
    """How many products the FP16 form of a network computes in FP32: with any, its ratio flatters INT8."""
    prepared = load_float(path)
    return sum(prepared.node(name).op_type in CONTRACTIONS for name in decide(prepared, "float16", None))


def row(path: Path, compiler: str, gpu: str, compiles: int | None) -> Row:
    """Tune one network, with so many variants at most."""
    prepared, known = load_float(path), gpu_named(gpu)
    options = {"compiler": compiler, "target": known.target, "gpu": gpu, "unquantized_type": "fp16"}
    recipe = Recipe.from_mapping(options if compiles is None else {**options, "tune_compiles": compiles})
    pricer = pricer_of(recipe, shape_ranges(prepared, (), None) or {})
    assert pricer is not None
    began = time.monotonic()
    found = find_plan(prepared, pricer, samples=None)
    seconds = time.monotonic() - began
    outcome = found.outcome(pricer.told)
    skipped = sum(skip.rule == "tuned" for skip in found.plan.skips)
    return Row(
        network=path.stem,
        compiler=compiler,
        gpu=gpu,
        fp16=outcome.unquantized_us,
        everything=outcome.untuned_us,
        chosen=outcome.predicted_us,
        nodes=outcome.quantized_nodes,
        candidates=outcome.quantized_nodes + skipped,
        verdict=outcome.decision.verdict,
        seconds=seconds,
    )


def ratios(folder: Path | None, network: str, gpu: str) -> str:
    """The published ratios of a network, on this GPU or else on others, with their number."""
    if folder is None:
        return ""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    with (folder / "published_latencies.csv").open() as file:
        for line in csv.DictReader(file):
            if line["model"] in PUBLISHED.get(network, ()) and line["quality"] == "clean":
                tool = line["tool_version"].split(",")[0]
                key = (line["gpu"], line["source_url"], line["model"], line["shape"], line["batch"], tool)
                found.setdefault(key, {})[line["precision"]] = float(line["measured_ms"])
    pairs = [(key[0], both["int8"] / both["fp16"]) for key, both in found.items() if {"int8", "fp16"} <= both.keys()]
    mine = [ratio for other, ratio in pairs if other == gpu]
    if not pairs:
        return "none"
    some, where = (mine, "") if mine else ([ratio for _, ratio in pairs], ", ".join(sorted({g for g, _ in pairs})))
    span = f"{min(some):.2f}" if len(some) == 1 else f"{min(some):.2f} to {max(some):.2f}"
    return f"{span} ({len(some)}{f', on {where}' if where else ''})"


def _kept(path: Path | None) -> list[Row]:
    return [Row(**values) for values in json.loads(path.read_text())] if path and path.exists() else []


def _keep(path: Path | None, rows: Sequence[Row]) -> None:
    if path:
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(json.dumps([asdict(r) for r in rows], indent=1))
        os.replace(beside, path)


def main() -> None:
    """Add the rows that are asked for, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with <name>.onnx")
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of the folder if none is given")
    parser.add_argument("--export", metavar="PYTHON", help="write missing networks with it, and do nothing else")
    parser.add_argument("--json", type=Path, help="rows so far; new ones are added")
    parser.add_argument("--published", type=Path, help="folder with published_latencies.csv")
    parser.add_argument("--compiler", choices=tuple(GPUS), default="tensorrt")
    parser.add_argument("--tune-compiles", type=int, help="variants a search looks at, at most; else the usual number")
    parser.add_argument("--gpus", nargs="+", help="some of the compiler's")
    given = parser.parse_intermixed_args()
    if given.export:
        export(given.folder, given.names, given.export)
        return
    rows, refused = _kept(given.json), list[str]()
    paths = [given.folder / f"{name}.onnx" for name in given.names] or sorted(given.folder.glob("*.onnx"))
    for path in paths:
        for gpu in given.gpus or GPUS[given.compiler]:
            if (path.stem, given.compiler, gpu) not in {(r.network, r.compiler, r.gpu) for r in rows}:
                try:
                    rows.append(row(path, given.compiler, gpu, given.tune_compiles))
                except EngineError as error:
                    refused.append(f"{path.stem} on {gpu}: {error}")
                _keep(given.json, rows)
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for one in sorted(rows, key=lambda r: (r.compiler == "rtx", r.network)):
        print("| " + " | ".join(one.cells(ratios(given.published, one.network, one.gpu))) + " |")
    for path in paths:
        if count := float32_products(path):
            print(f"\n{path.stem}: its FP16 form computes {count} products in FP32, so that its ratio flatters INT8.")
    for why in refused:
        print(f"\nNot predicted: {' '.join(why.split())[:300]}")


if __name__ == "__main__":
    record(main, key=3)
