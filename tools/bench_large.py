"""Time and memory of quantizing a model that is larger than the memory it may take, beside ONNX Runtime's quantizer.

The model is a generated chain of MatMul, 4096 x 16384 and back, with external data: 8 weights are 2.1 GB, 26 are 7 GB.
Each run is a process of its own. Its peak is VmHWM of /proc: the largest resident set, in which pages of mapped files
count while they are mapped.

    python tools/bench_large.py [--weights 8] [--schemes int8,int4] [--folder /tmp] [--peer]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from results import record

NARROW, WIDE = 4096, 16384
SAMPLES, ROWS = 4, 16


def generate(folder: Path, count: int) -> Path:
    """Write the chain of `count` products; returns its path."""
    shapes = [(NARROW, WIDE), (WIDE, NARROW)] * (count // 2)
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1 << 22, dtype=np.float32)
    weights, nodes, offset = [], [], 0
    with (folder / "chain.data").open("wb") as file:
        for i, shape in enumerate(shapes):
            for _ in range(shape[0] * shape[1] // values.size):
                file.write((np.roll(values, int(rng.integers(values.size))) / np.sqrt(shape[0], dtype=np.float32)).data)
            weight = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape)
            weight.data_location = TensorProto.EXTERNAL
            size = 4 * shape[0] * shape[1]
            for key, value in (("location", "chain.data"), ("offset", offset), ("length", size)):
                weight.external_data.add(key=key, value=str(value))
            offset += size
            weights.append(weight)
            ends = "x" if i == 0 else f"t{i}", "y" if i + 1 == len(shapes) else f"t{i + 1}"
            nodes.append(helper.make_node("MatMul", [ends[0], f"w{i}"], [ends[1]], name=f"product_{i}"))
    sizes = {"x": shapes[0][0], "y": shapes[-1][1]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in sizes.items())
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "chain.onnx").write_bytes(model.SerializeToString())
    return folder / "chain.onnx"


def samples() -> list[dict[str, np.ndarray]]:
    """A few inputs of normal values."""
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((ROWS, NARROW), dtype=np.float32)} for _ in range(SAMPLES)]


def ours(model: Path, output: Path, scheme: str, rounding: str) -> None:
    """Load, calibrate, quantize and save."""
    from qdq.assemble.quantize import quantize
    from qdq.model.storage import save
    from qdq.plan.settings import Settings

    made = quantize(model, samples(), settings=Settings(scheme=scheme, rounding=rounding))
    save(made.model, output)
    for text in made.solution.notes:
        print(f"    {text}")


def onnx_runtime(model: Path, output: Path, scheme: str) -> None:
    """ONNX Runtime's quantizer with the same data, or its INT4 Q/DQ blocks."""
    from onnxruntime import quantization as ortq

    if scheme == "int4":
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(model), block_size=128, is_symmetric=True, quant_format=ortq.QuantFormat.QDQ
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(output), use_external_data_format=True)
        return

    class Reader(ortq.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[dict[str, np.ndarray]] = iter(samples())

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    symmetric = {"WeightSymmetric": True, "ActivationSymmetric": True}
    ortq.quantize_static(
        str(model),
        str(output),
        Reader(),
        quant_format=ortq.QuantFormat.QDQ,
        per_channel=True,
        use_external_data_format=True,
        extra_options=symmetric,
    )


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def child(job: str, model: Path, output: Path, scheme: str) -> tuple[float, float]:
    """Seconds and peak GB of one job in a process of its own, imports included."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--job", job, "--model", str(model), "--output", str(output)]
    done = subprocess.run([*command, "--schemes", scheme], check=True, stdout=subprocess.PIPE, text=True)
    *said, last = done.stdout.strip().splitlines()
    for line in said:
        print(line)
    return time.perf_counter() - start, int(last) / 1e9


def main() -> None:
    """Print one line per job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=8, help="an even number of matrices of 268 MB")
    parser.add_argument("--schemes", default="int8,int4")
    parser.add_argument("--folder", type=Path, default=None, help="with room for the model three times")
    parser.add_argument("--peer", action="store_true", help="also ONNX Runtime's quantizer; takes 7 GB and more")
    for hidden in ("--job", "--model", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        model, output = Path(options.model), Path(options.output)
        if options.job == "peer":
            onnx_runtime(model, output, options.schemes)
        else:
            ours(model, output, options.schemes, "nearest" if options.job == "nearest" else "")
        print(peak_bytes())
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        model = generate(Path(place), options.weights)
        print(f"{options.weights} weights, {(Path(place) / 'chain.data').stat().st_size / 1e9:.1f} GB")
        for scheme in options.schemes.split(","):
            theirs = None
            for job in ("peer",) * options.peer + ("nearest", "default"):
                with tempfile.TemporaryDirectory(dir=place) as out:
                    seconds, peak = child(job, model, Path(out) / "out.onnx", scheme)
                name = f"ONNX Runtime, {scheme}" if job == "peer" else f"qdq {scheme}, rounding {job}"
                ratio = (
                    f", {seconds / theirs[0]:.2f} of its time, {peak / theirs[1]:.2f} of its memory" if theirs else ""
                )
                print(f"{name:32} {seconds:7.1f} s {peak:6.2f} GB{ratio}", flush=True)
                theirs = (seconds, peak) if job == "peer" else theirs


if __name__ == "__main__":
    record(main)
