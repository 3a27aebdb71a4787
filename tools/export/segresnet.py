"""MONAI's SegResNet with 105 classes, as large as the one that MedPTQ (arXiv 2501.17343) reports on TotalSegmentator.

    python tools/export/segresnet.py segresnet.onnx [--checkpoint model.pt] [--samples FOLDER --volume ct.nii.gz]

MONAI's bundle for the whole body has --width 32.
"""

from __future__ import annotations

from typing import Any

from common import VOLUME, library, main


def build(
    in_channels: int = 1,
    classes: int = 105,
    width: int = 48,
    down: tuple[int, ...] = (1, 2, 2, 4),
    up: tuple[int, ...] = (1, 1, 1),
) -> Any:
    """The network; `down` and `up` are blocks a level."""
    return library("monai.networks.nets").SegResNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=classes,
        init_filters=width,
        blocks_down=down,
        blocks_up=up,
    )


if __name__ == "__main__":
    raise SystemExit(main(build, VOLUME))
