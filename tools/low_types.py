"""Every float model of onnx's own node tests in FP16 and BF16: is the file valid, does it run, does it compile?

    python tools/low_types.py [--compile] [--only REGEX]

node tests -> `prepare`, `convert` with measured ranges -> full check with strict inference -> ONNX Runtime with default
options -> with --compile TensorRT-RTX, where it compiles the float model. Prints what fails, and counts.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from node_tests import float_tests, with_constants

from engines.core.onnx_runtime import refusals
from qdq.assemble.precision import rules
from qdq.assemble.precision.convert import convert
from qdq.core.errors import QdqError
from qdq.measure.collect import collect
from qdq.model.storage import load
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.settings import Settings


def runs(proto: onnx.ModelProto, sample: dict[str, np.ndarray]) -> str:
    """What ONNX Runtime says with default options, '' if it runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {i.name: sample[i.name] for i in session.get_inputs()})
    except refusals() as error:
        return " ".join(str(error).split())
    return ""


def verdicts(
    low: str, only: str = "", *, every: int = 1, compile_: Callable[[onnx.ModelProto], str] | None = None
) -> Iterator[tuple[str, str, str]]:
    """Name of each test, what became of it ("valid", "invalid", "does not run", ...), and what was said.

    Each node takes the low type even between FP32 neighbours, which in a model would be two Casts for nothing.
    """
    for name, proto, sample in itertools.islice((t for t in float_tests() if re.search(only, t[0])), 0, None, every):
        try:
            if compile_ is not None:
                proto = with_constants(proto, sample)
            model = prepare(load(proto))
            onnx.checker.check_model(model.proto, full_check=True)
        except (QdqError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError):
            yield name, "not taken", ""
            continue
        if runs(model.proto, sample):
            yield name, "float does not run", ""
            continue
        table = collect(model, placement.plan(model, Settings(exclude=("*",))), [sample])
        with patch.object(rules._Rules, "keep_what_float_surrounds", lambda _: None):
            made = convert(model, unquantized_type=low, table=table)
        try:
            onnx.checker.check_model(made.model.proto, full_check=True)
            onnx.shape_inference.infer_shapes(made.model.proto, check_type=True, strict_mode=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            yield name, "invalid", " ".join(str(error).split())
            continue
        if (said := runs(made.model.proto, sample)) and "NOT_IMPLEMENTED" not in said:
            yield name, "does not run", said
        elif compile_ is not None and (said := compile_(made.model.proto)):
            plain = compile_(model.proto)
            yield name, "float does not compile" if plain else "does not compile", plain or said
        else:
            yield name, "kept FP32" if len(made.kept) >= len(model.graph.node) else "valid", ""


def compiler() -> Callable[[onnx.ModelProto], str]:
    """What TensorRT-RTX says of a model, '' if it compiles it."""
    from engines.backends import rtx
    from engines.core.errors import EngineError

    def compiled(proto: onnx.ModelProto) -> str:
        try:
            rtx.build(proto)
        except EngineError as error:
            return " ".join(str(error).split())
        return ""

    return compiled


def main() -> None:
    """Print failures and counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="", help="of the tests' names")
    parser.add_argument("--types", default="fp16,bf16")
    options: Any = parser.parse_args()
    for low in options.types.split(","):
        found: Counter[str] = Counter()
        for name, what, said in verdicts(low, options.only, compile_=compiler() if options.compile else None):
            found[what] += 1
            if what in ("invalid", "does not run", "does not compile"):
                print(f"{low} {what}: {name}: {said[:240]}", flush=True)
        print(low, dict(found), flush=True)


if __name__ == "__main__":
    main()
