"""MONAI's DynUNet, its form of nnU-Net's network, with 14 classes and residual blocks.

python tools/export/dynunet.py dynunet.onnx [--checkpoint model.pt] [--samples FOLDER --volume ct.nii.gz]
"""

from __future__ import annotations

from typing import Any

from common import VOLUME, library, main


def build(
    in_channels: int = 1,
    classes: int = 14,
    widths: tuple[int, ...] = (16, 32, 64, 128, 256),
    residual: bool = True,
) -> Any:
    """The network."""
    deeper = len(widths) - 1
    return library("monai.networks.nets").DynUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=classes,
        kernel_size=[3] * len(widths),
        strides=[1] + [2] * deeper,
        upsample_kernel_size=[2] * deeper,
        filters=widths,
        res_block=residual,
    )


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
