"""nnU-Net's ResidualEncoderUNet (arXiv 2404.09556) with 105 classes, of the blocks and widths of its presets.

    python tools/export/residual_encoder_unet.py resenc.onnx [--checkpoint checkpoint_final.pth] [--volume ct.nii.gz]

Its plans.json says --widths, --blocks, --classes and --patch of a trained one.
"""

from __future__ import annotations

from typing import Any

from common import VOLUME, library, main
from plain_conv_unet import options


def build(
    in_channels: int = 1,
    classes: int = 105,
    widths: tuple[int, ...] = (32, 64, 128, 256, 320),
    blocks: tuple[int, ...] = (1, 3, 4, 6, 6),
) -> Any:
    """The network, of so many residual blocks a level."""
    return library("dynamic_network_architectures.architectures.unet").ResidualEncoderUNet(
        **options(in_channels, classes, widths), n_blocks_per_stage=blocks, n_conv_per_stage_decoder=1
    )


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
