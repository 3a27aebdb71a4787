"""Every scheme's file, of a few kinds of graphs: is it valid, does it load with default options, computing the same?

    python tools/every_scheme.py [--scheme NAME ...] [--python INTERPRETER ...] [--compile]

graphs x schemes x float types -> `quantize`, `finish` -> full check and strict inference -> ONNX Runtime with default
options, here and in each other interpreter (of a virtual environment with another version) -> with --compile
TensorRT-RTX. Left out: NVFP4, whose operator is TensorRT's own, is checked and compiled, and no other runtime loads it;
a product of FP8 codes in FP32, without bias, loads in ONNX Runtime 1.32, while those before make an integer one of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.backends.rtx import build
from engines.core import arithmetic
from engines.core.errors import EngineError
from engines.core.fp4 import holds_fp4
from engines.core.onnx_runtime import run
from qdq.assemble.finish import finish
from qdq.assemble.quantize import quantize
from qdq.passes.prepare import load_float
from qdq.plan.scheme import SCHEMES
from qdq.plan.settings import Settings

FLOATS = ("fp32", "fp16")
LEAST_DB = (
    20.0  # between ONNX Runtime's integer kernels, which round between nodes otherwise, and the file's arithmetic
)
# Loads each file with default options, and compares its outputs; what is printed is what failed.
LOAD = """
import pathlib, sys
import numpy as np, onnxruntime
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    data = np.load(path.with_suffix(".npz"))
    if path.stem == "attention-fp8-fp32" and tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32):
        continue
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = session.run(None, {i.name: data["in_" + i.name] for i in session.get_inputs()})
    except Exception as error:
        print(path.stem, onnxruntime.__version__, " ".join(str(error).split())[:200])
        continue
    for output, values in zip(session.get_outputs(), found):
        wanted = data["out_" + output.name].astype(np.float64)
        noise = float(((wanted - values) ** 2).sum())
        db = 10 * np.log10((wanted ** 2).sum() / noise) if noise else np.inf
        if not db >= float(sys.argv[2]):
            print(path.stem, onnxruntime.__version__, f"{db:.1f} dB")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A float graph of one input x, and what it is called."""

    name: str
    model: onnx.ModelProto
    shape: tuple[int, ...]


def graphs(opset: int = 21) -> Iterator[Case]:
    """The kinds of graphs."""
    conv = [_node("Conv", "x w b", "c", pads=[1, 1, 1, 1])]
    norm = [_node("BatchNormalization", "c scale bias mean var", "n"), _node("Relu", "n", "y")]
    channels = {"scale": _normal(16), "bias": _normal(16), "mean": _normal(16), "var": _normal(16) ** 2 + 1}
    image, tokens = (1, 16, 8, 8), (2, 6, 32)
    square, wide = {"w": _normal(32, 32), "b": _normal(32)}, {"w": _normal(16, 16, 3, 3), "b": _normal(16)}
    heads = [_node("MatMul", f"x w{i}", i) for i in "qkv"]
    heads += [_node("Transpose", "k", "kt", perm=[0, 2, 1]), _node("MatMul", "q kt", "s")]
    heads += [_node("Mul", "s by", "t"), _node("Softmax", "t", "p", axis=-1), _node("MatMul", "p v", "y")]
    three = {f"w{i}": _normal(32, 32, seed=ord(i)) / 6 for i in "qkv"}
    kinds: dict[str, tuple[list[Any], dict[str, np.ndarray], tuple[int, ...]]] = {
        "matmul_add": (
            [_node("MatMul", "x w", "m"), _node("Add", "m b", "a"), _node("Relu", "a", "y")],
            square,
            tokens,
        ),
        "gemm": ([_node("Gemm", "x w b", "g", transB=1), _node("Sigmoid", "g", "y")], square, (4, 32)),
        "conv_bn_relu": (conv + norm, {**wide, **channels}, image),
        "residual": ([*conv, _node("Add", "c x", "a"), _node("Relu", "a", "y")], wide, image),
        "depthwise": (
            [_node("Conv", "x w", "c", group=16, pads=[1, 1, 1, 1]), _node("Clip", "c low high", "y")],
            {"w": _normal(16, 1, 3, 3), "low": np.array(0, np.float32), "high": np.array(6, np.float32)},
            image,
        ),
        "conv_transpose": (
            [_node("ConvTranspose", "x w b", "c", strides=[2, 2]), _node("Relu", "c", "y")],
            {"w": _normal(16, 16, 2, 2), "b": _normal(16)},
            image,
        ),
        "attention": (heads, {**three, "by": np.array(0.2, np.float32)}, tokens),
        "layer_norm": (
            [_node("LayerNormalization", "x g h", "n"), _node("MatMul", "n w", "m"), _node("Add", "m b", "y")],
            {**square, "g": _normal(32) + 2, "h": _normal(32)},
            tokens,
        ),
    }
    for name, (nodes, tensors, shape) in kinds.items():
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None))]
        stored = [numpy_helper.from_array(array, key) for key, array in tensors.items()]
        graph = helper.make_graph(nodes, name, ends[:1], ends[1:], stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        yield Case(name=name, model=model, shape=shape)


def _node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attributes)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + len(shape)).normal(size=shape).astype(np.float32)


def write(folder: Path, schemes: Sequence[str], *, compiled: bool = False) -> list[str]:
    """Quantize every graph into a folder, each file with its sample and the outputs of its arithmetic (.npz).

    Returned is what is wrong with a file by itself: an invalid one, one that holds no quantizer where its scheme has
    one for the graph, one that does not compile.
    """
    wrong = []
    for case in graphs():
        rng = np.random.default_rng(1)
        prepared = load_float(case.model)
        samples = [{"x": rng.normal(size=case.shape).astype(np.float32)} for _ in range(2)]
        for scheme in schemes:
            settings = Settings(scheme=scheme, calibrator="mse", equalize="none", bias_correction="off")
            made = quantize(prepared, samples, settings=settings)
            for kind in FLOATS:
                path = folder / f"{case.name}-{scheme}-{kind}.onnx"
                proto = finish(made.model, made.plan, unquantized_type=kind, table=made.table).model.proto
                try:
                    onnx.checker.check_model(proto, full_check=True)
                    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
                except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                    wrong.append(f"{path.stem} is invalid: {error}")
                if compiled:
                    try:
                        build(proto, targets=["sm120" if holds_fp4(proto) else "sm89"])
                    except EngineError as error:
                        wrong.append(f"{path.stem} does not compile: {error}")
                if holds_fp4(proto):
                    continue
                (found,) = run(arithmetic.session(proto), samples[:1])
                onnx.save(proto, path)
                given = {f"in_{k}": v for k, v in samples[0].items()} | {f"out_{k}": v for k, v in found.items()}
                np.savez(path.with_suffix(".npz"), **given)
    return wrong


def loaded(folder: Path, python: str = sys.executable) -> list[str]:
    """What the ONNX Runtime of an interpreter cannot load with default options, or computes otherwise."""
    done = subprocess.run([python, "-c", LOAD, str(folder), str(LEAST_DB)], capture_output=True, text=True, check=False)
    crashed = [f"{python} ended with {done.returncode}: {done.stderr[-300:]}"] if done.returncode else []
    return [*done.stdout.splitlines(), *crashed]


def main() -> None:
    """Print what fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", action="append", choices=list(SCHEMES))
    parser.add_argument("--python", action="append", default=[], help="another interpreter with ONNX Runtime")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wrong = write(folder, given.scheme or list(SCHEMES), compiled=given.compile)
        for python in (sys.executable, *given.python):
            wrong += loaded(folder, python)
        count = len(list(folder.glob("*.onnx")))
    print("\n".join([*wrong, f"{count} files loaded in {1 + len(given.python)} runtimes: {len(wrong)} faults"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
