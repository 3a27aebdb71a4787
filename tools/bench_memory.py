"""Peak memory of a command on few and on many volumes: what grows with the samples, and whether a budget is kept.

    python tools/bench_memory.py [--verb quantize|deploy|calibrate|check] [--size 64] [--few 16] [--many 96] [--times 3]
                                 [--memory SIZE] [--scheme NAME] [--model FILE]

volumes in files, one each -> the command in a process of its own, on the first few and on all -> peak resident memory
(ru_maxrss) of both, less that of `qdq plan`, which runs no sample. The network is a small 3-D U-Net, made here.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = (8, 16, 32)


def network(size: int) -> onnx.ModelProto:
    """A U-Net of two levels: convolutions with InstanceNormalization, a transposed convolution, a shortcut."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def add(op: str, inputs: list[str], **attributes: object) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def conv(tensor: str, read: int, made: int, stride: int = 1) -> str:
        weight = constant(f"w{len(nodes)}", rng.normal(size=(made, read, 3, 3, 3)) / np.sqrt(27 * read))
        found = add("Conv", [tensor, weight], pads=[1] * 6, strides=[stride] * 3)
        ones, zeros = constant(f"s{len(nodes)}", np.ones(made)), constant(f"b{len(nodes)}", np.zeros(made))
        return add("LeakyRelu", [add("InstanceNormalization", [found, ones, zeros])], alpha=0.1)

    shortcuts = [conv(conv("x", 1, CHANNELS[0]), CHANNELS[0], CHANNELS[0])]
    for read, made in itertools.pairwise(CHANNELS):
        shortcuts.append(conv(conv(shortcuts[-1], read, made, 2), made, made))
    found = shortcuts.pop()
    for made, read in zip(CHANNELS[-2::-1], CHANNELS[:0:-1], strict=True):
        weight = constant(f"w{len(nodes)}", rng.normal(size=(read, made, 2, 2, 2)) / np.sqrt(8 * read))
        raised = add("ConvTranspose", [found, weight], strides=[2] * 3)
        found = conv(add("Concat", [shortcuts.pop(), raised], axis=1), 2 * made, made)
    last = constant("last", rng.normal(size=(3, CHANNELS[0], 1, 1, 1)))
    nodes.append(helper.make_node("Conv", [found, last], ["y"], name="last_conv"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, size, size, size])
        for name, channels in (("x", 1), ("y", 3))
    ]
    graph = helper.make_graph(nodes, "unet", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def volumes(folder: Path, count: int, size: int) -> Path:
    """Smooth volumes with a ball in them, one .npz each."""
    folder.mkdir()
    axes = np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32)] * 3, indexing="ij")
    for index in range(count):
        rng = np.random.default_rng(index)
        centre, radius = rng.uniform(-0.5, 0.5, 3), rng.uniform(0.2, 0.5)
        inside = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < radius**2
        values = (inside * rng.uniform(0.5, 2) + 0.1 * rng.normal(size=inside.shape)).astype(np.float32)
        np.savez(folder / f"{index:03d}.npz", x=values[None, None])
    return folder


def peak(*args: object) -> tuple[float, float]:
    """Peak resident memory in MB, and seconds, of a command of qdq in a process of its own."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "qdq", *map(str, args)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status) not in (0, 1):
            said.seek(0)
            sys.exit(f"{' '.join(command)}: {said.read()[-1000:]}")
    return usage.ru_maxrss * 1024 / 1e6, time.monotonic() - began


def main() -> None:
    """Print a line per repetition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verb", default="quantize", choices=["quantize", "deploy", "calibrate", "check"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--few", type=int, default=16)
    parser.add_argument("--many", type=int, default=96)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--memory", help="passed on")
    parser.add_argument("--scheme", help="passed on, to other verbs than check")
    parser.add_argument("--model", type=Path, help="in place of the network made here; its input is x (1, 1, n, n, n)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or folder / "unet.onnx"
        if not given.model:
            onnx.save(network(given.size), model)
        data = {n: volumes(folder / str(n), n, given.size) for n in (given.few, given.many)}
        budget = ["--memory", given.memory] if given.memory else []
        scheme = ["--scheme", given.scheme] if given.scheme and given.verb != "check" else []
        ends = {
            "quantize": ["-o", folder / "q.onnx"],
            "calibrate": ["-o", folder / "table.json"],
            "deploy": ["--tune", "off", "--out", folder / "out"],
            "check": [],
        }[given.verb]
        models = [model, model] if given.verb == "check" else [model]
        base, _ = peak("plan", model)
        print(f"{given.verb}: a process that runs no sample has {base:.0f} MB", flush=True)
        for _ in range(given.times):
            found = {n: peak(given.verb, *models, "--data", at, *ends, *budget, *scheme) for n, at in data.items()}
            (few, _), (many, seconds) = found[given.few], found[given.many]
            print(
                f"{given.few} volumes {few:.0f} MB ({few - base:.0f} more), {given.many} volumes {many:.0f} MB "
                f"({many - base:.0f} more): {many / few:.3f} times, {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
