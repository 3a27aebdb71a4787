"""nnU-Net's PlainConvUNet with 105 classes, as nnU-Net plans it for patches of 96 x 96 x 96.

    python tools/export/plain_conv_unet.py plain.onnx [--checkpoint checkpoint_final.pth] [--volume ct.nii.gz]

Its plans.json says --widths, --classes and --patch of a trained one. InstanceNorm, LeakyReLU, two convolutions a level.
"""

from __future__ import annotations

from typing import Any

from common import VOLUME, library, main


def options(in_channels: int, classes: int, widths: tuple[int, ...]) -> dict[str, Any]:
    """What both networks of nnU-Net take."""
    from torch import nn

    return {
        "input_channels": in_channels,
        "n_stages": len(widths),
        "features_per_stage": widths,
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": [1] + [2] * (len(widths) - 1),
        "num_classes": classes,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


def build(
    in_channels: int = 1,
    classes: int = 105,
    widths: tuple[int, ...] = (32, 64, 128, 256, 320),
    convolutions: int = 2,
) -> Any:
    """The network, of so many convolutions a level."""
    return library("dynamic_network_architectures.architectures.unet").PlainConvUNet(
        **options(in_channels, classes, widths),
        n_conv_per_stage=convolutions,
        n_conv_per_stage_decoder=convolutions,
    )


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
