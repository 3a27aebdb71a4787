"""ONNX Runtime's default quantize_static output of every zoo model: linted, repaired, compiled, compared.

    python tools/bench_lint.py [--only NAME] [--samples 8] [--json OUT.json]

zoo model -> quantize_static with nothing but defaults (and per_channel, QUInt8) -> repair -> compiled for sm89 by
TensorRT-RTX -> signal to noise of both, against the float model, on the zoo's evaluation samples in ONNX Runtime with
Q and DQ kept apart. Needs the shared folder with the zoo beside the repository, or QDQ_SHARED. It writes nothing but
the table on standard output, and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from results import record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines.backends import rtx
from engines.backends.compiler import ShapeRange
from engines.core.errors import BuildError
from engines.verify.audit import audit
from engines.verify.compare import compare
from qdq.lint.lint import lint
from qdq.lint.repair.repair import repair
from qdq.model.storage import load, save

SHARED = Path(os.environ.get("QDQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
VARIANTS = {
    "int8": {},
    "int8 per channel": {"per_channel": True},
    "uint8": {"activation": "QUInt8"},
    "uint8 per channel": {"activation": "QUInt8", "per_channel": True},
}
Sample = Mapping[str, np.ndarray]


def quantize(model: Path, out: Path, samples: Sequence[Sample], options: Mapping[str, Any]) -> None:
    """ONNX Runtime's own defaults, but for the options of the variant.

    A model older than opset 13 is converted first: ONNX Runtime writes an `axis` into opset 11, which is not ONNX.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples: Iterator[Sample] = iter(samples)

        def get_next(self) -> Sample | None:
            return next(self.samples, None)

    kinds = {"activation_type": QuantType[options["activation"]]} if "activation" in options else {}
    proto = onnx.load(model)
    if max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")) < 13:
        onnx.save(onnx.version_converter.convert_version(proto, 17), model := out.with_name("newer.onnx"))
    quantize_static(str(model), str(out), Reader(), per_channel=options.get("per_channel", False), **kinds)


def compiled(path: Path, sample: Sample) -> tuple[str, int, float]:
    """What the compiler says: '' or its first words, the number of kernels, the share of INT8 multiply-adds."""
    shapes = {
        i.name: ShapeRange(min=s, opt=s, max=s)
        for i in load(path).inputs
        if i.shape is None or not all(isinstance(d, int) for d in i.shape)
        for s in [sample[i.name].shape]
    }
    try:
        engine = rtx.build(path, targets=["sm89"], shapes=shapes)
    except BuildError as error:
        return str(error), 0, 0.0
    found = audit(path, engine.table, shapes=shapes)
    return "", found.kernels, found.int8_share


def measure(case: Any, variant: str, count: int, folder: Path) -> dict[str, object]:
    """One row of the table."""
    source, fixed = folder / "q.onnx", folder / "fixed.onnx"
    quantize(case.path, source, case.calibration[:count], VARIANTS[variant])
    evaluation = case.evaluation[:count]
    model = load(source)
    findings = lint(model)
    start = time.perf_counter()
    done = repair(model)
    seconds = time.perf_counter() - start
    save(done.model, fixed)
    refused, _, _ = compiled(source, evaluation[0])
    still, kernels, share = compiled(fixed, evaluation[0])
    return {
        "model": case.name,
        "variant": variant,
        "errors": sum(f.severity == "error" for f in findings),
        "warnings": sum(f.severity == "warning" for f in findings),
        "before": "refused" if refused else "builds",
        "after": f"refused: {still[:200]}" if still else "builds",
        "left": sorted({f.rule for f in done.left}),
        "kernels": kernels,
        "int8_share": round(share, 3),
        "sqnr_before": round(compare(case.path, source, evaluation).sqnr_db, 2),
        "sqnr_after": round(compare(case.path, fixed, evaluation).sqnr_db, 2),
        "sqnr_between": round(compare(source, fixed, evaluation).sqnr_db, 2),
        "seconds": round(seconds, 2),
    }


def main() -> int:
    """Run the benchmark; exit code 1 if a repaired model does not compile or has errors left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", help="name of a zoo model; repeatable")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="repeatable; default: all")
    parser.add_argument("--samples", type=int, default=8, help="for calibration and for evaluation")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args()
    sys.path.insert(0, str(SHARED / "tools"))
    onnxruntime.set_default_logger_severity(4)
    logging.disable(logging.WARNING)
    import zoo

    rows: list[dict[str, object]] = []
    for case in zoo.zoo():
        if given.only and case.name not in given.only:
            continue
        zoo.named(case)
        for variant in given.variant or VARIANTS:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(case, variant, given.samples, Path(folder))
            if not rows:
                print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
            rows.append(row)
            print("| " + " | ".join(str(v) for v in row.values()) + " |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["after"] != "builds" for row in rows))


if __name__ == "__main__":
    record(main)
