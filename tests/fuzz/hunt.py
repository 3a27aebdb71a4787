"""One hostile input after the other: what must hold of each, and a long run of many.

    python tests/fuzz/hunt.py [COUNT] [--seed N] [--kind KIND]

prints the seed and the command line of each that breaks a rule, and at the end how many inputs ended how. The folder of
the last one that broke a rule stays among the temporary files, as qdq-hunt-*.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program

from fuzz.forked import CPU_S, MEMORY, Outcome, Server
from fuzz.mutate import KINDS, QUANTIZE, Made, files, valid

LOADS = "import onnxruntime as o; o.InferenceSession('q.onnx')"
FINE = (0, 1, 2, 3)
EVERY = 500  # inputs between two lines


def valid_documents(server: Server, folder: Path) -> Made:
    """The files that valid runs write."""
    from qdq.build.engine import compile_engine, save_engine, shape_ranges
    from qdq.build.recipe import Recipe
    from qdq.model.storage import load

    valid(folder)
    plan = server.run(folder, "plan", "model.onnx", "-o", "plan.json")
    table = server.run(
        folder, "calibrate", "model.onnx", "--data", "samples", "--plan", "plan.json", "-o", "table.json"
    )
    done = server.run(folder, *QUANTIZE)
    assert not plan.code and not table.code and not done.code, (plan, table, done)
    recipe = Recipe.from_mapping({"shape": ["x:1x8"]})
    shapes = shape_ranges(load(folder / "q.onnx"), recipe.shapes, None)
    engine = compile_engine(folder / "q.onnx", recipe=recipe, shapes=shapes)
    save_engine(engine, folder / "m.engine", folder / "q.onnx", recipe=recipe, shapes=shapes)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def broken(server: Server, kind: str, made: Made, random: Random) -> tuple[list[str], Outcome, str]:
    """Run one input; its command line, how it ended, and the rule that it broke ("" for none)."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        folder.mkdir()
        command = files(kind, folder, made, random)
        before = _state(folder)
        outcome = server.run(folder, *command)
        after = _state(folder)
        new = after.keys() - before.keys()
        rule = ""
        errors = sum(line.startswith("Error: ") for line in outcome.said.splitlines())
        if outcome.code not in FINE:
            rule = f"ended with {outcome.code}"
        elif "Traceback" in outcome.said or (outcome.code == 2 and errors != 1):
            rule = "no single paragraph"
        elif outcome.bytes > MEMORY:
            rule = f"took {outcome.bytes >> 20} MiB"
        elif any(after.get(name) != digest for name, digest in before.items()):
            rule = "changed an input"
        elif new - {"q.onnx", "p.json"} or (outcome.code == 2 and new):
            rule = f"left {sorted(new)}"
        elif "q.onnx" in new and (loaded := server.run(folder, "python", LOADS)).code:
            rule = f"wrote a file that ONNX Runtime cannot load: {loaded.said.strip()[-300:]}"
        if rule:
            kept = Path(tempfile.gettempdir()) / f"qdq-hunt-{hashlib.sha256(rule.encode()).hexdigest()[:8]}"
            shutil.rmtree(kept, ignore_errors=True)
            pipes = {path.name for path in folder.rglob("*") if path.is_fifo()}
            shutil.copytree(folder, kept, symlinks=True, ignore=lambda _, names: pipes & {*names})
        return command, outcome, rule


def _state(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def main() -> int:
    """The long run; 1 if a rule was broken."""
    parser = ArgumentParser(description="Give hostile inputs to the command line.")
    parser.add_argument("count", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(set(KINDS)))
    given = parser.parse_args()
    ended: Counter[str] = Counter()
    slowest = 0.0
    with Server() as server, tempfile.TemporaryDirectory() as folder:
        made = valid_documents(server, Path(folder))
        for seed in range(given.seed, given.seed + given.count):
            random = Random(seed)
            kind = given.kind or random.choice(KINDS)
            command, outcome, rule = broken(server, kind, made, random)
            slowest = max(slowest, outcome.seconds)
            ended[f"{kind}: {outcome.code}" if not rule else "broken"] += 1
            if sum(ended.values()) % EVERY == 0:
                print(f"{sum(ended.values())} inputs, {ended['broken']} of them broke a rule", flush=True)
            if rule:
                last = outcome.said.strip().splitlines()[-1:]
                print(f"seed {seed} ({kind}): {rule}: qdq {' '.join(command)}: {''.join(last)[:400]}", flush=True)
    print(f"{given.count} inputs, the slowest {slowest:.1f} s of {CPU_S} s of CPU: {dict(sorted(ended.items()))}")
    return int(bool(ended["broken"]))


if __name__ == "__main__":
    sys.exit(main())
