"""Export MONAI's UNet, SegResNet, SwinUNETR and DynUNet with random weights, to benchmark and to test on real graphs.

Usage: export_monai.py FOLDER [NAME ...]    writes FOLDER/<name>.onnx (opset 17, fixed input 1 x 1 x 96 x 96 x 96)

Needs torch and monai. The weights come from a seed; BatchNorm and InstanceNorm are in inference mode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from exporting import export_all, write
from monai.networks import nets

SIZE = 96
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "unet": lambda: nets.UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=14,
        channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2),
        num_res_units=2,
    ),
    "segresnet": lambda: nets.SegResNet(spatial_dims=3, in_channels=1, out_channels=14, init_filters=16),
    "dynunet": lambda: nets.DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=14,
        kernel_size=[3] * 5,
        strides=[1, 2, 2, 2, 2],
        upsample_kernel_size=[2] * 4,
        filters=[16, 32, 64, 128, 256],
        res_block=True,
    ),
    "swinunetr": lambda: nets.SwinUNETR(in_channels=1, out_channels=14, feature_size=24, use_checkpoint=False),
}


def export(name: str, path: Path) -> None:
    """Write one network."""
    torch.manual_seed(1)
    write(MODELS[name]().eval(), torch.zeros(1, 1, SIZE, SIZE, SIZE), path)


if __name__ == "__main__":
    export_all(MODELS, export)
