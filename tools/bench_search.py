"""How long tuning takes beside the code of another checkout, and whether it finds the same plan.

    git worktree add ../before COMMIT
    python tools/bench_search.py NETWORKS --against ../before [--gpu rtx4090] [--tune-compiles 16] [NAME ...]

NETWORKS holds <name>.onnx with fixed shapes, as `bench_compilers.py --export` writes them; --gpu decides the compiler.
Both searches run in processes of their own, one after the other in each round, the first in turn, since a shared
machine is not the same from minute to minute. Seconds are those of the clock, CPU s those of the processor, of the
compilers' processes too; each the least of the rounds. Nothing is kept between runs. Times are predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from results import record

HERE = Path(__file__).resolve()
HEADER = (
    *("network", "GPU", "variants", "s before", "s", "of before", "CPU s before", "CPU s", "of before"),
    *("predicted us before", "us", "plan"),
)


def search(path: Path, gpu: str, compiles: int) -> dict[str, float | str]:
    """Tune one network with the code that this process imports."""
    from engines.cost.gpus import gpu_named
    from qdq.build.engine import shape_ranges
    from qdq.build.pricing.tensorrt_pricer import pricer_of
    from qdq.build.recipe import Recipe
    from qdq.passes.prepare import load_float
    from qdq.tune.find_plan import find_plan

    prepared, target = load_float(path), gpu_named(gpu).target
    options = {"gpu": gpu, "target": target, "unquantized_type": "fp16", "tune_compiles": compiles}
    pricer = pricer_of(Recipe.from_mapping(options), shape_ranges(prepared, (), None) or {})
    assert pricer is not None
    clock, cpu = time.monotonic(), _cpu()
    found = find_plan(prepared, pricer, samples=None)
    spent = {"seconds": time.monotonic() - clock, "cpu": _cpu() - cpu}
    return {**spent, "us": found.price.us, "variants": found.tried, "plan": found.plan.sha256}


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def beside(path: Path, gpu: str, compiles: int, checkouts: list[Path], rounds: int) -> list[str]:
    """The cells of one network."""
    found: list[list[dict[str, float | str]]] = [[] for _ in checkouts]
    command = [sys.executable, str(HERE), "--one", str(path), "--gpu", gpu, "--tune-compiles", str(compiles)]
    for turn in range(rounds):
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            said = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": str(checkouts[index])}, check=True, stdout=subprocess.PIPE
            )
            found[index].append(json.loads(said.stdout))
    before, after = found[0][0], found[1][0]
    cells = [path.stem, gpu, f"{after['variants']}"]
    for key in ("seconds", "cpu"):
        least = [min(float(run[key]) for run in runs) for runs in found]
        cells += [*(f"{value:.0f}" for value in least), f"{least[1] / least[0]:.2f}"]
    same = "the same" if before["plan"] == after["plan"] else "another"
    return [*cells, *(f"{float(run['us']):.1f}" for run in (before, after)), same]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with <name>.onnx")
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of the folder if none is given")
    parser.add_argument("--against", type=Path, help="checkout of another commit")
    parser.add_argument("--gpu", nargs="+", default=["rtx4090"])
    parser.add_argument("--tune-compiles", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args()
    if given.one:
        print(json.dumps(search(given.folder, given.gpu[0], given.tune_compiles)))
        return
    if given.against is None:
        parser.error("--against: name the checkout to compare with")
    checkouts = [given.against.resolve(), HERE.parents[1]]
    paths = [given.folder / f"{name}.onnx" for name in given.names] or sorted(given.folder.glob("*.onnx"))
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for path in paths:
        for gpu in given.gpu:
            cells = beside(path, gpu, given.tune_compiles, checkouts, given.rounds)
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    record(main, key=2)
