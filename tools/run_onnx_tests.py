"""ONNX's own tests of single operators through preparation, FP16 and INT8: what becomes of each?

    python tools/run_onnx_tests.py [--stages prepare,fp16,int8] [--only REGEX] [--part I/N]

Each test's own inputs are the samples; for INT8 all inputs but the first float one become constants, as weights are.

    equal     the outputs are those of the original in ONNX Runtime: within float rounding; in FP16 within what it
              loses; in INT8 at least 30 dB, and no more noise than a plain quantizer's steps make (see below)
    float     in INT8: equal within float rounding, for nothing in it is quantized
    noisy     in INT8: within what the steps make, but below 30 dB
    refused   an error of qdq's own, one paragraph
    wrong     other values, shapes or types
    invalid   onnx's full check with strict types, or ONNX Runtime, does not take the file
    crash     any other exception

Counted are the tests that ONNX Runtime itself runs. Tests of random operators only have to be valid, and so has
BatchNormalization in training: ONNX Runtime counts a sample twice where its inputs were cast. In FP16 the outputs may
also be those of the original from inputs rounded to FP16. Tests of quantized operators are prepared, and no further.
INT8 is held to a bound that knows nothing of the result: uniform noise, one step of a plain quantizer wide, is added to
each quantized tensor of the float model, and an output's error may be half as large again as what arrives there
(`quantization_noise`; the draws of an output of few values scatter, 1.16 is the most seen).
Prints what is not equal, and counts.
"""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from node_tests import RANDOM, are_numbers, collected, feeds, with_constants
from quantization_noise import distance, expected_noise

from calib_data import DataError
from engines.core import arithmetic
from engines.core.errors import EngineError
from engines.core.nodes import all_nodes, attribute
from engines.core.onnx_runtime import refusals
from qdq.assemble.finish import finish
from qdq.assemble.precision import rules
from qdq.assemble.precision.convert import convert
from qdq.assemble.quantize import quantize
from qdq.core.errors import QdqError
from qdq.measure.collect import collect
from qdq.model.model import Model
from qdq.model.storage import is_quantized, load
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.settings import Settings

