"""torchvision's ViT-B/16 (arXiv 2010.11929) at 224 x 224.

python tools/export/vit.py vit.onnx [--checkpoint vit_b_16-c867db91.pth] [--samples FOLDER --pictures FOLDER]
"""

from __future__ import annotations

from typing import Any

from common import IMAGE, library, main


def build(
    size: int = 224,
    tile: int = 16,
    layers: int = 12,
    heads: int = 12,
    hidden: int = 768,
    mlp: int = 3072,
    classes: int = 1000,
) -> Any:
    """The network; a token is a tile of the picture."""
    return library("torchvision.models").VisionTransformer(size, tile, layers, heads, hidden, mlp, num_classes=classes)


if __name__ == "__main__":
    raise SystemExit(main(build, IMAGE))
