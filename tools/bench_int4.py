"""Time INT4 blocks of 128 on one large weight: nearest, clip and AWQ, beside ONNX Runtime's quantizer in the same run.

The weight is normal values, the inputs are correlated and of very different size. AWQ is its two halves, channel scales
and clipping, from second moments that are not part of the time (one pass over calibration samples).

    python tools/bench_int4.py [--inputs 4096] [--outputs 8192] [--repeat 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from results import record

from qdq.assemble.insert import insert
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan.placement import plan
from qdq.plan.settings import Settings
from qdq.plan.spec import Spec
from qdq.solve.equalize.weight_only import balanced
from qdq.solve.solve import solve
from qdq.solve.weights import quantize_weight

BLOCK = 128


def product(weight: np.ndarray) -> ModelProto:
    """x -> MatMul -> y."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in zip("xy", weight.shape, strict=True)
    ]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def ours(model: Model, rounding: str) -> ModelProto:
    """The Q/DQ model, without data."""
    chosen = plan(model, Settings(scheme="int4", rounding=rounding, equalize="none"))
    table = CalibrationTable(model_sha256=model.sha256, samples_sha256="", count=0, tensors={})
    return insert(model, chosen, solve(model, chosen, table)).proto


def onnx_runtime(proto: ModelProto) -> ModelProto:
    """ONNX Runtime's Q/DQ model of the same blocks."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = ModelProto()
    copy.CopyFrom(proto)
    quantizer = MatMulNBitsQuantizer(copy, block_size=BLOCK, is_symmetric=True, quant_format=QuantFormat.QDQ)
    quantizer.process()
    made: ModelProto = quantizer.model.model
    return made


def awq(weight: np.ndarray, moment: np.ndarray) -> float:
    """Channel scales, then clipped codes; returns the output error over that of nearest codes, in dB."""
    spec = Spec(format="int4", axis=0, block=BLOCK, weight_only=True)
    divisor = balanced([weight.T], [BLOCK], moment, fmt="int4")
    scaled, seen = weight, moment
    if divisor is not None:
        scaled, seen = weight * divisor[:, None], moment / np.outer(divisor, divisor)
    found = quantize_weight(scaled, spec, outputs=1, rounding="awq", moments=seen[None]).values()
    return error_db(found if divisor is None else found / divisor[:, None], weight, moment)


def error_db(found: np.ndarray, weight: np.ndarray, moment: np.ndarray) -> float:
    """10 log10 of the squared output error over the squared output, on the first 256 outputs."""
    some, small = weight[:, :256].astype(np.float64), moment
    error = found[:, :256] - some
    return float(10 * np.log10(np.sum((small @ error) * error) / np.sum((small @ some) * some)))


def timed(work: Callable[[], object], repeat: int) -> tuple[float, object]:
    """The shortest of several times in seconds, and the last result."""
    best, made = float("inf"), None
    for _ in range(repeat):
        start = time.perf_counter()
        made = work()
        best = min(best, time.perf_counter() - start)
    return best, made


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(options.inputs, options.outputs)) / 64).astype(np.float32)
    sources = rng.normal(size=(options.inputs, 64)) * np.exp(rng.normal(size=(options.inputs, 1)))
    moment = sources @ sources.T + np.eye(options.inputs)
    proto = product(weight)
    model = prepare(Model(proto=proto, directory=Path(), sha256="bench"))
    print(f"{weight.size / 1e6:.1f} M weights, blocks of {BLOCK}")
    peer = None
    try:
        peer, _ = timed(lambda: onnx_runtime(proto), options.repeat)
        print(f"{'ONNX Runtime, nearest, Q/DQ':32} {peer:7.2f} s")
    except ImportError as error:
        print(f"ONNX Runtime's quantizer is not here: {error}")
    for rounding in ("nearest", "clip"):
        seconds, _ = timed(lambda rounding=rounding: ours(model, rounding), options.repeat)  # type: ignore[misc]
        ratio = f"{seconds / peer:6.2f} of ONNX Runtime" if peer else ""
        print(f"{'qdq ' + rounding + ', whole model':32} {seconds:7.2f} s {ratio}")
    seconds, gained = timed(lambda: awq(weight, moment), 1)
    spec = Spec(format="int4", axis=0, block=BLOCK, weight_only=True)
    plain = error_db(quantize_weight(weight, spec, outputs=1, rounding="nearest").values(), weight, moment)
    print(f"{'qdq awq':32} {seconds:7.2f} s, output error {gained:.1f} dB, nearest {plain:.1f} dB")


if __name__ == "__main__":
    record(main)