FLOAT_ERROR = 2e-5  # of the largest value of an output: what another order of FP32 sums may make of it
FP16_ERROR = 0.02  # likewise
INT8_NOISE = 1.5  # of the noise expected, each as the root of the mean square
LEAST_DB = 30.0  # of an output in INT8, which keeps 40 to 60 unless one value alone decides a scale
RUN = "not run by ONNX Runtime"
Outputs = list[Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one test."""

    name: str
    verdict: str
    said: str = ""


def outputs(proto: onnx.ModelProto, given: dict[str, Any]) -> Outputs:
    """What ONNX Runtime computes with default options; raises `refusals`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Outputs = session.run(None, {i.name: given[i.name] for i in session.get_inputs() if i.name in given})
    return found


def differs(found: Any, wanted: Any, error: float) -> str:
    """How an output differs, '' where it is equal; values of outputs that are no floats must be the same.

    The largest difference counts, against the largest value.
    """
    if isinstance(wanted, list):
        pairs = zip(found, wanted, strict=True) if len(found) == len(wanted) else [(None, len(wanted))]
        return next((text for f, w in pairs if (text := differs(f, w, error))), "")
    if wanted is None or found is None:
        return "" if found is wanted else f"{found} for {wanted}"
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{found.dtype} {found.shape} for {wanted.dtype} {wanted.shape}"
    if wanted.dtype.kind != "f" and wanted.dtype.name not in ("bfloat16",):
        return "" if np.array_equal(found, wanted) else "other values"
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "other infinities"
    largest, far = np.abs(b[finite]).max(initial=0), np.abs(a[finite] - b[finite]).max(initial=0)
    if np.isnan(far) or far > max(error, 2.0**-10 if wanted.dtype != np.float32 else 0) * largest:
        return f"{far:.3g} apart, of {largest:.3g}"
    return ""


def judged(made: onnx.ModelProto, found: Outputs, wanted: Outputs, *, error: float, fixed: bool) -> tuple[str, str]:
    """Whether a file is valid and its outputs are those wanted; `fixed` where they can be compared."""
    try:
        onnx.checker.check_model(made, full_check=True)
        onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as failure:
        return "invalid", " ".join(str(failure).split())
    if not fixed:
        return "equal", ""
    far = differs(found, wanted, error)
    return ("wrong" if far else "equal"), far


def prepared(proto: onnx.ModelProto, given: dict[str, Any], wanted: Outputs, fixed: bool) -> tuple[str, str]:
    """The test through loading and preparation."""
    model = prepare(load(proto))
    return judged(model.proto, outputs(model.proto, given), wanted, error=FLOAT_ERROR, fixed=fixed)


def in_fp16(proto: onnx.ModelProto, given: dict[str, Any], wanted: Outputs, fixed: bool) -> tuple[str, str]:
    """The test in FP16: each node takes it, even between FP32 neighbours."""
    model = prepare(load(proto))
    table = collect(model, placement.plan(model, Settings(exclude=("*",))), [given])
    with patch.object(rules._Rules, "keep_what_float_surrounds", lambda _: None):
        made = convert(model, unquantized_type="fp16", table=table).model.proto
    outputs(made, given)
    found = arithmetic.session(made).run(None, given)
    result = judged(made, found, wanted, error=FP16_ERROR, fixed=fixed)
    if result[0] == "wrong":
        low = {k: a.astype(np.float16).astype(a.dtype) if a.dtype == np.float32 else a for k, a in given.items()}
        return judged(made, found, outputs(proto, low), error=FP16_ERROR, fixed=fixed)
    return result


def in_int8(proto: onnx.ModelProto, given: dict[str, Any], wanted: Outputs, fixed: bool) -> tuple[str, str]:
    """The test in INT8."""
    model = prepare(load(proto))
    fed = {i.name: given[i.name] for i in model.inputs}
    made = quantize(model, [fed], settings=Settings())
    done = finish(made.model, made.plan, unquantized_type="fp32", table=made.table).model.proto
    outputs(done, fed)
    found = arithmetic.session(done).run(None, fed)
    if not made.plan.points:
        verdict, said = judged(done, found, wanted, error=FLOAT_ERROR, fixed=fixed)
        return ("float" if verdict == "equal" else verdict), said
    floats = all(isinstance(w, np.ndarray) and w.dtype.kind == "f" for w in wanted)
    verdict, said = judged(done, found, wanted, error=math.inf, fixed=fixed and floats)
    if verdict != "equal" or not (fixed and floats):
        return verdict, said
    return noisy(found, wanted, expected_noise(made.prepared, made.plan, fed))


def noisy(found: Outputs, wanted: Outputs, expected: Sequence[float]) -> tuple[str, str]:
    """Whether outputs are as near as INT8 can be asked for; `expected` is the norm of each one's noise."""
    verdict, said = "equal", ""
    for a, b, noise in zip(found, wanted, expected, strict=True):
        error, size = distance(a, b), distance(b, np.zeros_like(b))
        text = f"error {error:.3g}, expected {noise:.3g}, of {size:.3g}"
        if error > INT8_NOISE * noise + FLOAT_ERROR * size:
            return "wrong", text
        if error > size * 10 ** (-LEAST_DB / 20):
            verdict, said = "noisy", text
    return verdict, said


Stage = Callable[[onnx.ModelProto, dict[str, Any], Outputs, bool], tuple[str, str]]
STAGES: dict[str, Stage] = {"prepare": prepared, "fp16": in_fp16, "int8": in_int8}


def walk(stage: str, only: str = "", part: tuple[int, int] = (0, 1)) -> Iterator[Result]:
    """What became of each test in a stage."""
    for case in [c for c in collected() if re.search(only, c.name)][part[0] :: part[1]]:
        given = feeds(case)
        proto = with_constants(case.model, given) if stage == "int8" and are_numbers(given) else case.model
        try:
            wanted = outputs(proto, given)
        except refusals():
            yield Result(case.name, RUN)
            continue
        if stage != "prepare" and not are_numbers(given):
            yield Result(case.name, "inputs are no tensors of numbers")
            continue
        if stage != "prepare" and is_quantized(Model(proto=proto, directory=Path(), sha256="")):
            yield Result(case.name, "quantized already")
            continue
        fixed = not any(n.op_type in RANDOM or attribute(n, "training_mode", 0) for n in all_nodes(case.model.graph))
        try:
            yield Result(case.name, *STAGES[stage](proto, given, wanted, fixed))
        except (QdqError, EngineError, DataError) as error:
            yield Result(case.name, "refused", " ".join(str(error).split()))
        except refusals() as error:
            inside = type(error).__module__.startswith("onnxruntime")
            yield Result(case.name, "invalid" if inside else "crash", f"{type(error).__name__}: {error}")
        except Exception as error:
            yield Result(case.name, "crash", f"{type(error).__name__}: {error}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--only", default="", metavar="REGEX", help="tests whose names match")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th test from the I-th on")
    options = parser.parse_args()
    index, count = map(int, options.part.split("/"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stage in options.stages.split(","):
            found: Counter[str] = Counter()
            for result in walk(stage, options.only, (index, count)):
                found[result.verdict] += 1
                if result.said:
                    print(f"{stage} {result.verdict}: {result.name}: {result.said[:300]}", flush=True)
            print(stage, dict(found), flush=True)


if __name__ == "__main__":
    main()
