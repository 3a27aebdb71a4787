"""Time and memory of a calibration: ours, ONNX Runtime's and Model Optimizer's, against plain inference.

    python tools/bench_calibration.py [--samples 16 64] [--ort PYTHON] [--modelopt PYTHON] [--model MODEL.onnx]
    python tools/bench_calibration.py --curve 500

Every tool gets the same model and the same random volumes, each in a process and, for the peers, an environment of its
own. Without --model, MONAI's UNet (channels 16 to 256, 96^3) is exported, which needs torch and monai here. Tools take
turns, `--rounds` times; the ratio is the median of each round's own ratio to plain inference. Ours and ONNX Runtime's
plain inference are timed with the loading of the model, the peers with the writing of their quantized model too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from results import record


class Volumes:
    """Random samples, made one at a time; the same for every tool."""

    def __init__(self, name: str, shape: list[int], count: int) -> None:
        """Remember what to make."""
        self.name, self.shape, self.count = name, shape, count

    def __len__(self) -> int:
        """How many."""
        return self.count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Make them anew."""
        for seed in range(self.count):
            yield {self.name: np.random.default_rng(seed).standard_normal(self.shape, dtype=np.float32)}


def plain(model: str, volumes: Volumes) -> None:
    """ONNX Runtime runs the float model as it is."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for sample in volumes:
        session.run(None, sample)


def ours(model: str, volumes: Volumes, on_progress: Callable[[int, int | None, str], None] | None = None) -> None:
    """The table, and from it every scale by mse."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from qdq.measure.collect import collect
    from qdq.model.storage import load
    from qdq.passes.prepare import prepare
    from qdq.plan import placement
    from qdq.solve.activations import activation_params

    prepared = prepare(load(model))
    plan = placement.plan(prepared)
    activation_params(prepared, plan, collect(prepared, plan, volumes, on_progress=on_progress), {})


def curve(model: str, volumes: Volumes) -> None:
    """Ours, printing the memory that is in use along the way."""

    def told(done: int, total: int | None, text: str) -> None:
        if done % max(1, len(volumes) // 20) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(f"{done:7} samples {pages * resource.getpagesize() / 2**20:8.0f} MB", flush=True)

    ours(model, volumes, told)


def ort(model: str, volumes: Volumes) -> None:
    """quantize_static with entropy, as its documentation says for TensorRT."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(volumes)

        def get_next(self) -> Any:
            return next(self._left, None)

    quantize_static(
        model,
        str(Path(tempfile.mkdtemp()) / "q.onnx"),
        Reader(),
        calibrate_method=CalibrationMethod.Entropy,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )


def modelopt(model: str, volumes: Volumes) -> None:
    """Its INT8 quantization with entropy, its default."""
    from modelopt.onnx.quantization import quantize

    folder = Path(tempfile.mkdtemp())
    copy = folder / "model.onnx"
    copy.write_bytes(Path(model).read_bytes())  # it writes into its input file
    data = {volumes.name: np.concatenate([sample[volumes.name] for sample in volumes])}
    quantize(
        str(copy),
        quantize_mode="int8",
        calibration_data=data,
        calibration_eps=["cpu"],
        output_path=str(folder / "q.onnx"),
        high_precision_dtype="fp32",
    )


TOOLS: dict[str, Callable[[str, Volumes], None]] = {"plain": plain, "ours": ours, "ort": ort, "modelopt": modelopt}


def measured(python: str, tool: str, model: str, volumes: Volumes) -> tuple[float, float] | str:
    """Seconds and peak MB of a tool in a process of its own, or what went wrong."""
    command = [python, __file__, "--run", tool, model, volumes.name, json.dumps(volumes.shape), str(volumes.count)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:120]
    seconds, megabytes = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, megabytes


def export(path: Path, *, open_batch: bool = False) -> None:
    """MONAI's UNet, for one volume at a time or for any number."""
    import torch
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    net = UNet(3, 1, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2).eval()
    torch.onnx.export(
        net,
        (torch.zeros(1, 1, 96, 96, 96),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        opset_version=17,
        dynamo=False,
        dynamic_axes={name: {0: "batch"} for name in ("image", "logits")} if open_batch else None,
    )


def main() -> None:
    """Print one line per tool and number of samples."""
    if sys.argv[1:2] == ["--export"]:
        export(Path(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--run"]:
        tool, model, name, shape, count = sys.argv[2:]
        began = time.perf_counter()
        TOOLS[tool](model, Volumes(name, json.loads(shape), int(count)))
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--curve", type=int, metavar="N", help="only show our memory along N samples")
    parser.add_argument("--ort", help="python of an environment with onnxruntime and its quantization tool")
    parser.add_argument("--modelopt", help="python of an environment with nvidia-modelopt")
    options = parser.parse_args()
    pythons = {"plain": sys.executable, "ours": sys.executable, "ort": options.ort, "modelopt": options.modelopt}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "unet.onnx"
        if options.model is None:
            # not here: a process counts the peak of the one it was forked from as its own, and torch is large
            subprocess.run([sys.executable, __file__, "--export", str(model)], check=True, stderr=subprocess.DEVNULL)
        import onnx

        graph = onnx.load(model, load_external_data=False).graph
        entry = graph.input[0]
        shape = [d.dim_value or 1 for d in entry.type.tensor_type.shape.dim]
        if options.curve:
            curve(str(model), Volumes(entry.name, shape, options.curve))
            return
        print(f"{'samples':>7}  {'tool':9} {'s':>7} {'ratio':>6} {'peak MB':>8} {'over plain':>10}")
        for count in options.samples:
            rounds = [
                {t: measured(p, t, str(model), Volumes(entry.name, shape, count)) for t, p in pythons.items() if p}
                for _ in range(options.rounds)
            ]
            for tool in rounds[0]:
                results = [(r[tool], r["plain"]) for r in rounds]
                good = [(a, b) for a, b in results if not isinstance(a, str) and not isinstance(b, str)]
                if not good:
                    print(f"{count:7}  {tool:9} {results[0][0]}")
                    continue
                seconds = statistics.median(a[0] for a, _ in good)
                ratio = statistics.median(a[0] / b[0] for a, b in good)
                peak, base = (statistics.median(x[1] for x in side) for side in zip(*good, strict=True))
                print(f"{count:7}  {tool:9} {seconds:7.1f} {ratio:6.2f} {peak:8.0f} {peak - base:10.0f}", flush=True)


if __name__ == "__main__":
    record(main)
