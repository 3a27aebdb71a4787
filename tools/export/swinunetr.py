"""MONAI's SwinUNETR (arXiv 2201.01266) with 105 classes, as large as the one that MedPTQ (arXiv 2501.17343) reports.

    python tools/export/swinunetr.py swinunetr.onnx [--checkpoint model.pt] [--samples FOLDER --volume ct.nii.gz]

--width 24 or 12 are the smaller forms of the same network.
"""

from __future__ import annotations

from typing import Any

from common import VOLUME, library, main


def build(
    in_channels: int = 1,
    classes: int = 105,
    width: int = 48,
    depths: tuple[int, ...] = (2, 2, 2, 2),
    heads: tuple[int, ...] = (3, 6, 12, 24),
    v2: bool = False,
) -> Any:
    """The network; `v2` adds a residual convolution in front of each stage."""
    return library("monai.networks.nets").SwinUNETR(
        in_channels=in_channels,
        out_channels=classes,
        feature_size=width,
        depths=depths,
        num_heads=heads,
        use_v2=v2,
        use_checkpoint=False,
    )


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
