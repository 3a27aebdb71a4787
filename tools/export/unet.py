"""MONAI's UNet for volumes, at the sizes of MONAI's spleen tutorial with 14 classes.

    python tools/export/unet.py unet.onnx [--checkpoint best_metric_model.pth] [--samples FOLDER --volume ct.nii.gz]

MedPTQ's U-Net (arXiv 2501.17343) has the same widths, but other blocks: its file is a fifth larger.
"""

from __future__ import annotations

from typing import Any

from common import VOLUME, library, main


def build(
    in_channels: int = 1,
    classes: int = 14,
    widths: tuple[int, ...] = (16, 32, 64, 128, 256),
    units: int = 2,
    norm: str = "batch",
) -> Any:
    """The network; `units` residual units a level."""
    return library("monai.networks.nets").UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=classes,
        channels=widths,
        strides=(2,) * (len(widths) - 1),
        num_res_units=units,
        norm=norm,
    )


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
