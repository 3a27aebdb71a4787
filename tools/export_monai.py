"""Export MONAI's UNet, SegResNet, SwinUNETR and DynUNet with random weights, to benchmark and to test on real graphs.

Usage: export_monai.py FOLDER [NAME ...]    writes FOLDER/<name>.onnx (opset 17, fixed input 1 x 1 x 96 x 96 x 96)

Needs torch and monai. The weights come from a seed; BatchNorm and InstanceNorm are in inference mode.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
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
    network = MODELS[name]().eval()
    sample = torch.zeros(1, 1, SIZE, SIZE, SIZE)
    with torch.no_grad():
        torch.onnx.export(
            network, (sample,), str(path), opset_version=17, input_names=["x"], output_names=["y"], dynamo=False
        )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or MODELS:
        start = time.time()
        export(name, folder / f"{name}.onnx")
        print(
            name, f"{time.time() - start:.0f} s", f"{(folder / f'{name}.onnx').stat().st_size / 1e6:.1f} MB", flush=True
        )
