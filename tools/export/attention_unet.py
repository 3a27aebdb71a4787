"""MONAI's AttentionUnet (arXiv 1804.03999) for volumes, with 14 classes and the widths of its UNet.

python tools/export/attention_unet.py attention_unet.onnx [--checkpoint model.pt] [--samples FOLDER --volume ct.nii.gz]
"""

from __future__ import annotations

from typing import Any

from common import VOLUME, library, main


def build(in_channels: int = 1, classes: int = 14, widths: tuple[int, ...] = (16, 32, 64, 128, 256)) -> Any:
    """The network."""
    return library("monai.networks.nets").AttentionUnet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=classes,
        channels=widths,
        strides=(2,) * (len(widths) - 1),
    )


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
