"""INT8 with an FP16 rest of networks built in code: the defaults against ranges of the largest value, nearest codes.

    python tools/bench_plain.py [--seeds 0 1] [NETWORK ...]

"plain" has one scale per tensor of the largest value, one per output channel for weights, and nothing else. Both are
computed in the types of their files. "worst" is the difference of the output that loses most. A node of our
file agrees where it is within one unit in the last place of FP16 of onnx's reference (`check_fp16.py`), on what
`engines.core.arithmetic` gives it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from check_fp16 import node_by_node
from plain_networks import NETWORKS, Built
from results import record

from engines.core import arithmetic
from qdq.assemble.finish import finish
from qdq.assemble.quantize import quantize
from qdq.plan.settings import Settings

PLAIN = Settings(calibrator="max", rounding="nearest", equalize="none", shift=False, bias_correction="off")
Outputs = dict[str, np.ndarray]


def outputs(model: onnx.ModelProto, built: Built) -> Outputs:
    """All samples' outputs, joined."""
    session = arithmetic.session(model)
    names = [o.name for o in session.get_outputs()]
    found = [session.run(None, sample) for sample in built.evaluation]
    return {name: np.concatenate([f[i].ravel() for f in found]).astype(np.float64) for i, name in enumerate(names)}


def decibels(wanted: Outputs, found: Outputs) -> dict[str, float]:
    """SQNR in dB of each output."""
    noises = {name: float(np.sum((wanted[name] - found[name]) ** 2)) for name in wanted}
    return {name: float(10 * np.log10(np.sum(wanted[name] ** 2) / max(noises[name], 1e-300))) for name in wanted}


def shipped(built: Built, settings: Settings, path: Path) -> onnx.ModelProto:
    """The file that a run with these settings builds."""
    made = quantize(str(path), built.calibration, settings=settings)
    return finish(made.model, made.plan, unquantized_type="fp16", table=made.table).model.proto


def agreeing(model: onnx.ModelProto, built: Built) -> str:
    """How many nodes agree with the reference, of how many it can compute; those that differ."""
    outcomes = [o for o in node_by_node(model, built.evaluation[0]) if not o.verdict.startswith("left out")]
    far = [f"{o.name}: {o.detail}" for o in outcomes if o.verdict != "agrees"]
    return f"{len(outcomes) - len(far)} of {len(outcomes)} {'; '.join(far[:2])}".strip()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS], help="all where none is named")
    options = parser.parse_args()
    print("| network | seed | plain | qdq | worst | nodes that agree |\n|---|---|---|---|---|---|", flush=True)
    for name in options.networks or NETWORKS:
        for seed in options.seeds:
            built = NETWORKS[name](seed)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{name}.onnx"
                onnx.save(built.model, path)
                plain, ours = (shipped(built, settings, path) for settings in (PLAIN, Settings()))
            wanted = outputs(built.model, built)
            before, after = (decibels(wanted, outputs(model, built)) for model in (plain, ours))
            worst = min(after[o] - before[o] for o in after)
            shown = f"{min(before.values()):.1f} | {min(after.values()):.1f} | {worst:+.1f} | {agreeing(ours, built)}"
            print(f"| {name} | {seed} | {shown} |", flush=True)


if __name__ == "__main__":
    record(main)
