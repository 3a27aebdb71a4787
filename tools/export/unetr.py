"""MONAI's UNETR (arXiv 2103.10504) with 14 classes: ViT-B over patches of 16 x 16 x 16.

python tools/export/unetr.py unetr.onnx [--checkpoint UNETR_model_best_acc.pth] [--samples FOLDER --volume ct.nii.gz]
"""

from __future__ import annotations

from typing import Any

from common import VOLUME, library, main


def build(
    in_channels: int = 1,
    classes: int = 14,
    patch: tuple[int, ...] = (96, 96, 96),
    width: int = 16,
    hidden: int = 768,
    mlp: int = 3072,
    heads: int = 12,
) -> Any:
    """The network, for inputs of this patch alone."""
    return library("monai.networks.nets").UNETR(
        in_channels=in_channels,
        out_channels=classes,
        img_size=patch,
        feature_size=width,
        hidden_size=hidden,
        mlp_dim=mlp,
        num_heads=heads,
    )


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
