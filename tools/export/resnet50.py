"""torchvision's ResNet-50 at 224 x 224, or another of its classifiers.

python tools/export/resnet50.py resnet50.onnx [--checkpoint resnet50-11ad3fa6.pth] [--samples FOLDER --pictures FOLDER]
python tools/export/resnet50.py mobilenet_v2.onnx --model mobilenet_v2 --batch 8
"""

from __future__ import annotations

from typing import Any

from common import IMAGE, library, main


def build(model: str = "resnet50", classes: int = 1000) -> Any:
    """The network of that name."""
    return library("torchvision.models").get_model(model, weights=None, num_classes=classes)


if __name__ == "__main__":
    raise SystemExit(main(build, IMAGE))
