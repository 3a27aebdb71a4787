"""Write the networks of `networks.py` as PyTorch's two exporters do, each with samples, for `bench_exports.py`.

    python tools/export_networks.py FOLDER [NAME ...] [--variants VARIANT ...]

writes FOLDER/<network>.<variant>.onnx and a folder of samples of that name. A variant is "static" or "dynamic" (some
sizes are open, and the samples have several), "float" or "half", and the exporter: "script" (TorchScript) or "dynamo".
Without --variants each network has one, in turn. A file that ONNX Runtime does not compute as PyTorch does is not kept:
it is the exporter that is wrong. Needs torch, torchvision, timm, transformers, diffusers, monai and onnxruntime.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from networks import NETWORKS, SIZES, VARIANTS, Network, variant_of

SAMPLES = 4
OPSETS = {"script": 17, "dynamo": 20}
AGREES = {"float": 80.0, "half": 30.0}  # dB, of the file in ONNX Runtime against PyTorch
Rng = np.random.Generator


def smooth(rng: Rng, shape: Sequence[int]) -> np.ndarray:
    """Waves in random directions with a little noise: what neighbours share, as in images and volumes."""
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape[2:]), indexing="ij")
    made = np.zeros(shape)
    for item in np.ndindex(*shape[:2]):
        for _ in range(4):
            phase = sum(rng.normal(0, 8) * axis for axis in axes) + rng.uniform(0, 6.3)
            made[item] += rng.normal() * np.sin(phase)
    return made / 1.5 + rng.normal(0, 0.1, shape)


def signal(rng: Rng, shape: Sequence[int]) -> np.ndarray:
    """Tones that come and go along the last axis."""
    made, time = rng.normal(0, 0.01, shape), np.arange(shape[-1])
    for item in np.ndindex(*shape[:-1]):
        for _ in range(5):
            made[item] += np.sin(time * rng.uniform(0.01, 1)) * np.sin(time * rng.uniform(0.001, 0.02)) / 5
    return made


def mask(rng: Rng, shape: Sequence[int]) -> np.ndarray:
    """Ones, and zeros behind the end of all rows but the first."""
    made = np.ones(shape, np.int64)
    for row in made[1:]:
        row[rng.integers(shape[1] // 2, shape[1]) :] = 0
    return made


# What `Input.values` names: (generator, shape, how many whole numbers there are) -> array.
VALUES: Mapping[str, Callable[[Rng, Sequence[int], int], np.ndarray]] = {
    "field": lambda rng, shape, most: smooth(rng, shape),
    "signal": lambda rng, shape, most: signal(rng, shape),
    "normal": lambda rng, shape, most: rng.normal(0, 1, shape),
    "tokens": lambda rng, shape, most: np.minimum(rng.zipf(1.3, shape) - 1, most - 1),
    "mask": lambda rng, shape, most: mask(rng, shape),
    "step": lambda rng, shape, most: rng.integers(0, most, shape),
}


def samples(network: Network, variant: str, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Samples in the variant's types; open sizes take their values in turn."""
    rng, floats, made = np.random.default_rng(seed), np.float16 if "half" in variant else np.float32, []
    for i in range(SAMPLES):
        sizes = {word: choice[i % len(choice) if "dynamic" in variant else 0] for word, choice in SIZES.items()}
        sample = {}
        for name, given in network.inputs.items():
            shape = [sizes[n] if isinstance(n, str) else n for n in given.shape]
            values = VALUES[given.values](rng, shape, given.most)
            sample[name] = values.astype(floats if values.dtype.kind == "f" else np.int64)
        made.append(sample)
    return made


def built(network: Network, variant: str) -> Any:
    """The network as a module that takes its inputs in order."""
    import torch

    torch.manual_seed(1)
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that no exporter knows
    model = network.make().eval()
    for module in model.modules():  # as after training: a normalization that has seen data is not the identity
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, values in model.named_parameters():  # nor is a matrix zero, or a branch scaled down to nothing
        if not name.endswith("bias") and values.abs().max() < 1e-4:
            torch.nn.init.normal_(values, 0, values.shape[-1] ** -0.5 if values.ndim > 1 else 0.5)
    takes = inspect.signature(model.forward).parameters
    by_name = set(network.inputs) <= set(takes) or any(p.kind is p.VAR_KEYWORD for p in takes.values())

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.half() if "half" in variant else model

        def forward(self, *inputs: Any) -> Any:
            named = dict(zip(network.inputs, inputs, strict=True))
            made = self.model(**named) if by_name else self.model(*inputs)
            return made if network.takes is None else made[network.takes]

    return Positional().eval()


def agreement(path: Path, module: Any, made: Sequence[Mapping[str, np.ndarray]]) -> float:
    """SQNR in dB of the file in ONNX Runtime against PyTorch, the least of all outputs and samples."""
    import onnxruntime as ort
    import torch

    options, found = ort.SessionOptions(), [np.inf]
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {info.name for info in session.get_inputs()}
    for sample in made:
        with torch.no_grad():
            wanted = module(*(torch.from_numpy(array) for array in sample.values()))
        got = session.run(None, {name: array for name, array in sample.items() if name in taken})
        for a, b in zip([wanted] if isinstance(wanted, torch.Tensor) else wanted, got, strict=True):
            a, b = np.asarray(a.detach(), np.float64), np.asarray(b, np.float64)
            if a.shape != b.shape:
                return -np.inf
            if noise := np.sum((a - b) ** 2):
                found.append(10 * np.log10(np.sum(a**2) / noise))
    return float(min(found))


def export(name: str, variant: str, folder: Path) -> None:
    """Write one network, then its samples.

    Raises:
        ValueError: the file does not compute what PyTorch does.
    """
    import torch

    network, (_, kind, exporter) = NETWORKS[name], variant.split(".")
    module, made = built(network, variant), samples(network, variant)
    options: dict[str, Any] = {"input_names": list(network.inputs), "opset_version": OPSETS[exporter]}
    if "dynamic" in variant:
        words = [{i: n for i, n in enumerate(x.shape) if isinstance(n, str)} for x in network.inputs.values()]
        if exporter == "dynamo":
            options["dynamic_shapes"] = {
                "inputs": tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in words)
            }
        else:
            options["dynamic_axes"] = dict(zip(network.inputs, words, strict=True))
    path = folder / f"{name}.{variant}.onnx"
    with torch.no_grad():
        arrays = tuple(torch.from_numpy(array) for array in made[-1].values())
        torch.onnx.export(module, arrays, str(path), dynamo=exporter == "dynamo", **options)
    if (decibels := agreement(path, module, made)) < AGREES[kind]:
        raise ValueError(f"ONNX Runtime computes it {decibels:.1f} dB away from PyTorch")
    path.with_suffix("").mkdir(exist_ok=True)
    for i, sample in enumerate(made):
        np.savez(path.with_suffix("") / f"{i:03}.npz", **sample)


def main() -> int:
    """Export what is asked for and not there yet; say which the exporter refuses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=(), metavar="VARIANT")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    refused = 0
    for name in given.names or NETWORKS:
        for variant in given.variants or [variant_of(name)]:
            if (given.folder / f"{name}.{variant}" / f"{SAMPLES - 1:03}.npz").exists():
                continue
            try:
                export(name, variant, given.folder)
                print(name, variant, flush=True)
            except Exception as error:  # whatever an exporter raises: that network is not exported, and it is said
                refused += 1
                (given.folder / f"{name}.{variant}.onnx").unlink(missing_ok=True)
                traceback.print_exc(limit=-3)
                print(name, variant, "is not exported:", str(error).strip()[:300].replace("\n", " "), flush=True)
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
