"""Export networks at the sizes that latencies are published for, with random weights, for `bench_compilers.py`.

    python tools/export_full.py FOLDER [NAME ...]    writes FOLDER/<name>.onnx (opset 17, fixed shapes)

ResNet-50, EfficientNet-B0, MobileNetV2 and ViT-B/16 of torchvision at 224 x 224 in batches of 8, BERT-base of
transformers with 128 tokens in batches of 8 (eager attention, no pooler), the detector of `networks_own.py` at 640 x
640. The volumes are export_monai.py's. Weights come from a seed; normalizations are in inference mode. Needs torch,
torchvision and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from exporting import export_all, write
from networks import hf, own, tv

IMAGES, TOKENS = (8, 3, 224, 224), (8, 128)
NETWORKS: Mapping[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "resnet50": (tv("resnet50"), IMAGES),
    "efficientnet_b0": (tv("efficientnet_b0"), IMAGES),
    "mobilenet_v2": (tv("mobilenet_v2"), IMAGES),
    "vit_b_16": (tv("vit_b_16"), IMAGES),
    "bert_base": (hf("BertModel", "BertConfig", "eager"), TOKENS),
    "yolo": (own("Yolo"), (8, 3, 640, 640)),
}


class First(torch.nn.Module):
    """A network that gives its first output."""

    def __init__(self, network: torch.nn.Module) -> None:
        """Of this network."""
        super().__init__()
        self.network = network

    def forward(self, given: torch.Tensor) -> Any:
        """The first output."""
        made = self.network(given)
        return made if isinstance(made, torch.Tensor) else made[0]


def export(name: str, path: Path) -> None:
    """Write one network."""
    torch.manual_seed(1)
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that no exporter knows
    make, shape = NETWORKS[name]
    sample = torch.zeros(shape, dtype=torch.long) if shape == TOKENS else torch.zeros(shape)
    network = First(make().eval()).eval()
    write(network, sample, path)


if __name__ == "__main__":
    export_all(NETWORKS, export)
