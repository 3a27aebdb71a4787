"""The networks of tools/export, each from its script through `qdq deploy` for both compilers, beside published figures.

    python tools/bench_export.py FOLDER [NAME ...] [--python PYTHON] [--compiles N] [--skip rtx] [--show] [--keep FILE]

A script writes FOLDER/<name>.onnx with fresh weights and two samples, in an environment with torch (--python); `qdq
deploy --tune rewrites` then puts INT8 wherever a compiler takes it, for an RTX 4090 (TensorRT-RTX) and an A100
(TensorRT), with the lightest calibration: speed does not depend on scales, and the accuracy of random weights says
nothing. What FOLDER has is not made again, so a run goes on where one ended; all that is there is printed. Of other
networks `--keep RESULTS.md` prints the rows that its table has already. Options of a script stand behind its name:
`"unet --patch 64 64 64"`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results import record

from engines.cost.gpus import gpu_named
from qdq.build.engine import shape_ranges
from qdq.build.pricing.tensorrt_pricer import pricer_of
from qdq.build.recipe import Recipe
from qdq.passes.prepare import load_float

SCRIPTS = Path(__file__).with_name("export")
GPUS: Mapping[str, str] = {"rtx": "rtx4090", "tensorrt": "a100"}
LIGHT = (
    *("--tune", "rewrites", "--calibrator", "max", "--rounding", "nearest", "--equalize", "none"),
    *("--bias-correction", "off", "--warn-sqnr-db", "-100", "--warn-top1", "0"),
)
# MedPTQ (arXiv 2501.17343): MB of the engine in FP32 and INT8, ms in FP32 and INT8, on a GPU that is not named.
PUBLISHED: Mapping[str, tuple[float, float, float, float]] = {
    "unet": (23.11, 6.61, 2.62, 1.05),
    "transunet": (351.85, 91.90, 4.09, 1.74),
    "plain_conv_unet": (107.84, 33.97, 2.99, 1.25),
    "swinunetr": (247.96, 70.18, 9.85, 3.59),
    "segresnet": (170.44, 50.29, 5.14, 2.06),
}
SHORT = "The search for the best rewrites was cut short, so INT8 may be faster: "
HEADER = (
    *("network", "MB FP32", "MB INT8", "compiler", "FP32 us", "FP16 us", "INT8 us", "FP32 / INT8", "FP16 / INT8"),
    *("INT8 share", "MedPTQ: MB, ms, FP32 / INT8"),
)
NOTE = """
Times are predicted, of one inference of a batch of one: rtx on an RTX 4090, tensorrt on an A100. MB are of the ONNX
files. INT8 is everywhere that the compiler takes it, also where `qdq deploy` would keep FP16 for speed. "INT8 share" is
that of the multiply-adds in compiled layers; TensorRT's engine is not built without its GPU. MedPTQ's figures (arXiv
2501.17343) are measured engines of TensorRT 10.3 against FP32, on a GPU that is not named, and of networks that are not
in every layer these."""


def names() -> list[str]:
    """The scripts."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def ran(command: Sequence[str], limit: float) -> tuple[int, str]:
    """Exit code and what was printed; 124 where the time was over."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return 124, f"not done after {limit:.0f} s"
    return done.returncode, done.stdout.decode(errors="replace")


def fp32_us(path: Path, compiler: str) -> float | None:
    """Predicted microseconds of a network as it is; None where it does not compile."""
    prepared, gpu = load_float(path), gpu_named(GPUS[compiler])
    recipe = Recipe.from_mapping({"compiler": compiler, "target": gpu.target, "gpu": gpu.name})
    pricer = pricer_of(recipe, shape_ranges(prepared, (), None) or {})
    assert pricer is not None
    us = pricer(prepared).us
    return us if math.isfinite(us) else None


def made(call: str, compiler: str, given: argparse.Namespace) -> dict[str, Any]:
    """Export and deploy one network for one compiler: the figures of its report, or what failed."""
    name, *options = shlex.split(call)
    model, samples = given.folder / f"{name}.onnx", given.folder / name
    if not samples.exists():
        command = [given.python, str(SCRIPTS / f"{name}.py"), str(model), "--samples", str(samples), "--count", "2"]
        code, said = ran([*command, *options], given.limit)
        if code:
            return {"failed": f"the script ended with {code}: {said.strip()[-300:]}"}
    out, began = given.folder / f"{name}.{compiler}", time.monotonic()
    if not (out / "report.json").exists():
        command = [sys.executable, "-m", "qdq", "deploy", str(model), "--data", str(samples), "--out", str(out), *LIGHT]
        command += ["--tune-compiles", str(given.compiles), "--gpu", GPUS[compiler], "--compiler", compiler, "-q"]
        code, said = ran(command, given.limit)
        if code:
            return {"failed": f"deploy ended with {code}: {said.strip()[-300:]}"}
    report = json.loads((out / "report.json").read_text())
    tuning, audit = report["tuning"], report["audit"]
    return {
        "fp32_bytes": report["float_file_bytes"],
        "int8_bytes": report["int8_file_bytes"],
        "fp32_us": tuning["fp32_us"] or fp32_us(model, compiler),
        "fp16_us": tuning["unquantized_us"],
        "int8_us": tuning["predicted_us"],
        "share": audit and audit["int8_share"],
        "ended_by": tuning["ended_by"],
        "options": options,
        "seconds": time.monotonic() - began,
    }


def cells(name: str, compiler: str, found: Mapping[str, Any]) -> list[str]:
    """A row, as of `HEADER`."""
    published = "none"
    if name in PUBLISHED:
        big, small, slow, fast = PUBLISHED[name]
        published = f"{big} to {small}, {slow} to {fast}, {slow / fast:.2f}"
    if "failed" in found:
        return [name, "", "", compiler, *[""] * 6, published]
    times = [found["fp32_us"], found["fp16_us"], found["int8_us"]]
    shown = ["no kernel" if us is None else f"{us:.0f}" for us in times]
    gains = [f"{us / times[2]:.2f}" if us and times[2] else "" for us in times[:2]]
    share = "not built" if found["share"] is None else f"{found['share']:.3f}"
    sizes = [f"{found[key] / 1e6:.1f}" for key in ("fp32_bytes", "int8_bytes")]
    title = " ".join([name, *found["options"]])
    return [title, *sizes, compiler, *shown, *gains, share, published]


def kept(text: str) -> tuple[dict[tuple[str, str], str], list[str]]:
    """The rows of a table that was printed before, by network and compiler; and whose search was cut short."""
    lines = [line for line in text.splitlines() if line.count(" | ") == len(HEADER) - 1]
    split = {line: line.strip("| ").split(" | ") for line in lines}
    rows = {(row[0].split()[0], row[3]): line for line, row in split.items() if row[3] in GPUS and row[4]}
    said = re.search(rf"{re.escape(SHORT)}(.*)\.", text)
    return rows, said[1].split(", ") if said else []


def table(folder: Path, before: str = "") -> None:
    """Print what a folder has, and of a table printed before what the folder lacks."""
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    found = {
        (name, compiler): json.loads(path.read_text())
        for path in sorted(folder.glob("*.figures.json"))
        for name, compiler in [path.name.removesuffix(".figures.json").split(".")]
    }
    rows, short = kept(before)
    rows |= {key: f"| {' | '.join(cells(*key, made))} |" for key, made in found.items()}
    print(*(rows[key] for key in sorted(rows)), sep="\n")
    print(NOTE)
    for key, made in found.items():
        if "failed" in made:
            print(f"\n{' for '.join(key)}: {' '.join(made['failed'].split())}")
    made_here = {name for name, _ in found}
    cut = {name for (name, _), made in found.items() if made.get("ended_by")} | ({*short} - made_here)
    if cut:
        print(f"\n{SHORT}{', '.join(sorted(cut))}.")


def main() -> None:
    """Make the rows that are asked for and not there, then print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default: all")
    parser.add_argument("--python", default=sys.executable, help="of an environment with torch and the libraries")
    parser.add_argument("--compiles", type=int, default=12, help="of the search for the best rewrites; default 12")
    parser.add_argument("--skip", action="append", default=[], choices=tuple(GPUS), help="a compiler; repeatable")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a script or a deployment; default 3600")
    parser.add_argument("--show", action="store_true", help="print what is there, and make nothing")
    parser.add_argument("--keep", type=Path, metavar="RESULTS.md", help="print the rows, too, that its table has")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for call in () if given.show else given.names or names():
        for compiler in GPUS:
            path = given.folder / f"{call.split()[0]}.{compiler}.figures.json"
            if compiler in given.skip or (path.exists() and "failed" not in json.loads(path.read_text())):
                continue
            path.write_text(json.dumps(made(call, compiler, given), indent=1))
            print(path.name, file=sys.stderr, flush=True)
    table(given.folder, given.keep.read_text(encoding="utf-8") if given.keep else "")


if __name__ == "__main__":
    record(main)
