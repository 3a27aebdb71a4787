"""Compare the multiply-adds that `qdq audit` counts with those that PyTorch counts as it runs the same network.

Networks with random weights, small inputs; each as FP32, FP16 (`--rest fp16` alone) and INT8, compiled without a GPU.
Two steps, for PyTorch and the compiler need not share an environment:

    python tools/bench_macs.py export FOLDER [NAME ...]   needs torch, torchvision, timm, transformers, monai, einops
    python tools/bench_macs.py audit FOLDER [NAME ...]    needs qdq[cpu]; one row per network: counted / analytic

A ratio outside 0.99 .. 1.01, or a product without a count or a kernel, is marked and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOLERANCE = 0.01
TYPES = ("fp32", "fp16", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network.

    Attributes:
        make: builds it, with random weights.
        shapes: of its inputs by name; token ids where `tokens`.
        dynamic: the named sizes of each input; () exports fixed shapes.
        tokens: the inputs hold token ids, or a mask of ones.
        dynamo: exported by the newer of PyTorch's two exporters.
    """

    make: Callable[[], Any]
    shapes: Mapping[str, tuple[int, ...]]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    tokens: bool = False
    dynamo: bool = False


def _torchvision(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import torchvision

        return getattr(torchvision.models, name)(weights=None)

    return make


def _timm(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import timm

        return timm.create_model(name, pretrained=False)

    return make


def _of_words(model: Any) -> Any:
    """A language model that takes its two inputs by position, as exporters do, and gives one output."""
    import torch

    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    return Words()


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_layer=3, n_embd=192, n_head=6, vocab_size=1000, use_cache=False, return_dict=False)
    return _of_words(GPT2Model._from_config(config, attn_implementation="eager"))


def _bert() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"num_hidden_layers": 3, "hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 768}
    config = BertConfig(**sizes, vocab_size=1000, return_dict=False)
    return _of_words(BertModel._from_config(config, attn_implementation="eager", add_pooling_layer=False))


def _yolo() -> Any:
    """Blocks of a detector: convolutions with SiLU, split in two by `chunk`, one half refined, all concatenated."""
    import torch
    from torch import nn

    class Unit(nn.Sequential):
        def __init__(self, inside: int, out: int, kernel: int = 1, stride: int = 1) -> None:
            convolution = nn.Conv2d(inside, out, kernel, stride, kernel // 2, bias=False)
            super().__init__(convolution, nn.BatchNorm2d(out), nn.SiLU())

    class Split(nn.Module):
        def __init__(self, inside: int, out: int, depth: int) -> None:
            super().__init__()
            self.first, self.last = Unit(inside, out), Unit((2 + depth) * (out // 2), out)
            half = out // 2
            pairs = (nn.Sequential(Unit(half, half, 3), Unit(half, half, 3)) for _ in range(depth))
            self.refine = nn.ModuleList(pairs)

        def forward(self, x: Any) -> Any:
            parts = list(self.first(x).chunk(2, 1))
            for part in self.refine:
                parts.append(part(parts[-1]) + parts[-1])
            return self.last(torch.cat(parts, 1))

    blocks = [Unit(3, 16, 3, 2)]
    for inside, out in ((16, 32), (32, 64), (64, 128)):
        blocks += [Unit(inside, out, 3, 2), Split(out, out, 2)]
    return nn.Sequential(*blocks, nn.Conv2d(128, 85, 1))


def _unet() -> Any:
    from monai.networks.nets import UNet

    return UNet(3, 1, 2, channels=(14, 28, 56, 112), strides=(2, 2, 2), num_res_units=2)


def _swin_unetr() -> Any:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(in_channels=1, out_channels=3, feature_size=12, spatial_dims=3)


IMAGE = {"x": (1, 3, 96, 96)}
BATCH = {"x": {0: "batch"}}
WORDS = {"input_ids": (2, 24), "attention_mask": (2, 24)}
NETWORKS = {
    "resnet50": Network(make=_torchvision("resnet50"), shapes=IMAGE, dynamic=BATCH),
    "mobilenet_v3": Network(make=_torchvision("mobilenet_v3_large"), shapes=IMAGE),
    "efficientnet_b0": Network(make=_timm("efficientnet_b0"), shapes=IMAGE, dynamic=BATCH),
    "gpt2": Network(
        make=_gpt2,
        shapes=WORDS,
        dynamic={"input_ids": {0: "batch", 1: "words"}, "attention_mask": {0: "rows", 1: "seen"}},
        tokens=True,
    ),
    "bert": Network(
        make=_bert,
        shapes=WORDS,
        dynamic={name: {0: "batch", 1: "words"} for name in WORDS},
        tokens=True,
        dynamo=True,
    ),
    "yolo_chunk": Network(make=_yolo, shapes=IMAGE, dynamic={"x": {0: "batch", 2: "height", 3: "width"}}),
    "unet": Network(make=_unet, shapes={"x": (1, 1, 32, 32, 32)}),
    "swin_unetr": Network(make=_swin_unetr, shapes={"x": (1, 1, 64, 64, 64)}),
}


def export(folder: Path, names: Sequence[str]) -> None:
    """Write <name>.onnx and <name>.json with the analytic count of each network.

    The count is half of the operations that `torch.utils.flop_counter` sees: convolutions and matrix products.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        network = NETWORKS[name]
        torch.manual_seed(0)
        model = network.make().eval()
        make = torch.ones if network.tokens else torch.randn
        kind = torch.int64 if network.tokens else torch.float32
        inputs = {key: make(shape, dtype=kind) for key, shape in network.shapes.items()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs.values())
        options: dict[str, Any] = {"input_names": list(inputs), "opset_version": 18, "dynamo": network.dynamo}
        if network.dynamo:
            symbols = {n: torch.export.Dim(n) for sizes in network.dynamic.values() for n in sizes.values()}
            shapes = {key: {i: symbols[n] for i, n in sizes.items()} for key, sizes in network.dynamic.items()}
            options["dynamic_shapes"] = shapes or None
        else:
            options["dynamic_axes"] = network.dynamic
        with torch.no_grad():
            torch.onnx.export(model, tuple(inputs.values()), folder / f"{name}.onnx", **options)
        facts = {"macs": counter.get_total_flops() // 2, "shapes": network.shapes if network.dynamic else {}}
        (folder / f"{name}.json").write_text(json.dumps(facts))
        print(f"{name}: {facts['macs'] / 1e9:.3f} G multiply-adds", flush=True)


def audited(path: Path, kind: str, shapes: Sequence[str]) -> dict[str, Any]:
    """The audit of a network made FP32, FP16 or INT8."""
    with tempfile.TemporaryDirectory() as folder:
        made = path
        if kind != "fp32":
            made = Path(folder) / f"{kind}.onnx"
            scheme = ["--exclude", "*"] if kind == "fp16" else ["--rounding", "nearest", "--bias-correction", "off"]
            _qdq("quantize", path, "--random-data", "2", "--rest", "fp16", *scheme, *shapes, "-o", made)
        found: dict[str, Any] = json.loads(_qdq("audit", made, "--json", *shapes))
        return found


def _qdq(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "qdq", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip())
    return done.stdout


def audit(folder: Path, names: Sequence[str]) -> bool:
    """Print counted / analytic for each network and type; whether all agree."""
    good = True
    print("| network | analytic, G | " + " | ".join(TYPES) + " |\n" + "|---" * (2 + len(TYPES)) + "|")
    for name in names:
        facts = json.loads((folder / f"{name}.json").read_text())
        shapes = [part for key, s in facts["shapes"].items() for part in ("--shape", f"{key}:{'x'.join(map(str, s))}")]
        cells = []
        for kind in TYPES:
            try:
                found = audited(folder / f"{name}.onnx", kind, shapes)
            except RuntimeError as error:
                cells.append(f"! {str(error)[:300]}")
                good = False
                continue
            lost = sum(node["macs"] is None or node["consumed"] == "unknown" for node in found["nodes"])
            ratio = found["macs"] / facts["macs"]
            wrong = bool(lost) or abs(ratio - 1) > TOLERANCE
            good &= not wrong
            cells.append(f"{ratio:.4f}" + (f", {lost} unknown" if lost else "") + (" !" if wrong else ""))
        print(f"| {name} | {facts['macs'] / 1e9:.3f} | {' | '.join(cells)} |", flush=True)
    return good


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", "audit"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *NETWORKS])
    given = parser.parse_args()
    names = given.names or list(NETWORKS)
    if given.step == "export":
        export(given.folder, names)
        return 0
    return int(not audit(given.folder, names))


if __name__ == "__main__":
    sys.exit(main())
